"""Models of the hub in real processes, with a hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import save_safetensors
from tests.unit.hub_cases import FakeHub, files_of, serving

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

LIBRARY = """
import torch
from shoal.hf import AutoDistributedModelForCausalLM, LocalSwarm

ids = torch.tensor([[3, 1, 4, 1, 5]])
with LocalSwarm("org/tiny") as swarm:
    with AutoDistributedModelForCausalLM.from_pretrained("org/tiny", join=swarm) as model:
        print(model.generate(ids, max_new_tokens=3, do_sample=False).shape[1])
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    save_safetensors(tmp_path / "saved", sharded=True)
    with serving(FakeHub()) as served:
        served.add("org/tiny", files_of(tmp_path / "saved"))
        yield served


def run(
    hub: FakeHub, folder: Path, *command: str, offline: bool = False
) -> subprocess.CompletedProcess[str]:
    dropped = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN")
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    env |= {
        "HF_HOME": str(folder / "hf"),
        "SHOAL_CACHE": str(folder / "shoal"),
        "XDG_CACHE_HOME": str(folder),
        "HF_ENDPOINT": hub.endpoint,
        "NO_PROXY": "127.0.0.1",
    }
    if offline:
        env["HF_HUB_OFFLINE"] = "1"
    return subprocess.run(
        [sys.executable, *command], env=env, cwd=folder, capture_output=True, text=True, timeout=100
    )


def shoal(
    hub: FakeHub, folder: Path, *arguments: str, offline: bool = False
) -> subprocess.CompletedProcess[str]:
    return run(hub, folder, "-m", "shoal.cli.main", *arguments, offline=offline)


def test_commands_and_the_library_take_hub_ids(hub: FakeHub, tmp_path: Path) -> None:
    done = shoal(hub, tmp_path, "model", "inspect", "org/tiny", "--json")
    assert json.loads(done.stdout)["num_blocks"] == 7
    assert not [name for name in hub.downloads() if name.endswith(".safetensors")]

    done = shoal(hub, tmp_path, "model", "get", "org/tiny")
    assert done.returncode == 0, done.stderr
    directory = Path(done.stdout.strip())
    assert directory.is_relative_to(tmp_path / "hf" / "hub")
    assert len(list(directory.glob("*.safetensors"))) > 2

    hub.asked.clear()
    done = run(hub, tmp_path, "-c", LIBRARY)
    assert done.stdout.splitlines()[-1:] == ["8"], done.stderr
    assert hub.asked == []


def test_off_line_with_nothing_cached_is_yours_to_fix(hub: FakeHub, tmp_path: Path) -> None:
    done = shoal(hub, tmp_path, "serve", "org/tiny", offline=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "unset it and run `shoal model get org/tiny`" in done.stderr
    assert hub.asked == []
