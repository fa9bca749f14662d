"""`shoal model inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.base.errors import ConfigError
from shoal.cli.app import make_app
from shoal.model.families import FAMILIES
from tests.models import save_safetensors


def output_of(*arguments: str) -> str:
    result = CliRunner().invoke(make_app(), ["model", "inspect", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_a_model_is_shown_with_its_sizes(tmp_path: Path) -> None:
    save_safetensors(tmp_path, "gemma2")
    text = output_of(str(tmp_path), "--memory", "1")
    assert "architecture  gemma2\n" in text
    assert "1 GiB" in text
    facts = json.loads(output_of(str(tmp_path), "--memory", "1", "--json"))
    assert facts["num_blocks"] == len(facts["block_bytes"]["bfloat16"]) == 4
    assert facts["blocks_by_gib"] == {"float32": {"1": 4}, "bfloat16": {"1": 4}}


def test_a_longrope_can_be_given_long_sessions(tmp_path: Path) -> None:
    save_safetensors(tmp_path, "phi3_longrope")
    assert "up to 64 tokens of 512" in output_of(str(tmp_path))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config["rope_parameters"]
    rope["short_factor"] = rope["long_factor"]
    path.write_text(json.dumps(config))
    assert "up to 512 tokens\n" in output_of(str(tmp_path))


def test_the_table_has_every_family() -> None:
    text = output_of("--families")
    rows = json.loads(output_of("--families", "--json"))
    assert [row["architecture"] for row in rows] == list(FAMILIES)
    assert all(name in text for name in FAMILIES)


@pytest.mark.parametrize("arguments", [(), ("some/model", "--families")])
def test_either_a_model_or_the_table(arguments: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="either"):
        output_of(*arguments)
