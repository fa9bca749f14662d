"""Cuts between real servers, each in a network of its own: packets vanish, nobody is told."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from tests.e2e.recovery import Fleet, draw_prompt, pauses, reader, until
from tests.e2e.recovery_networks import Networks, missing

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(missing()), reason=missing())]

SERVERS = "a 0:3, b 3:6"
TOKENS = 50
PROMPT = draw_prompt(40)


@pytest.fixture(scope="module")
def networks():
    with Networks(["a", "b"]) as networks:
        yield networks


@pytest.fixture(scope="module")
def fleet(nursery, exactable_model, tmp_path_factory, networks):
    keys = tmp_path_factory.mktemp("keys")
    fleet = Fleet(nursery, exactable_model, keys, SERVERS, "--exact", "always")
    for place in fleet.places.values():
        place.host, place.namespace = networks.host(place.name), networks.namespace(place.name)
    try:
        fleet.start(*fleet.places)
        yield fleet
    finally:
        fleet.end()


@pytest.fixture
def network(networks):
    yield networks
    networks.heal()


def read(network, fleet, **options):
    """An answer of a client that reaches all servers, and whether it relayed at the end."""

    async def story():
        async with reader(fleet) as one:
            task = asyncio.create_task(one.read(PROMPT, TOKENS, **options))
            await until(lambda: one.sessions or task.done())
            state = one.sessions[0]
            return await task, bool(state.relays)

    return network.run(lambda: asyncio.run(story()))


@pytest.fixture(scope="module")
def undisturbed(networks, fleet):
    return read(networks, fleet)[0]


def test_two_servers_are_cut_off_from_each_other(network, fleet, undisturbed):
    """Both reach the client, which hands their rows on: nobody is replaced or blamed."""
    cut = partial(network.cut, "a", ["b"])
    answer, is_relayed = read(network, fleet, acts={15: lambda session: cut()})
    assert answer.token_ids == undisturbed.token_ids
    assert answer.chain == ["a", "b"]
    assert answer.recoveries == ()
    assert is_relayed
    print(f"cut: longest pause {answer.longest_pause_s:.1f} s")
    again, is_relayed = read(network, fleet)
    assert (again.token_ids, is_relayed) == (undisturbed.token_ids, True)
    print(f"opened across the cut: {again.longest_pause_s:.1f} s")


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("cut_s", [1.0, 6.0])
def test_a_partition_heals(network, fleet, undisturbed, name, cut_s):
    """A server that nobody else can stand in for comes back, with its cache."""

    def part(session):
        network.isolate(name)
        asyncio.get_running_loop().call_later(cut_s, network.heal)

    answer, _ = read(network, fleet, acts={15: part})
    assert answer.token_ids == undisturbed.token_ids
    assert answer.chain == ["a", "b"]
    print(f"partition of {cut_s} s: longest {answer.longest_pause_s:.1f} s {pauses(answer)}")
