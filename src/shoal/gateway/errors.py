"""Errors as OpenAI's clients expect them: a status, and an object that says what to do."""

from __future__ import annotations

import logging
import math
from typing import Any, Final

from shoal.base.errors import (
    BadInput,
    BadOutput,
    ConfigError,
    ModelUnsupported,
    NoRouteError,
    PeerError,
    SessionTooLong,
    ShoalError,
)

logger = logging.getLogger(__name__)

_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}

RETRY_AFTER_S: Final = 5.0
"""When a swarm that can't answer now is worth another try, if nobody said."""


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kind = _TYPES.get(self.status, "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """What the status needs besides."""
        found = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after_s is not None:
            found["Retry-After"] = str(math.ceil(self.retry_after_s))
        return found


def too_long(prompt_tokens: int, wanted: int, limit: int) -> ApiError:
    """A prompt, or prompt and answer, that no session holds."""
    asked = f"{prompt_tokens} in the prompt" + (f" and {wanted} in the answer" if wanted else "")
    return ApiError(
        400,
        f"this model's context holds {limit} tokens, but you asked for {asked}: shorten the "
        "messages or max_tokens",
        code="context_length_exceeded",
        param="messages",
    )


def from_shoal(error: ShoalError) -> ApiError:
    """What a failure of the swarm is to somebody who knows nothing of swarms."""
    message = error.detail or type(error).__name__
    match error:
        case SessionTooLong():
            return ApiError(400, message, code="context_length_exceeded", param="messages")
        case BadOutput():  # our own model's fault, whoever computed it
            return ApiError(500, message, code=error.code)
        case BadInput() | ConfigError() | ModelUnsupported():
            return ApiError(400, message, code=error.code)
        case NoRouteError() | PeerError():
            # Whatever a peer did: to this caller it is the service that is not there now.
            return ApiError(
                503, message, code=error.code, retry_after_s=error.retry_after_s or RETRY_AFTER_S
            )
    return ApiError(error.http_status, message, code=error.code)


def as_api_error(error: Exception, what: str) -> ApiError:
    """What to tell the caller of any failure; a bug is logged under `what`."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ShoalError):
        return from_shoal(error)
    logger.error("failed: %s", what, exc_info=error)
    return ApiError(500, f"a bug of the gateway; its log says more about {what}", code="internal")
