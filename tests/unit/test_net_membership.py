"""Private swarms: who gets in, and who does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import ConfigError, PeerRefused
from shoal.base.ids import PeerId
from shoal.net.identity import Identity
from shoal.net.membership import (
    INVITE_PREFIX,
    INVITER,
    MEMBER,
    Membership,
    SwarmKey,
    SwarmPass,
    check,
    issue,
    join_by_invite,
    new_swarm,
    parse_invite,
)
from shoal.wire.messages import Hello, decode, encode

NOW = 1_800_000_000
SWARM = SwarmKey.create("reef")
OTHER = SwarmKey.create("reef")
ALICE = Identity.generate()
BOB = Identity.generate()
INVITER_KEY = Identity.generate()
STRANGER = Identity.generate()


def clock() -> float:
    return float(NOW)


def chain(*certificates: object) -> bytes:
    return msgspec.msgpack.encode(list(certificates))


def certified(
    issuer: Identity,
    peer: Identity,
    role: str = MEMBER,
    expiry: int | None = None,
    swarm: str = "reef",
) -> object:
    body = Membership(swarm, peer.peer, role, expiry)  # type: ignore[arg-type]
    return issue(issuer, body)


def hello(membership: bytes = b"", swarm: str = "reef") -> Hello:
    return Hello(1, swarm, "control", membership)


def private_pass(**options: object) -> SwarmPass:
    return SwarmPass(name="reef", swarm_key=SWARM.public, clock=clock, **options)  # type: ignore[arg-type]


GOOD: dict[str, Callable[[], bytes]] = {
    "by the swarm key": lambda: SWARM.issue(ALICE.peer),
    "not yet expired": lambda: SWARM.issue(ALICE.peer, NOW + 1),
    "by an inviting key": lambda: chain(
        certified(SWARM.identity, INVITER_KEY, INVITER), certified(INVITER_KEY, ALICE)
    ),
    "by an invite": lambda: join_by_invite(SWARM.invite(), ALICE, clock=clock).membership,
    "by an invite with an end": lambda: (
        join_by_invite(SWARM.invite(NOW + 1), ALICE, clock=clock).membership
    ),
}

BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "none": (lambda: b"", "join it by an invite"),
    "garbage": (lambda: b"\xc1garbage", "malformed"),
    "empty chain": (lambda: chain(), "malformed"),
    "long chain": (lambda: chain(*[certified(SWARM.identity, ALICE, INVITER)] * 3), "malformed"),
    "of another swarm key": (lambda: OTHER.issue(ALICE.peer), "not signed"),
    "signed by oneself": (lambda: chain(certified(ALICE, ALICE)), "not signed"),
    "of another peer": (lambda: SWARM.issue(BOB.peer), "another peer"),
    "expired": (lambda: SWARM.issue(ALICE.peer, NOW), "expired"),
    "of another swarm": (
        lambda: chain(certified(SWARM.identity, ALICE, swarm="lagoon")),
        "another swarm",
    ),
    "an inviter is no member": (
        lambda: chain(certified(SWARM.identity, ALICE, INVITER)),
        "role 'inviter'",
    ),
    "a member can't invite": (
        lambda: chain(certified(SWARM.identity, BOB), certified(BOB, ALICE)),
        "role 'member'",
    ),
    "by a stranger's inviting key": (
        lambda: chain(certified(STRANGER, INVITER_KEY, INVITER), certified(INVITER_KEY, ALICE)),
        "not signed",
    ),
    "by an expired inviting key": (
        lambda: chain(
            certified(SWARM.identity, INVITER_KEY, INVITER, NOW), certified(INVITER_KEY, ALICE)
        ),
        "expired",
    ),
    "by an inviting key, expired": (
        lambda: chain(
            certified(SWARM.identity, INVITER_KEY, INVITER),
            certified(INVITER_KEY, ALICE, expiry=NOW),
        ),
        "expired",
    ),
    "by another inviting key": (
        lambda: chain(certified(SWARM.identity, INVITER_KEY, INVITER), certified(STRANGER, ALICE)),
        "not signed",
    ),
    "a signed body of nonsense": (
        lambda: chain([b"nonsense", SWARM.identity.sign("membership", b"nonsense")]),
        "malformed",
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_members_get_in(name: str) -> None:
    private_pass().check(ALICE.peer, hello(GOOD[name]()))


@pytest.mark.parametrize("name", BAD)
def test_others_do_not(name: str) -> None:
    make, reason = BAD[name]
    with pytest.raises(PeerRefused, match=reason):
        private_pass().check(ALICE.peer, hello(make()))


@given(st.binary(max_size=300))
def test_no_garbage_gets_in(garbage: bytes) -> None:
    with pytest.raises(PeerRefused):
        private_pass().check(ALICE.peer, hello(garbage))


@given(index=st.integers(min_value=0), bit=st.integers(min_value=0, max_value=7))
def test_no_altered_membership_gets_in(index: int, bit: int) -> None:
    membership = bytearray(SWARM.issue(ALICE.peer, NOW + 1))
    membership[index % len(membership)] ^= 1 << bit
    with pytest.raises(PeerRefused):
        check(bytes(membership), "reef", SWARM.public, NOW)


def test_an_open_swarm_asks_for_its_name_only() -> None:
    swarm_pass = SwarmPass.open("reef")
    swarm_pass.check(ALICE.peer, hello())
    swarm_pass.check(ALICE.peer, hello(b"whatever"))
    with pytest.raises(PeerRefused, match="wrong swarm"):
        swarm_pass.check(ALICE.peer, hello(swarm="lagoon"))


def test_deny_and_allow_lists() -> None:
    denying = SwarmPass(name="reef", deny=frozenset({ALICE.peer}))
    denying.check(BOB.peer, hello())
    with pytest.raises(PeerRefused, match="deny list"):
        denying.check(ALICE.peer, hello())
    allowing = SwarmPass(name="reef", allow=frozenset({ALICE.peer, BOB.peer}), deny=denying.deny)
    allowing.check(BOB.peer, hello())
    with pytest.raises(PeerRefused, match="not on the allow list"):
        allowing.check(STRANGER.peer, hello())
    with pytest.raises(PeerRefused, match="deny list"):
        allowing.check(ALICE.peer, hello())


def test_a_list_does_not_replace_a_membership() -> None:
    with pytest.raises(PeerRefused, match="membership"):
        private_pass(allow=frozenset({ALICE.peer})).check(ALICE.peer, hello())


def test_denying_an_inviting_key_shuts_out_all_it_admitted() -> None:
    invite = SWARM.invite()
    inviting = Identity.from_seed(parse_invite(invite).inviter_seed).peer
    swarm_pass = private_pass(deny=frozenset({inviting}))
    swarm_pass.check(BOB.peer, hello(SWARM.issue(BOB.peer)))
    with pytest.raises(PeerRefused, match="invite"):
        swarm_pass.check(ALICE.peer, hello(join_by_invite(invite, ALICE, clock=clock).membership))


def test_an_invite_brings_two_joiners_together() -> None:
    key, invite = new_swarm("a reef")
    passes = {who: join_by_invite(f" {invite}\n", who, clock=clock) for who in (ALICE, BOB)}
    assert passes[ALICE] == join_by_invite(invite, ALICE, clock=clock)
    assert passes[ALICE].name == key.name == "a reef"
    assert passes[ALICE].swarm_key == key.public
    for us, them in ((ALICE, BOB), (BOB, ALICE)):
        shown = hello(passes[them].membership, "a reef")
        passes[us].check(them.peer, shown)
        assert decode(encode(shown)) == shown


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: "hello",
        lambda text: text.removeprefix(INVITE_PREFIX),
        lambda text: INVITE_PREFIX,
        lambda text: text[:-8],
        lambda text: text[:100],
        lambda text: text + "AAAA",
        lambda text: text.replace(text[60], "*"),
        lambda text: text[:-30] + ("A" if text[-30] != "A" else "B") + text[-29:],
        lambda text: text + "é",
    ],
)
def test_a_spoilt_invite_is_refused(spoil: Callable[[str], str]) -> None:
    _, invite = new_swarm("reef")
    with pytest.raises(ConfigError, match="invite"):
        join_by_invite(spoil(invite), ALICE, clock=clock)


def test_an_expired_invite_is_refused() -> None:
    with pytest.raises(ConfigError, match="expired"):
        join_by_invite(SWARM.invite(NOW), ALICE, clock=clock)


def test_a_swarm_key_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "swarm.pem"
    key = SwarmKey.create("große Bucht: 2")
    key.save(path)
    loaded = SwarmKey.load(path)
    assert (loaded.name, loaded.public) == (key.name, key.public)
    with pytest.raises(ConfigError, match="never overwritten"):
        SWARM.save(path)
    assert SwarmKey.load(path).public == key.public


def test_an_identity_file_is_no_swarm_key(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    Identity.load_or_create(path)
    with pytest.raises(ConfigError, match="no swarm key"):
        SwarmKey.load(path)


@pytest.mark.parametrize("name", ["", " reef", "reef ", "a\nb", "x" * 65, "\x1b[31m"])
def test_a_name_that_cannot_be_shown(name: str) -> None:
    with pytest.raises(ConfigError, match="not a swarm name"):
        new_swarm(name)
    with pytest.raises(ConfigError, match="not a swarm name"):
        SwarmPass.open(name)


def test_a_private_pass_needs_a_clock() -> None:
    with pytest.raises(ConfigError, match="clock"):
        SwarmPass(name="reef", swarm_key=SWARM.public)


def test_check_names_the_member_and_its_issuer() -> None:
    member, issuer = check(SWARM.issue(PeerId(ALICE.peer)), "reef", SWARM.public, NOW)
    assert (member, issuer) == (ALICE.peer, SWARM.public)
