"""Private swarms: certificates of membership, invites, and the pass shown in Hello.

A swarm key signs certificates. A certificate with the role `member` admits one peer;
one with the role `inviter` names a key that may sign `member` certificates in turn. An
invite carries such an inviting key, so that its holder can admit itself offline: treat
an invite as a password. Denying an inviting key shuts out everybody it admitted.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from shoal.base.errors import ConfigError, PeerRefused
from shoal.base.ids import PEER_ID_BYTES, PeerId, short
from shoal.net.identity import MEMBERSHIP, SIGNATURE_BYTES, Identity, verify
from shoal.net.keyfile import create_key_file, read_key
from shoal.wire.messages import Hello

Clock = Callable[[], float]
"""Unix time in seconds."""

Role = Literal["member", "inviter"]
MEMBER: Final[Role] = "member"
INVITER: Final[Role] = "inviter"

NAME_CHARS_MAX: Final = 64
"""Characters of a swarm's name: it is shown in tables."""

INVITE_PREFIX: Final = "shoal-invite-1-"

_Key = Annotated[bytes, msgspec.Meta(min_length=PEER_ID_BYTES, max_length=PEER_ID_BYTES)]
_Signature = Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
_SwarmName = Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_CHARS_MAX)]


class Membership(msgspec.Struct, frozen=True, array_like=True):
    """What a certificate says: `peer` has `role` in `swarm` until `expiry` (unix seconds)."""

    swarm: _SwarmName
    peer: _Key
    role: Role
    expiry: Annotated[int, msgspec.Meta(ge=0, le=2**53)] | None = None


class Certificate(msgspec.Struct, frozen=True, array_like=True):
    """An encoded `Membership` and its issuer's signature."""

    body: Annotated[bytes, msgspec.Meta(max_length=1024)]
    signature: _Signature


Chain = Annotated[list[Certificate], msgspec.Meta(min_length=1, max_length=2)]
"""From the swarm key to the peer: [member], or [inviter, member]."""


class Invite(msgspec.Struct, frozen=True, array_like=True):
    """What a joiner needs, as `INVITE_PREFIX` + base64 of this."""

    swarm: _SwarmName
    swarm_key: _Key
    inviter_seed: _Key
    certificate: Certificate


_encoder = msgspec.msgpack.Encoder()
_chain_decoder = msgspec.msgpack.Decoder(Chain)
_body_decoder = msgspec.msgpack.Decoder(Membership)
_invite_decoder = msgspec.msgpack.Decoder(Invite)


def issue(issuer: Identity, membership: Membership) -> Certificate:
    """`membership`, signed by `issuer`: a swarm key or an inviting key."""
    body = _encoder.encode(membership)
    return Certificate(body, issuer.sign(MEMBERSHIP, body))


