"""What goes wrong at the hub, in our words: the one place where its errors are translated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shoal.base.errors import ConfigError, ModelUnknown

_LOGIN = "log in with `hf auth login` or set HF_TOKEN"


@contextmanager
def translated(given: str, endpoint: str | None) -> Iterator[None]:
    """Turn errors of `huggingface_hub`, the network and the disk into ours.

    Raises:
        ModelUnknown: no such repository or revision.
        ConfigError: everything else; says how to go on.
    """
    from huggingface_hub import constants, errors

    hub = endpoint or constants.ENDPOINT
    repo = given.partition("@")[0]
    # The class from which all of its HTTP library's errors descend, whichever that is.
    transport_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"{repo} is gated: ask for access at {hub}/{repo}, then {_LOGIN}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelUnknown(
            f"no model {repo} at {hub}, and no directory of that name here. A private one? "
            f"Then {_LOGIN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelUnknown(f"{given}: {hub} has {repo}, but not this revision") from error
    except errors.OfflineModeIsEnabled as error:
        raise ConfigError(
            f"HF_HUB_OFFLINE is set, so {given} is not asked for: unset it and run "
            f"`shoal model get {given}`, or give a model's directory"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise ConfigError(
            f"{given}: {hub} answered {status}{_said(error.server_message)}{_hint(status)}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(given, hub, error.__cause__ or error) from error
    except transport_error as error:
        raise _unreachable(given, hub, error) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{given} was not downloaded from {hub}: {_first_line(error)}") from error


def _unreachable(given: str, hub: str, error: BaseException) -> ConfigError:
    return ConfigError(
        f"{hub} cannot be reached for {given} ({_first_line(error)}): check the network, "
        "HTTPS_PROXY and HF_ENDPOINT, then try again; finished files are kept"
    )


def _said(message: str | None) -> str:
    return "" if not message else f" ({' '.join(message.split())})"


def _hint(status: int) -> str:
    if status in (401, 403):
        return f": {_LOGIN}"
    return ": try again later" if status == 429 or status >= 500 else ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
