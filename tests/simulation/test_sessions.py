"""What users do with sessions, and whose fault it is when a call fails."""

import asyncio
from itertools import pairwise

import pytest

from shoal.base.errors import BadInput
from shoal.base.spans import Span
from shoal.lab.toy_blocks import ToySequence, decode_rows, encode_rows, toy_embedding
from shoal.wire.messages import WANT_ALL, WANT_LAST, WANT_NONE
from tests.simulation.scene import now_s, scene

CHAIN = "a 0:2, b 2:4, c 4:6, spare-b 2:4"
ROW_BYTES = 64


async def together(*works):
    async with asyncio.TaskGroup() as group:
        for work in works:
            group.create_task(work)


def same_sequences(it, reader, names):
    return {name: it.hop(name, reader).sequence for name in names}


# --- a call that fails -------------------------------------------------------------------


@scene(CHAIN, iteration_s=0.02)
async def test_one_call_of_a_batch_raises(it):
    """Only its session is moved; the others don't notice."""
    readers = [await it.read(10, seed=seed) for seed in range(3)]
    others = readers[1:]
    before = [same_sequences(it, reader, "abc") for reader in others]
    guilty = it.hop("b", readers[0]).sequence
    calls = []

    def fault(call):
        calls.append(call)
        return "raise" if call.sequence == guilty else None

    runs = it["b"].backend.runs
    it["b"].fault = fault
    await together(*(reader.decode(5) for reader in readers))
    assert readers[0].chain == ["a", "spare-b", "c"]
    assert readers[0].repairs == [(["b"], ["spare-b"])]
    assert it["b"].backend.runs - runs < len(calls) - 1, "they never shared a batch"
    for reader, sequences in zip(others, before, strict=True):
        assert reader.session.epoch == 1
        assert same_sequences(it, reader, "abc") == sequences


@scene(CHAIN, iteration_s=0.02)
async def test_a_batch_that_raises_once_is_run_again(it):
    """Each call alone succeeds: nobody notices anything."""
    readers = [await it.read(10, seed=seed) for seed in range(3)]
    faults = iter(["raise"])
    it["b"].fault = lambda call: next(faults, None)
    await together(*(reader.decode(5) for reader in readers))
    assert [reader.session.epoch for reader in readers] == [1, 1, 1]
    assert next(faults, None) is None


@scene(CHAIN)
async def test_rows_of_our_own_are_nan(it):
    """The client hears BadInput; nobody is replaced or avoided, other sessions go on."""
    reader = await it.read(10)
    other = await it.read(10, seed=1)
    bad = b"\xff" * ROW_BYTES
    with pytest.raises(BadInput):
        await reader.session.step(bad, 1)
    it.readers.remove(reader)
    with pytest.raises(BadInput):
        await reader.session.step(toy_embedding(1), 1)
    await other.decode(5)
    assert other.session.epoch == 1
    assert it.client.experience.snapshot(now_s()).avoid == frozenset()
    assert it.client.num_sessions == 1


@scene(CHAIN)
async def test_a_server_sends_nan(it):
    """The next server refuses its rows: who sent them is blamed and replaced."""
    reader = await it.read(10)
    kept = same_sequences(it, reader, "a")
    it["b"].fault = lambda call: "poison"
    await reader.decode(3)
    assert reader.chain == ["a", "spare-b", "c"]
    assert "b" in [name for lost, _ in reader.repairs for name in lost]
    assert same_sequences(it, reader, "a") == kept
    assert it["b"].peer in it.client.experience.snapshot(now_s()).avoid
    assert it["c"].peer not in it.client.experience.snapshot(now_s()).avoid


@scene(CHAIN)
async def test_a_server_that_cannot_compute_replaces_itself_not_its_predecessor(it):
    """It got good rows: the one before it stays, with its cache."""
    reader = await it.read(10)
    kept = same_sequences(it, reader, "a")
    it["b"].fault = lambda call: "overflow"
    await reader.decode(3)
    assert reader.chain == ["a", "spare-b", "c"]
    assert same_sequences(it, reader, "a") == kept
    avoided = it.client.experience.snapshot(now_s()).avoid
    assert it["b"].peer in avoided
    assert it["a"].peer not in avoided


@scene("a 0:2, b 2:4, spare-b 2:4")
async def test_the_last_server_sends_nan(it):
    """The client is the next receiver: it refuses the rows and replaces the server."""
    reader = await it.read(10)
    it["b"].fault = lambda call: "poison"
    await reader.decode(3)
    assert reader.chain == ["a", "spare-b"]


@scene("a 0:2, b 2:4")
async def test_a_wish_that_does_not_exist(it):
    """It is refused before it is logged: no server would take the frame, ever."""
    reader = await it.read(10)
    with pytest.raises(BadInput):
        reader.session.append(toy_embedding(1), 1, want=7)
    await reader.decode(1)


# --- forks and truncations ---------------------------------------------------------------


@scene(CHAIN)
async def test_a_fork_where_the_parent_was_just_lost(it):
    """The replacement never saw the parent: the fork's rows come from the log before it."""
    reader = await it.read(30)
    await reader.decode(4)
    await it["b"].crash()
    child = await reader.fork(20)
    assert child.chain == ["a", "spare-b", "c"]
    await together(reader.decode(4), child.decode(4))
    assert (child.session.length, reader.session.length) == (24, 38)
    assert reader.chain == ["a", "spare-b", "c"]


