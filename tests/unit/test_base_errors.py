"""The error tree: names on the wire are unique, and its drawing is true."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from shoal.base import errors
from shoal.base.errors import (
    ERRORS_BY_CODE,
    InternalError,
    NoRouteError,
    PeerBusy,
    ShoalError,
    error_from_code,
)


def tree(
    cls: type[ShoalError] = ShoalError, depth: int = 0
) -> Iterator[tuple[int, type[ShoalError]]]:
    yield depth, cls
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child, depth + 1)


CLASSES = [cls for _, cls in tree()]


def test_every_class_has_a_code_of_its_own() -> None:
    codes = [cls.code for cls in CLASSES]
    assert len(set(codes)) == len(codes) == len(ERRORS_BY_CODE)
    assert {cls.code: cls for cls in CLASSES} == ERRORS_BY_CODE
    for cls in CLASSES:
        assert "code" in vars(cls), f"{cls.__name__} inherits its parent's code"
        assert re.fullmatch(r"[a-z_]{1,32}", cls.code)
        assert 400 <= cls.http_status <= 599
        assert cls.__doc__


def test_the_drawing_in_the_docstring_is_the_tree() -> None:
    drawn = re.findall(r"^([ |]*(?:\+- )?)(\w+(?:Error|\b))", _drawing(), re.MULTILINE)
    found = [(len(prefix) // 3, name) for prefix, name in drawn]
    assert found == [(depth, cls.__name__) for depth, cls in tree()]


def _drawing() -> str:
    return (errors.__doc__ or "").split("```")[1].strip()


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.code)
def test_every_error_survives_the_wire(cls: type[ShoalError]) -> None:
    back = error_from_code(cls.code, "why", 1.5)
    assert type(back) is cls
    assert (back.detail, str(back), back.retry_after_s) == ("why", "why", 1.5)


def test_an_unknown_code_is_an_error_nevertheless() -> None:
    back = error_from_code("from_the_future", "why")
    assert type(back) is ShoalError
    assert back.retry_after_s is None


def test_who_may_try_again() -> None:
    retryable = {cls.code for cls in CLASSES if cls.retryable}
    assert retryable == {
        "no_route",
        "peer",
        "unreachable",
        "unknown",
        "timeout",
        "busy",
        "misbehaved",
        "lost",
        "bad_output",
        "adapter_missing",
        "weights_missing",
    }


def test_details() -> None:
    assert NoRouteError("x", missing=[(1, 2)], retry_after_s=2.0).missing == ((1, 2),)
    assert NoRouteError().missing == ()
    assert PeerBusy("full", retry_after_s=3.0).retry_after_s == 3.0
    assert InternalError().detail == ""
