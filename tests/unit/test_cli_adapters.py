"""`--adapter` on the command line: names, directories, and what servers say they have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.cli.adapters import adapter_limits, check_adapter, choose_adapter, parse_served
from shoal.cli.models import OpenModel
from shoal.cli.status import renderables
from shoal.client.adapters import find_adapter
from shoal.discovery.directory import Snapshot
from shoal.plan.routing import Wanted
from shoal.plan.view import ServerView, SwarmView

ONE, TWO = bytes(15) + b"1", bytes(15) + b"2"


def view(*adapters: tuple[tuple[str, bytes], ...]) -> SwarmView:
    servers = tuple(
        ServerView(peer=PeerId(bytes([n]) * 32), addresses=(), span=Span(0, 2), adapters=said)
        for n, said in enumerate(adapters)
    )
    return SwarmView(model="m", num_blocks=2, hidden_size=4, servers=servers)


def test_names_and_directories() -> None:
    assert parse_served(None) == {}
    assert parse_served(["a=x/y", "b c=z=1"]) == {"a": Path("x/y"), "b c": Path("z=1")}


@pytest.mark.parametrize(
    "given", [["a"], ["=x"], ["a="], [" a=x"], ["a=x", "a=y"], ["a" * 65 + "=x"]], ids=str
)
def test_what_is_no_name_and_directory(given: list[str]) -> None:
    with pytest.raises(ConfigError, match="--adapter"):
        parse_served(given)


def test_adapters_of_servers_are_found_by_label_and_by_hash() -> None:
    found = view((("poet", ONE),), (("poet", ONE), ("cook", TWO)), ())
    assert find_adapter(found, "poet") == ONE
    assert find_adapter(found, TWO.hex()) == TWO
    with pytest.raises(ConfigError, match="servers have cook, poet"):
        find_adapter(found, "nobody")
    with pytest.raises(ConfigError, match="servers have none"):
        find_adapter(view(()), "nobody")
    with pytest.raises(ConfigError, match="different adapters"):
        find_adapter(view((("poet", ONE),), (("poet", TWO),)), "poet")


def test_only_servers_that_announce_it_are_wanted() -> None:
    has, other, none = view((("poet", ONE),), (("poet", TWO),), ()).servers
    wanted = Wanted(adapter=ONE)
    assert [wanted.allows(server) for server in (has, other, none)] == [True, False, False]
    assert ONE.hex() in str(wanted)


def test_thin_clients_have_none() -> None:
    assert check_adapter("x", is_thin=False) == "x"
    assert check_adapter(None, is_thin=True) is None
    with pytest.raises(ConfigError, match="--thin"):
        check_adapter("x", is_thin=True)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "SHOAL_DEEP_PROMPT", "SHOAL_CLASSES"])
def test_chats_name_who_takes_other_kinds(kind: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    model = OpenModel(given="m", source=None, name="m", num_blocks=2, hidden_size=4)
    with pytest.raises(ConfigError, match=f"use shoal generate --adapter {tmp_path}"):
        choose_adapter(str(tmp_path), model, Snapshot(version=0))


def test_a_client_may_keep_a_quarter() -> None:
    limits = adapter_limits(1000)
    assert (limits.bytes_max, limits.bytes_per_client) == (1000, 250)


def test_status_says_who_has_which() -> None:
    def server(peer: str, adapters: dict[str, str]) -> dict[str, object]:
        return {
            "peer": peer, "blocks": [0, 2], "state": "online", "numerics": "n", "head": "",
            "free_tokens": 1, "cache_tokens": 1, "sessions": 0, "rtt_s": 0.1, "error": "",
            "adapters": adapters,
        }  # fmt: skip

    one = server("first-peer", {"poet": ONE.hex()})
    two = server("other-peer", {"poet": ONE.hex()})
    parts = renderables([{"model": "m", "num_blocks": 2, "missing": [], "servers": [one, two]}])
    assert "adapter poet (00000000) at first-pe, other-pe" in [str(part) for part in parts]
