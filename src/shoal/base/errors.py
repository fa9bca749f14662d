"""The error tree: each class says whose turn it is.

```
ShoalError
+- ConfigError            yours to fix: a flag, a file, an argument
+- NoRouteError           no chain of servers covers the blocks; names the missing ones
+- PeerError              something about one peer
|  +- PeerUnreachable     it cannot be dialled, or the link broke
|  |  +- PeerUnknown      nobody told us where it is; it was not even dialled
|  +- PeerTimeout         it did not answer in time
|  +- PeerBusy            it is full for now; says when to come back
|  +- PeerRefused         it does not want us (wrong swarm, no membership, denied)
|  +- PeerMisbehaved      it broke the protocol or sent nonsense
+- SessionError           something about one session
|  +- SessionLost         its state is gone at a server; replay brings it back
|  +- SessionClosed       it was closed, by you or by its deadline
|  +- SessionTooLong      it does not fit into the server's cache at all
|  +- BadInput            rows of a wrong shape, dtype, position or value
|  +- BadOutput           good rows gave values that can't be; its own server is at fault
+- ProtocolError          bytes that are not what the protocol allows
|  +- VersionMismatch     the peer speaks another version
|  +- MessageTooLarge     over a named limit, refused before memory is taken
+- ModelError             something about a model
|  +- ModelUnknown        no such model
|  +- ModelCorrupt        weights are truncated, altered or do not match their hash
|  +- ModelUnsupported    an architecture or a format that cannot be served, and why
|  +- WeightsMissing      no peer gives the weights that are needed; names them
+- AdapterError           something about a LoRA adapter
|  +- AdapterMissing      the server doesn't hold it: send it, or go elsewhere
|  +- AdapterBad          it can't be: options, shapes, values, or it doesn't fit the model
+- InternalError          our bug
```

Every class carries `code` (its name on the wire), `retryable` (whether the same
call may succeed elsewhere or later) and `http_status`. Only classes of this tree
travel between peers; anything else becomes `InternalError` at the boundary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar


class ShoalError(Exception):
    """Base of everything this library raises on purpose."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500

    def __init__(self, detail: str = "", *, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s


class ConfigError(ShoalError):
    """A flag, a file or an argument is wrong; the message says how to fix it."""

    code = "config"
    http_status = 400


class NoRouteError(ShoalError):
    """No chain of known servers covers all blocks."""

    code = "no_route"
    retryable = True
    http_status = 503

    def __init__(
        self,
        detail: str = "",
        *,
        missing: Sequence[tuple[int, int]] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(detail, retry_after_s=retry_after_s)
        self.missing = tuple(missing)


class PeerError(ShoalError):
    """Something about one peer."""

    code = "peer"
    retryable = True
    http_status = 502


class PeerUnreachable(PeerError):
    """The peer cannot be dialled, or the link to it broke."""

    code = "unreachable"


class PeerUnknown(PeerUnreachable):
    """Nobody told us where the peer is, or that was too long ago: it was not even dialled."""

    code = "unknown"


class PeerTimeout(PeerError):
    """The peer did not answer within the deadline."""

    code = "timeout"
    http_status = 504


class PeerBusy(PeerError):
    """The peer is full for now; `retry_after_s` says when to come back."""

    code = "busy"
    http_status = 503


class PeerRefused(PeerError):
    """The peer does not want us: wrong swarm, no membership, denied."""

    code = "refused"
    retryable = False
    http_status = 403


class PeerMisbehaved(PeerError):
    """The peer broke the protocol, or sent values that cannot be."""

    code = "misbehaved"


class SessionError(ShoalError):
    """Something about one session."""

    code = "session"
    http_status = 409


class SessionLost(SessionError):
    """A server lost the session's state; a replay brings it back."""

    code = "lost"
    retryable = True


class SessionClosed(SessionError):
    """The session was closed, by its owner or by a deadline."""

    code = "closed"


class SessionTooLong(SessionError):
    """The session does not fit into the server's cache even when it is alone."""

    code = "too_long"
    http_status = 413


class BadInput(SessionError):
    """Rows of a wrong shape, dtype, position or value."""

    code = "bad_input"
    http_status = 400


class BadOutput(SessionError):
    """Good rows gave values that are not finite or don't fit their encoding.

    The server that computed them is at fault (its weights, its dtype): others may do better.
    """

    code = "bad_output"
    retryable = True
    http_status = 502


class ProtocolError(ShoalError):
    """Bytes that the protocol does not allow."""

    code = "protocol"
    http_status = 502


class VersionMismatch(ProtocolError):
    """The peer speaks another version of the protocol."""

    code = "version"


class MessageTooLarge(ProtocolError):
    """A message is over a named limit."""

    code = "too_large"
    http_status = 413


class ModelError(ShoalError):
    """Something about a model."""

    code = "model"
    http_status = 404


class ModelUnknown(ModelError):
    """No model of this name."""

    code = "model_unknown"


class ModelCorrupt(ModelError):
    """Weights are truncated, altered, or do not match their hash."""

    code = "model_corrupt"
    http_status = 500


class ModelUnsupported(ModelError):
    """An architecture or a file format that cannot be served, and why."""

    code = "model_unsupported"
    http_status = 400


class WeightsMissing(ModelError):
    """No peer that can be reached has the weights that are needed; names them."""

    code = "weights_missing"
    retryable = True
    http_status = 503


class AdapterError(ShoalError):
    """Something about a LoRA adapter."""

    code = "adapter"
    http_status = 400


class AdapterMissing(AdapterError):
    """A server doesn't hold the adapter: whoever has it sends it and tries again."""

    code = "adapter_missing"
    retryable = True
    http_status = 503


class AdapterBad(AdapterError):
    """An adapter that can't be used: options, shapes or values, or it doesn't fit the model."""

    code = "adapter_bad"


class InternalError(ShoalError):
    """A bug of ours; please report it."""

    code = "internal"


def _walk(cls: type[ShoalError]) -> Iterator[type[ShoalError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _walk(child)


ERRORS_BY_CODE: dict[str, type[ShoalError]] = {cls.code: cls for cls in _walk(ShoalError)}
"""The wire's names of errors."""


def error_from_code(code: str, detail: str, retry_after_s: float | None = None) -> ShoalError:
    """The error that a peer named; an unknown code becomes a plain `ShoalError`."""
    cls = ERRORS_BY_CODE.get(code, ShoalError)
    return cls(detail, retry_after_s=retry_after_s)
