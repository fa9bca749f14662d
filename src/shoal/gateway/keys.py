"""API keys: who may ask, and how much. Read from a TOML file, or nobody needs one.

[alice]
key = "sk-..."             # or key_sha256 = "<64 hex digits>"
at_once = 4                # answers running or waiting
requests_per_minute = 60
tokens_per_minute = 100000
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shoal.base.errors import ConfigError
from shoal.gateway.errors import ApiError

FILE_BYTES_MAX: Final = 1 << 20
"""Some thousand keys."""

KEY_CHARS_MIN: Final = 16
"""Shorter keys can be guessed."""

_MINUTE_S: Final = 60.0

_LIMITS: Final = ("at_once", "requests_per_minute", "tokens_per_minute")


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Somebody with a key, or everybody where there are none. None: without a limit."""

    name: str = ""
    at_once: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


ANYBODY: Final = Caller()


class Keys:
    """Finds callers by their keys. Only hashes are kept, so that comparing tells nothing."""

    def __init__(self, callers: Mapping[str, Caller]) -> None:
        """`callers` by the SHA-256 of their keys, in hex; empty: anybody may ask."""
        self._callers = dict(callers)

    @property
    def is_open(self) -> bool:
        """Whether nobody needs a key."""
        return not self._callers

    def find(self, authorization: str | None) -> Caller:
        """Who sends this Authorization header.

        Raises:
            ApiError: 401: none, or an unknown key.
        """
        if self.is_open:
            return ANYBODY
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(
                401, "send your API key: Authorization: Bearer KEY", code="missing_api_key"
            )
        caller = self._callers.get(hash_of(key.strip()))
        if caller is None:
            raise ApiError(401, "this API key is not known here", code="invalid_api_key")
        return caller


def hash_of(key: str) -> str:
    """As files may hold it in place of the key."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> Keys:
    """The keys in a file.

    Raises:
        ConfigError: it can't be read, or something in it can't be; names the section.
    """
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ConfigError(f"--api-keys {path}: larger than {FILE_BYTES_MAX} bytes")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"can't read --api-keys {path}: {error}") from error
    callers: dict[str, Caller] = {}
    for name, section in content.items():
        if not isinstance(section, dict):
            raise ConfigError(f"{path}: {name} is no section; write [{name}] and key = ... below")
        digest = _digest(section, f"{path}: [{name}]")
        if digest in callers:
            raise ConfigError(f"{path}: [{name}] has the key of [{callers[digest].name}]")
        callers[digest] = _caller(name, section, f"{path}: [{name}]")
    if not callers:
        raise ConfigError(f"{path} holds no key; write [NAME] and key = ... below it")
    return Keys(callers)


def _digest(section: dict[str, Any], where: str) -> str:
    key, digest = section.get("key"), section.get("key_sha256")
    if (key is None) == (digest is None):
        raise ConfigError(f"{where}: give either key or key_sha256")
    if digest is not None:
        if not isinstance(digest, str) or len(digest) != 64 or not _is_hex(digest):
            raise ConfigError(f"{where}: key_sha256 is 64 hex digits")
        return digest.lower()
    if not isinstance(key, str) or len(key) < KEY_CHARS_MIN:
        raise ConfigError(f"{where}: key is a text of at least {KEY_CHARS_MIN} characters")
    return hash_of(key)


def _is_hex(text: str) -> bool:
    return all(digit in "0123456789abcdefABCDEF" for digit in text)


def _caller(name: str, section: dict[str, Any], where: str) -> Caller:
    unknown = set(section) - {"key", "key_sha256", *_LIMITS}
    if unknown:
        raise ConfigError(f"{where}: unknown {min(unknown)}; known are {', '.join(_LIMITS)}")
    for limit in _LIMITS:
        value = section.get(limit, 1)
        if type(value) is not int or value < 1:
            raise ConfigError(f"{where}: {limit} is a number of at least 1")
    return Caller(name=name, **{limit: section.get(limit) for limit in _LIMITS})


class Allowance:
    """What callers used lately: buckets that fill up again by the minute."""

    def __init__(self) -> None:
        self._requests: dict[str, _Bucket] = {}
        self._tokens: dict[str, _Bucket] = {}

    def take_request(self, caller: Caller, now_s: float) -> None:
        """One request more.

        Raises:
            ApiError: 429: too many, or their tokens were, in the last minute.
        """
        tokens = self._bucket(self._tokens, caller.name, caller.tokens_per_minute, now_s)
        if tokens is not None and tokens.level <= 0:
            raise _refusal("tokens", caller.tokens_per_minute, tokens.wait_s(1.0))
        requests = self._bucket(self._requests, caller.name, caller.requests_per_minute, now_s)
        if requests is not None:
            if requests.level < 1:
                raise _refusal("requests", caller.requests_per_minute, requests.wait_s(1.0))
            requests.level -= 1

    def use_tokens(self, caller: Caller, count: int, now_s: float) -> None:
        """Tokens that were read or written; may go below zero, then requests wait."""
        bucket = self._bucket(self._tokens, caller.name, caller.tokens_per_minute, now_s)
        if bucket is not None:
            bucket.level -= count

    @staticmethod
    def _bucket(
        buckets: dict[str, _Bucket], name: str, per_minute: int | None, now_s: float
    ) -> _Bucket | None:
        if per_minute is None:
            return None
        bucket = buckets.get(name)
        if bucket is None:
            bucket = buckets[name] = _Bucket(per_minute, now_s)
        bucket.fill(now_s)
        return bucket


class _Bucket:
    def __init__(self, per_minute: int, now_s: float) -> None:
        self.level = float(per_minute)
        self._per_minute = per_minute
        self._at_s = now_s

    def fill(self, now_s: float) -> None:
        added = (now_s - self._at_s) / _MINUTE_S * self._per_minute
        self.level, self._at_s = min(float(self._per_minute), self.level + added), now_s

    def wait_s(self, wanted: float) -> float:
        return max(0.0, wanted - self.level) / self._per_minute * _MINUTE_S


def _refusal(what: str, limit: int | None, wait_s: float) -> ApiError:
    return ApiError(
        429, f"your key may use {limit} {what} per minute: try again in {wait_s:.0f} s",
        code="rate_limit_exceeded", retry_after_s=max(1.0, wait_s),
    )  # fmt: skip
