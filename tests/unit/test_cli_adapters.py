"""`--adapter` on the command line: names, directories, and what servers say they have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.cli.adapters import adapter_limits, check_adapter, choose_adapter, parse_served
from shoal.cli.models import OpenModel
from shoal.cli.status import renderables
from shoal.client.adapters import find_adapter
from shoal.discovery.directory import Snapshot
from shoal.hf.tuning_files import Learned, write_learned
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


def test_thin_clients_name_one_and_bring_none(tmp_path: Path) -> None:
    assert check_adapter(str(tmp_path), is_thin=False) == str(tmp_path)
    assert check_adapter(None, is_thin=True) is None
    assert check_adapter("poet", is_thin=True) == "poet"
    with pytest.raises(ConfigError, match="--thin"):
        check_adapter(str(tmp_path), is_thin=True)


MODEL = OpenModel(given="m", source=None, name="m", num_blocks=2, hidden_size=4)


def saved(folder: Path, **held: torch.Tensor) -> str:
    config = LlamaConfig(hidden_size=4, num_hidden_layers=2, num_attention_heads=1)
    learned = Learned(model="m", label_names=("a",) if "classes" in held else (), **held)
    write_learned(folder, learned, config, "m")
    return str(folder)


def test_a_prompt_stands_before_the_text_and_stays_here(tmp_path: Path) -> None:
    given = saved(tmp_path, prompt=torch.ones(3, 4))
    chosen = choose_adapter(given, MODEL, Snapshot(version=0))
    assert chosen.ids_before(100) == (100, 101, 102)
    assert chosen.part is None
    assert len(chosen.name) == 16


@pytest.mark.parametrize(
    "held",
    [
        {"prompt": torch.ones(3, 4), "additions": torch.ones(1, 3, 4)},
        {"classes": torch.ones(1, 4)},
        {"prompt": torch.ones(3, 4), "classes": torch.ones(1, 4)},
    ],
    ids=["deep prompts", "a head", "a head and a prompt"],
)
def test_what_has_no_sessions_is_named(held: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"shoal generate --adapter {tmp_path}"):
        choose_adapter(saved(tmp_path, **held), MODEL, Snapshot(version=0))


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
