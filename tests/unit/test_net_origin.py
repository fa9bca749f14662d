"""What an address tells about who is there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.net.origin import origin_of


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2::3", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::3", "2001:db8:1:3::/64"),
        *[
            (host, None)
            for host in (
                "127.0.0.1", "::1", "::ffff:127.0.0.1", "10.1.2.3", "172.16.0.1", "172.31.0.1",
                "192.168.1.1", "169.254.1.1", "100.64.0.1", "fd00::1", "fe80::1%eth0",
                "", "a", "host.example", "203.0.113", "2001:db8::/64",
            )
        ],
        ("172.32.0.1", "172.32.0.1"),
        ("100.128.0.1", "100.128.0.1"),
    ],
)  # fmt: skip
def test_who_counts_as_one(host, origin):
    assert origin_of(host) == origin


@given(st.text(max_size=60))
def test_no_text_is_too_odd(text):
    assert origin_of(text) is None or "." in text or ":" in text
