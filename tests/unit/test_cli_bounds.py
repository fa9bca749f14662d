"""Options about strangers: what they become, and errors that name them."""

import pytest

from shoal.base.errors import ConfigError
from shoal.base.ids import peer_text
from shoal.cli import bounds
from shoal.net.identity import Identity
from shoal.server.quotas import Quotas

PEER = Identity.from_seed(bytes(32)).peer
DEFAULTS = {
    "allow": None, "deny": None, "client_sessions": bounds.CLIENT_SESSIONS,
    "cache_share": bounds.CACHE_SHARE, "client_streams": bounds.CLIENT_STREAMS,
    "client_rate": bounds.CLIENT_RATE, "client_rows": bounds.CLIENT_ROWS,
    "slowdown": bounds.SLOWDOWN, "queue_memory": bounds.QUEUE_MEMORY,
    "log_memory": bounds.LOG_MEMORY, "training_memory": bounds.TRAINING_MEMORY,
    "idle_timeout": bounds.IDLE_TIMEOUT, "address_share": bounds.ADDRESS_SHARE,
    "training_rows": bounds.TRAINING_ROWS,
}  # fmt: skip


def test_the_defaults_are_those_of_the_server():
    parsed = bounds.parse_bounds(**DEFAULTS)
    assert parsed == bounds.Bounds()
    assert parsed.server_config({}).quotas == Quotas()


def test_training_may_be_refused_or_get_less():
    refused = bounds.parse_bounds(**{**DEFAULTS, "training_memory": "0"})
    assert not refused.server_config({}).training.is_open
    less = bounds.parse_bounds(**{**DEFAULTS, "training_memory": "100MB"})
    assert less.training.pass_bytes_max == less.training.kept_bytes_max == 10**8


def test_an_address_may_get_less_or_all():
    config = bounds.parse_bounds(**{**DEFAULTS, "address_share": 0.5}).server_config({})
    assert config.quotas.address_share == config.training.address_share == 0.5
    unbound = bounds.parse_bounds(**{**DEFAULTS, "address_share": 1.0}).server_config({})
    assert unbound.quotas.streams_per_address > 10**6


def test_options_reach_the_server():
    options = {"cache_share": 1.0, "client_rate": "1MB", "slowdown": 3.0, "client_rows": 4,
               "training_rows": 100}  # fmt: skip
    parsed = bounds.parse_bounds(**{**DEFAULTS, **options, "deny": [peer_text(PEER)]})
    config = parsed.server_config({})
    assert (config.quotas.cache_share, config.quotas.bytes_per_s_per_client) == (1.0, 10**6)
    assert (config.engine.fair.slowdown_max, config.engine.fair.rows_per_client) == (3.0, 4)
    assert config.training.rows_per_pass_max == 100
    assert (parsed.allow, parsed.deny) == (None, {PEER})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("cache_share", 0.0), ("cache_share", 2.0), ("slowdown", 1.0), ("client_rate", "much"),
        ("client_rate", "0"), ("queue_memory", "0"), ("log_memory", "-1"), ("allow", ["me"]),
        ("training_memory", "some"), ("address_share", 0.0), ("address_share", 1.5),
        ("deny", ["1" * 52]),
    ],
)  # fmt: skip
def test_nonsense_is_refused_by_the_options_name(option, value):
    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')}"):
        bounds.parse_bounds(**{**DEFAULTS, option: value})
