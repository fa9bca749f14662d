"""Options from a file and the environment: who wins, and what is refused."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from shoal.base.errors import ConfigError
from shoal.cli.app import run
from shoal.cli.settings import as_toml, find_file, variable


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """A process of its own: no config file but the test's, no variables."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SHOAL_")}
    kept.update(XDG_CONFIG_HOME=str(tmp_path / "user"), SHOAL_CACHE=str(tmp_path / "cache"))
    monkeypatch.setattr(os, "environ", kept)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def shown(capsys, *arguments):
    """`config show --json`, as {option: (value, source)} of the one command."""
    assert run([*arguments[:-1], "config", "show", arguments[-1], "--json"]) == 0
    (options,) = json.loads(capsys.readouterr().out)["commands"].values()
    return {name: (one["value"], one["source"]) for name, one in options.items()}


def refused(capsys, *arguments):
    assert run(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err


def test_without_a_file_there_are_defaults(capsys):
    options = shown(capsys, "generate")
    assert options["max-new-tokens"] == (128, "default")
    assert options["join"] == (None, "default")


def test_environment_beats_file_beats_default(capsys, tmp_path):
    path = write(
        tmp_path / "a.toml",
        'join = "tcp://top"\nthreads = 3\n[generate]\nthreads = 2\nmax_new_tokens = 9\nseed = 1\n',
    )
    os.environ.update(SHOAL_GENERATE_SEED="5", SHOAL_SWARM="mine", SHOAL_STATUS_SWARM="")
    options = shown(capsys, "--config", str(path), "generate")
    assert options["seed"] == (5, "SHOAL_GENERATE_SEED")
    assert options["swarm"] == ("mine", "SHOAL_SWARM")
    assert options["threads"] == (2, str(path))
    assert options["max-new-tokens"] == (9, str(path))
    assert options["join"] == (["tcp://top"], str(path))
    assert options["patience"] == (60.0, "default")
    os.environ.update(SHOAL_GENERATE_COMPRESS="true", SHOAL_MODEL_INSPECT_MEMORY="4 8.5")
    assert shown(capsys, "generate")["compress"] == (True, "SHOAL_GENERATE_COMPRESS")
    assert run(["config", "show", "model", "inspect"]) == 0
    assert "memory = [4.0, 8.5]" in capsys.readouterr().out
    assert shown(capsys, "--config", str(path), "serve")["threads"] == (3, str(path))
    os.environ["SHOAL_STATUS_SWARM"] = "theirs"
    assert shown(capsys, "status")["swarm"] == ("theirs", "SHOAL_STATUS_SWARM")


def test_commands_use_them_and_a_flag_beats_all(capsys, tmp_path):
    write(tmp_path / "here" / "shoal.toml", "[simulate.chaos]\nseeds = 2\njobs = 1\n")
    assert run(["simulate", "chaos"]) == 0
    assert capsys.readouterr().out.startswith("2 schedules")
    os.environ["SHOAL_SIMULATE_CHAOS_SEEDS"] = "1"
    assert run(["simulate", "chaos"]) == 0
    assert capsys.readouterr().out.startswith("1 schedules")
    assert run(["simulate", "chaos", "--seeds", "3"]) == 0
    assert capsys.readouterr().out.startswith("3 schedules")


def test_the_nearest_file_counts_alone(tmp_path):
    here, user = tmp_path / "here", tmp_path / "user" / "shoal" / "shoal.toml"
    assert find_file(None, os.environ, here) is None
    write(user, "")
    assert find_file(None, os.environ, here) == user
    local = write(here / "shoal.toml", "")
    assert find_file(None, os.environ, here) == local
    named = write(tmp_path / "named.toml", "")
    assert find_file(None, {"SHOAL_CONFIG": str(named)}, here) == named
    assert find_file(user, {"SHOAL_CONFIG": str(named)}, here) == user
    with pytest.raises(ConfigError, match="SHOAL_CONFIG: there is no file"):
        find_file(None, {"SHOAL_CONFIG": "nosuch"}, here)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('jion = "x"', "unknown key jion; did you mean join?"),
        ("[generat]\n", "did you mean [generate]?"),
        ('[serve]\nblock = "0:3"', "unknown key [serve] block; did you mean blocks?"),
        ("[model.inspct]\n", "did you mean [model.inspect]?"),
        ("[model]\nget = 3", "[model.get] is a section"),
        ('[serve]\nthreads = "x"', "[serve] threads = 'x'"),
        ("[serve]\ncache_tokens = [3]", "one value, not [3]"),
        ("[generate]\nmax-new-tokens = 0", "max-new-tokens = 0"),
        ("a =", "can't read the config file"),
        ('log = "loud"', "use one of debug"),
        ("cache = 3", "cache is a text"),
        ("temperature = 1.0", "unknown key temperature"),
        ("[config.show]\njson = true", "unknown key [config]"),
        ("[swarm.new.deep]\n", "unknown key [swarm.new] deep"),
    ],
)
def test_slips_are_named_whichever_command_runs(capsys, tmp_path, text, said):
    path = write(tmp_path / "a.toml", text)
    line = refused(capsys, "--config", str(path), "model", "list")
    assert said in line
    assert str(path) in line


