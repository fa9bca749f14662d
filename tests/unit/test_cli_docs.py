"""docs/cli.md is what `--help` says, and every command shows an example."""

import importlib.util
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from shoal.cli.app import make_app

ROOT = Path(__file__).resolve().parents[2]


def script():
    path = ROOT / "scripts" / "cli_docs.py"
    spec = importlib.util.spec_from_file_location("cli_docs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves():
    module = script()
    paths = list(module.commands(typer.main.get_command(make_app())))
    groups = {path[:-1] for path in paths if path}
    return [path for path in paths if path not in groups]


def test_documented_commands_are_the_real_ones():
    module = script()
    documented = module.DOCUMENT.read_text(encoding="utf-8")
    assert documented == module.render(), (
        "docs/cli.md and --help differ. If the change is meant: add a news fragment in "
        "changes/, then run scripts/cli_docs.py --write"
    )


@pytest.mark.parametrize("path", leaves(), ids=" ".join)
def test_every_command_shows_an_example(path):
    text = CliRunner().invoke(make_app(), [*path, "--help"], prog_name="shoal").stdout
    assert f"    shoal {' '.join(path)}" in text
