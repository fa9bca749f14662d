"""Which rows run next: properties of every batch."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from shoal.base.ids import PeerId, SessionId
from shoal.server.scheduler import Waiting, choose_batch

OWNERS = [PeerId(bytes([number]) * 32) for number in range(3)]


def waiting_of(*items):
    """(owner, tokens, is_replay) of each, in the order in which they came."""
    return [
        Waiting(
            key=(SessionId(bytes([index]) * 16), 0), owner=OWNERS[owner], num_tokens=tokens,
            is_replay=is_replay, since=index,
        )
        for index, (owner, tokens, is_replay) in enumerate(items)
    ]  # fmt: skip


def choose(items, budget_tokens, **limits):
    """Indices of the chosen, in order."""
    keys = choose_batch(waiting_of(*items), budget_tokens=budget_tokens, **limits)
    return [session[0] for session, _ in keys]


queues = st.lists(
    st.tuples(st.integers(0, 2), st.one_of(st.just(1), st.integers(1, 40)), st.booleans()),
    max_size=30,
)
budgets = st.integers(1, 60)


@given(queues, budgets)
def test_something_runs_when_something_waits_and_the_budget_holds(items, budget):
    chosen = choose(items, budget)
    assert bool(chosen) == bool(items)
    assert len(set(chosen)) == len(chosen)
    tokens = sum(items[index][1] for index in chosen)
    assert tokens <= budget or len(chosen) == 1


@given(queues, budgets)
def test_decode_rows_go_first(items, budget):
    chosen = choose(items, budget)
    decodes = {i for i, (_, tokens, is_replay) in enumerate(items) if tokens == 1 and not is_replay}
    if not decodes <= set(chosen):
        assert set(chosen) < decodes
        assert len(chosen) == budget
    assert set(chosen[: len(decodes)]) <= decodes or not decodes


@given(queues, budgets)
def test_no_owner_gets_a_second_decode_row_before_the_others_first(items, budget):
    decodes = [(owner, 1, False) for owner, _, _ in items]
    chosen = choose(decodes, budget)
    counts = {owner: 0 for owner, _, _ in decodes}
    waiting = {owner: sum(1 for item in decodes if item[0] == owner) for owner in counts}
    for index in chosen:
        owner = decodes[index][0]
        assert all(
            counts[owner] <= counts[other] or counts[other] == waiting[other] for other in counts
        )
        counts[owner] += 1


@given(queues)
def test_the_oldest_chunk_is_never_passed_over_for_ever(items):
    """It runs first once no decode row waits, however large it is."""
    chunks = [(owner, max(2, tokens), is_replay) for owner, tokens, is_replay in items]
    if chunks:
        assert choose(chunks, 1)[0] == 0


def test_a_batch_is_filled_with_what_fits():
    items = [(0, 30, False), (0, 30, False), (1, 1, False), (2, 10, True)]
    assert choose(items, 42) == [2, 0, 3]
    assert choose([(0, 600, False), (1, 1, False)], 512) == [1]
    assert choose([(0, 600, False)], 512) == [0]


@given(queues, budgets, st.integers(1, 3), st.integers(0, 2))
def test_no_owner_gets_more_than_its_rows_and_no_more_chunks_than_may_run(
    items, budget, rows, chunks
):
    chosen = choose(items, budget, rows_per_owner=rows, chunks_max=chunks)
    decodes = [items[index][0] for index in chosen if items[index][1:] == (1, False)]
    assert all(decodes.count(owner) <= rows for owner in decodes)
    assert len(chosen) - len(decodes) <= chunks


def test_the_owner_who_waited_longest_for_a_chunk_is_next():
    first, second, third = waiting_of((0, 5, False), (1, 5, False), (2, 5, False))
    turns = [replace(first, owner_turn=3.0), replace(second, owner_turn=1.0), third]
    keys = choose_batch(turns, budget_tokens=10)
    assert keys == [third.key, second.key]


def test_a_chunk_that_was_passed_over_goes_first():
    items = [(0, 1, False)] * 50 + [(1, 40, False), (1, 200, False)]
    assert choose(items, 50, is_chunk_due=True)[0] == 50
    assert len(choose(items, 50, is_chunk_due=True)) == 11
    assert 50 not in choose(items, 50)
    assert choose(items[51:], 50, is_chunk_due=True) == [0]


@given(queues, budgets, st.data())
def test_rebuilt_sessions_keep_their_places_and_fill_them_by_seniority(items, budget, data):
    """Whatever one owner says of its sessions' age, prompts of others run when they would have."""
    plain = waiting_of(*items)
    ages = [data.draw(st.one_of(st.none(), st.integers(0, 3))) for _ in plain]
    rebuilt = [
        item
        if age is None or item.is_decode
        else replace(item, seniority=(False, age, item.key[0]))
        for item, age in zip(plain, ages, strict=True)
    ]
    before = choose_batch(plain, budget_tokens=10_000)
    after = choose_batch(rebuilt, budget_tokens=10_000)
    old = {item.key: item.seniority for item in rebuilt if item.seniority is not None}
    assert [key in old for key in before] == [key in old for key in after]
    assert [key for key in before if key not in old] == [key for key in after if key not in old]
    ages_in_order = [old[key] for key in after if key in old]
    assert ages_in_order == sorted(ages_in_order)