@scene(CHAIN)
async def test_forks_and_truncations_after_a_repair(it):
    reader = await it.read(30)
    await it["b"].crash()
    await reader.decode(2)
    reader.truncate(25)
    child = await reader.fork(23)
    grandchild = await child.fork(7)
    await together(reader.decode(3), child.verify(4), grandchild.prefill(20))
    reader.truncate(5)
    child.truncate(22)
    await together(reader.decode(3), child.decode(3), grandchild.decode(3))
    assert [one.session.epoch for one in (child, grandchild)] == [1, 1]
    assert [one.session.length for one in (reader, child, grandchild)] == [8, 25, 30]


@scene("a 0:2, b 2:4, c 4:6")
async def test_a_fork_computes_nothing_again(it):
    reader = await it.read(30)
    runs = [it[name].backend.runs for name in "abc"]
    child = await reader.fork(20)
    assert [it.hop(name, child).settled_length for name in "abc"] == [20, 20, 20]
    await child.decode(1)
    assert [it[name].backend.runs for name in "abc"] == [count + 1 for count in runs]


@scene("a 0:2, b 2:4", coarse_truncate=4)
async def test_a_truncation_that_loses_more_than_asked(it):
    """Recurrent state: the rows between come again, with the same results."""
    reader = await it.read(30)
    for length in (27, 18, 17, 6):
        reader.truncate(length)
        await reader.decode(2)
    assert reader.session.epoch == 1


@scene("a 0:2, b 2:4", coarse_truncate=1 << 20)
async def test_a_truncation_that_loses_everything(it):
    """Sliding windows behind their margin: all rows come again, with the same results."""
    reader = await it.read(30)
    for length in (27, 18, 6):
        reader.truncate(length)
        await reader.decode(2)
    child = await reader.fork(4)
    await child.decode(2)
    assert reader.session.epoch == 1


# --- encodings and answers ---------------------------------------------------------------


def expected_rows(borders, tokens, encoding):
    """Each token's answer when every link of the chain carries `encoding`."""
    sequences = [ToySequence(Span(start, end)) for start, end in pairwise(borders)]
    rows = []
    for token in tokens:
        row = encode_rows(toy_embedding(token), encoding)
        for sequence in sequences:
            row = encode_rows(sequence.push(decode_rows(row, encoding), shape=1), encoding)
        rows.append(row)
    return rows


@scene("a 0:2, b 2:4, c 4:6, spare-b 2:4", iteration_s=0.01)
async def test_two_encodings_side_by_side(it):
    """bfloat16 and float32 rows share servers, batches and frames; one server is lost."""
    tokens = list(range(12))

    async def use(encoding):
        right = expected_rows([0, 2, 4, 6], tokens, encoding)
        async with await it.client.open_session(encoding) as session:
            for token, row in zip(tokens, right, strict=True):
                step = encode_rows(toy_embedding(token), encoding)
                assert await session.step(step, 1) == row
            assert len(session.recoveries) == 1

    async def lose():
        await asyncio.sleep(0.3)
        await it["b"].crash()

    await together(use("bfloat16"), use("float32"), lose())


@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 7, 8])
def test_wanted_rows_and_chunks(chunk_tokens):
    """All, the last or no rows come back, however the step is cut up."""

    @scene("a 0:2, b 2:4")
    async def story(it):
        session = await it.client.open_session("float32")
        reference = (await it.read()).reference
        for want in (WANT_ALL, WANT_LAST, WANT_NONE, WANT_ALL):
            tokens = [session.length + index for index in range(7)]
            right = [
                reference.push(token, min(chunk_tokens, 7 - index // chunk_tokens * chunk_tokens))
                for index, token in enumerate(tokens)
            ]
            rows = b"".join(map(toy_embedding, tokens))
            got = await session.step(rows, 7, want=want, chunk_tokens=chunk_tokens)
            expected = {WANT_ALL: right, WANT_LAST: right[-1:], WANT_NONE: []}[want]
            assert got == b"".join(expected)
        session.close()

    story()


@scene("a 0:2, b 2:4, c 4:6, spare-b 2:4", iteration_s=0.02)
async def test_steps_in_a_pipeline(it):
    """`append` and `rows`: many steps under way, each answer once, in order, over a loss."""
    session = await it.client.open_session("float32")
    reference = (await it.read()).reference
    right = []
    for token in range(30):
        session.append(toy_embedding(token), 1)
        right.append(reference.push(token, 1))
    started_s = now_s()
    assert await session.rows(0, 10) == b"".join(right[:10])
    await it["b"].crash()
    for position in range(10, 30):
        assert await session.rows(position, position + 1) == right[position]
    assert now_s() - started_s < 30 * 3 * 0.02, "the servers did not work at the same time"
    assert len(session.recoveries) == 1
    session.close()


@scene(CHAIN)
async def test_rows_that_can_not_be_made_are_told_to_who_asked(it):
    """They are never sent, so nobody who shares the stream is cut off; the session goes on."""
    reader, other = await it.read(10), await it.read(10, seed=1)
    before = same_sequences(it, other, "abc")

    def unknown_token(position, count):
        raise BadInput("token 99 is outside the vocabulary")

    with pytest.raises(BadInput, match="outside the vocabulary"):
        await reader.session.step(unknown_token, 300)
    with pytest.raises(BadInput, match="1 rows are 64 bytes, got 63"):
        await reader.session.step(lambda position, count: bytes(ROW_BYTES * count - 1), 1)
    await together(reader.decode(3), other.decode(3))
    assert reader.session.epoch == other.session.epoch == 1
    assert same_sequences(it, other, "abc") == before