def test_a_wrong_variable_is_named_by_its_command_only(capsys):
    os.environ["SHOAL_GENERATE_SEED"] = "soon"
    assert "SHOAL_GENERATE_SEED = 'soon'" in refused(capsys, "generate")
    assert run(["model", "list"]) == 0


def test_a_missing_file_is_named(capsys):
    assert "--config: there is no file nosuch" in refused(
        capsys, "--config", "nosuch", "model", "list"
    )


def test_a_flag_puts_its_alternative_aside(capsys, tmp_path):
    path = write(tmp_path / "a.toml", 'invite = "shoal-invite"\n')
    line = refused(capsys, "--config", str(path), "status", "--swarm", "s", "--join", "nonsense")
    assert "not an address" in line
    os.environ["SHOAL_SWARM"] = "s"
    line = refused(capsys, "--config", str(path), "status", "--join", "nonsense")
    assert "give one" in line


def test_what_is_shown_is_a_file_without_secrets(capsys, tmp_path):
    path = write(tmp_path / "a.toml", 'invite = "shoal-invite-1-secret"\nlog = "error"\n')
    assert run(["--config", str(path), "config", "show"]) == 0
    out = capsys.readouterr().out
    assert "secret" not in out
    content = tomllib.loads(out)
    assert content["log"] == "error"
    assert content["serve"]["invite"] == "(hidden)"
    assert content["simulate"]["chaos"]["seeds"] == 100
    again = write(tmp_path / "b.toml", out)
    assert run(["--config", str(again), "config", "show", "serve"]) == 0


def test_an_unknown_command_is_named(capsys):
    assert "no command 'srve'" in refused(capsys, "config", "show", "srve")


def test_the_cache_of_the_file_is_used(capsys, tmp_path):
    path = write(tmp_path / "a.toml", f'cache = "{tmp_path}/elsewhere"\n')
    del os.environ["SHOAL_CACHE"]
    assert run(["--config", str(path), "model", "list"]) == 0
    assert os.environ["SHOAL_CACHE"] == f"{tmp_path}/elsewhere"


@pytest.mark.parametrize("value", ['a"b\\c\n', True, 3, 0.5, ["x", "ü"], [1.5]])
def test_values_are_written_as_toml(value):
    assert tomllib.loads(f"x = {as_toml(value)}") == {"x": value}


def test_names_of_variables():
    assert variable(("chat", "max-new-tokens")) == "SHOAL_CHAT_MAX_NEW_TOKENS"


def test_completion_knows_commands_and_models():
    shoal = str(Path(sys.executable).with_name("shoal"))

    def completed(words):
        asked = {"_SHOAL_COMPLETE": "complete_bash", "COMP_WORDS": words}
        asked["COMP_CWORD"] = str(len(words.split(" ")) - 1)
        result = subprocess.run(
            [shoal], env={**os.environ, **asked}, capture_output=True, text=True, timeout=60
        )
        assert result.stderr == ""
        return result.stdout.split()

    assert completed("shoal ser") == ["serve"]
    assert completed("shoal serve smol") == ["smollm2-135m-instruct"]
    assert completed("shoal serve m --quan") == ["--quantize"]