def _open(certificate: Certificate, swarm: str, issuer: bytes, role: Role, now: float) -> bytes:
    """The peer that a certificate names, after every check."""
    if not verify(issuer, MEMBERSHIP, certificate.body, certificate.signature):
        raise PeerRefused("membership: not signed by this swarm")
    try:
        membership = _body_decoder.decode(certificate.body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PeerRefused(f"membership: malformed: {error}") from error
    if membership.swarm != swarm:
        raise PeerRefused("membership: of another swarm")
    if membership.role != role:
        raise PeerRefused(f"membership: role {membership.role!r}, expected {role!r}")
    if membership.expiry is not None and now >= membership.expiry:
        raise PeerRefused("membership: expired; ask for a new invite")
    return membership.peer


def check(chain: bytes, swarm: str, swarm_key: bytes, now: float) -> tuple[PeerId, bytes]:
    """The member that an encoded chain admits, and the key that admitted it.

    Args:
        now: unix time in seconds.

    Raises:
        PeerRefused: missing, malformed, forged, expired, or of another swarm.
    """
    if not chain:
        raise PeerRefused("membership: none shown; this swarm is private, join it by an invite")
    try:
        certificates = _chain_decoder.decode(chain)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PeerRefused(f"membership: malformed: {error}") from error
    issuer = swarm_key
    for certificate in certificates[:-1]:
        issuer = _open(certificate, swarm, issuer, INVITER, now)
    return PeerId(_open(certificates[-1], swarm, issuer, MEMBER, now)), issuer


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmKey:
    """The key that makes a private swarm. Whoever holds it decides who is in."""

    name: str
    identity: Identity

    def __post_init__(self) -> None:
        check_swarm_name(self.name)

    @property
    def public(self) -> bytes:
        """32 bytes that members check certificates against."""
        return bytes(self.identity.peer)

    @classmethod
    def create(cls, name: str) -> SwarmKey:
        """A new private swarm.

        Raises:
            ConfigError: an empty or overlong name.
        """
        return cls(name=name, identity=Identity.generate())

    @classmethod
    def load(cls, path: Path) -> SwarmKey:
        """The swarm key in a file that `save` wrote.

        Raises:
            ConfigError: no such file, no swarm key, or readable by others.
        """
        preamble, key = read_key(path)
        label, _, name = preamble.partition(":")
        if label != "swarm":
            raise ConfigError(f"{path} holds a key, but no swarm key (no line 'swarm: NAME')")
        return cls(name=name.strip(), identity=Identity(key))

    def save(self, path: Path) -> None:
        """Write the key to a new file, mode 0600.

        Raises:
            ConfigError: the file exists, or can't be written.
        """
        if not create_key_file(path, self.identity.key, f"swarm: {self.name}"):
            raise ConfigError(f"{path} exists; a swarm key is never overwritten")

    def issue(self, peer: PeerId, expiry: int | None = None) -> bytes:
        """A membership for `peer`, as it is shown in Hello."""
        membership = Membership(self.name, peer, MEMBER, expiry)
        return _encoder.encode([issue(self.identity, membership)])

    def invite(self, expiry: int | None = None) -> str:
        """A new invite; whoever joins by it is a member until `expiry` (unix seconds)."""
        inviter = Identity.generate()
        membership = Membership(self.name, inviter.peer, INVITER, expiry)
        seed = inviter.key.private_bytes_raw()
        invite = Invite(self.name, self.public, seed, issue(self.identity, membership))
        text = base64.urlsafe_b64encode(_encoder.encode(invite)).decode("ascii").rstrip("=")
        return INVITE_PREFIX + text


def check_swarm_name(name: str) -> None:
    """Refuse a name that can't be shown in one line.

    Raises:
        ConfigError: empty, overlong, or with blanks at its ends or control characters.
    """
    if not 0 < len(name) <= NAME_CHARS_MAX or name != name.strip() or not name.isprintable():
        raise ConfigError(
            f"not a swarm name: {name!r} (1 to {NAME_CHARS_MAX} printable characters, "
            "no blanks at either end)"
        )


def new_swarm(name: str) -> tuple[SwarmKey, str]:
    """A new private swarm and an invite to it that never expires.

    Raises:
        ConfigError: an empty or overlong name.
    """
    key = SwarmKey.create(name)
    return key, key.invite()


def parse_invite(text: str) -> Invite:
    """The invite in a text.

    Raises:
        ConfigError: cut off, altered, or no invite at all.
    """
    body = text.strip().removeprefix(INVITE_PREFIX)
    try:
        if body == text.strip():
            raise ValueError("wrong prefix")
        raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        invite = _invite_decoder.decode(raw)
    except (ValueError, binascii.Error, msgspec.DecodeError) as error:
        raise ConfigError(
            f"not an invite (expected {INVITE_PREFIX}..., copied as a whole): {error}"
        ) from error
    return invite


def join_by_invite(text: str, identity: Identity, *, clock: Clock) -> SwarmPass:
    """A pass for `identity` into the swarm that invites; needs no network.

    Joining again by the same invite gives an equal pass, so the invite is all that has
    to be kept.

    Raises:
        ConfigError: cut off, altered or expired.
    """
    invite = parse_invite(text)
    inviter = Identity.from_seed(invite.inviter_seed)
    member = issue(inviter, Membership(invite.swarm, identity.peer, MEMBER))
    chain = _encoder.encode([invite.certificate, member])
    try:
        check(chain, invite.swarm, invite.swarm_key, clock())
    except PeerRefused as error:
        raise ConfigError(f"this invite does not admit anybody: {error}") from error
    return SwarmPass(name=invite.swarm, swarm_key=invite.swarm_key, membership=chain, clock=clock)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmPass:
    """Which swarm we are in, what we show others, and whom we let in."""

    name: str
    swarm_key: bytes | None = None
    """The private swarm's public key; None for an open swarm."""
    membership: bytes = b""
    """Our own certificates, shown in Hello."""
    allow: frozenset[PeerId] | None = None
    """If given, nobody else is let in."""
    deny: frozenset[PeerId] = frozenset()
    """Peers, and inviting keys with everybody they admitted, that are shut out."""
    clock: Clock | None = None
    """Unix time, for the expiry of memberships; a private swarm needs it."""

    def __post_init__(self) -> None:
        check_swarm_name(self.name)
        if self.swarm_key is not None and self.clock is None:
            raise ConfigError("a private swarm's pass needs a clock to check expiry")

    @classmethod
    def open(cls, name: str) -> SwarmPass:
        """A pass for an open swarm: anybody who names it is let in."""
        return cls(name=name)

    def check(self, peer: PeerId, hello: Hello) -> None:
        """Let `peer` in, or say why not.

        Raises:
            PeerRefused: wrong swarm, no valid membership, denied, or not on the list.
        """
        if peer in self.deny:
            raise PeerRefused(f"peer {short(peer)} is on the deny list")
        if self.allow is not None and peer not in self.allow:
            raise PeerRefused(f"peer {short(peer)} is not on the allow list")
        if hello.swarm != self.name:
            raise PeerRefused(f"wrong swarm: {hello.swarm!r} is not served here")
        if self.swarm_key is not None and self.clock is not None:
            self._check_membership(peer, hello.membership, self.swarm_key, self.clock())

    def _check_membership(self, peer: PeerId, chain: bytes, key: bytes, now: float) -> None:
        member, issuer = check(chain, self.name, key, now)
        if member != peer:
            raise PeerRefused("membership: given to another peer")
        if issuer in self.deny:
            raise PeerRefused("membership: the invite it came from is on the deny list")
