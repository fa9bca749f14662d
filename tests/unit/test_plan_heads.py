"""Which head a thin client asks."""

import pytest

from shoal.plan.heads import HeadOffer, choose_head


def offers(text):
    """`a:x b:y* c:x`: peer and class; a star leaves."""
    found = []
    for word in text.split():
        name, _, numerics = word.rstrip("*").partition(":")
        found.append(
            HeadOffer(peer=name.encode(), numerics=numerics, is_leaving=word.endswith("*"))
        )
    return found


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("", {}, None),
        ("a:x", {"avoid": {b"a"}}, None),
        ("a:x b:x", {}, b"a"),
        ("a:x b:x", {"avoid": {b"a"}}, b"b"),
        ("a:x* b:x", {}, b"b"),
        ("a:x*", {}, b"a"),
        ("a:x b:y c:y", {}, b"b"),
        ("a:x b:y c:y", {"numerics": "x"}, b"a"),
        ("a:x* b:y", {"numerics": "x"}, b"b"),
        ("a:x b:y c:y", {"numerics": "gone"}, b"b"),
        ("a:x b:x c:x", {"sessions": {b"a": 2, b"b": 1, b"c": 1}}, b"b"),
        ("a:x b:y", {"avoid": {b"a"}, "numerics": "x"}, b"b"),
    ],
)
def test_who_is_asked(text, options, expected):
    assert choose_head(offers(text), **options) == expected
