"""Mistakes on the command line: one line that says what to do, and the right exit code."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import shoal
from shoal.base.errors import PeerBusy
from shoal.base.ids import peer_text
from shoal.cli import app as cli_app
from shoal.cli.app import run
from shoal.hf.saved_answer import pack_answer
from shoal.net.identity import Identity
from tests.models import save_safetensors
from tests.unit.test_hf_saved_answer import saved_answer

DEAD = f"tcp://{peer_text(Identity.from_seed(bytes(32)).peer)}@127.0.0.1:1"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Commands set variables for their own process, which is this one here."""
    monkeypatch.setattr(os, "environ", dict(os.environ, SHOAL_CACHE=str(tmp_path / "cache")))
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before


def said(capsys, *arguments):
    """(exit code, the one line on stderr) of a command that must fail."""
    code = run(list(arguments))
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return code, lines[0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["serv"], "Did you mean 'serve'"),
        (["serve"], "shoal serve --help"),
        (["serve", "m", "--blocks", "3"], "write START:END"),
        (["serve", "m", "--blocks", "5:5"], "START must be below END"),
        (["serve", "m", "--threads", "0"], "at least 1"),
        (["serve", "m", "--join", "tcp://127.0.0.1:1"], "no peer id"),
        (["serve", "m", "--swarm", "a", "--invite", "b"], "give one"),
        (["serve", "m", "--num-blocks", "0"], "--num-blocks"),
        (["serve", "nosuch"], "no model 'nosuch'"),
        (["generate", "m", "--prompt", "x"], "--join"),
        (["generate", "m", "--join", DEAD], "--prompt TEXT"),
        (["generate", "m", "--join", DEAD, "--prompt", ""], "prompt is empty"),
        (["generate", "--join", DEAD, "--prompt", "x"], "Give MODEL, or --resume FILE"),
        (["generate", "--join", DEAD, "--resume", "/nosuch"], "can't read /nosuch"),
        (["generate", "--join", DEAD, "--resume", __file__], "this is no saved session"),
        (["generate", "--join", DEAD, "--resume", "/x", "--seed", "1"], "--seed: with --resume"),
        (["generate", "m", "--join", DEAD, "--prompt-file", "/nosuch"], "can't read the prompt"),
        (["generate", "m", "--join", DEAD, "--prompt", "x", "--prompt-file", "y"], "either"),
        (
            ["generate", "m", "--join", DEAD, "--prompt", "x", "--max-new-tokens", "0"],
            "--max-new-tokens",
        ),
        (["generate", "m", "--join", DEAD, "--prompt", "x", "--temperature", "-1"], "temperature"),
        (["status"], "--join"),
        (["status", "--join", "nonsense"], "not an address"),
        (["model", "get", "nosuch"], "smollm2-135m-instruct"),
        (["swarm", "new", ""], "not a swarm name"),
        (["serve", "smollm2-135m-instruct"], "shoal model get smollm2-135m-instruct"),
    ],
)
def test_your_mistakes(capsys, arguments, text):
    code, line = said(capsys, *arguments)
    assert code == 2
    assert text in line


def test_a_dead_join_is_no_mistake_of_yours(capsys):
    code, line = said(capsys, "status", "--join", DEAD)
    assert code == 1
    assert DEAD in line


def test_bad_log_level_is_named(capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "SHOAL_LOG", "loud")
    code, line = said(capsys, "status", "--join", DEAD)
    assert code == 2
    assert "SHOAL_LOG" in line


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_safetensors(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--blocks", "5:9"], "[0,7)"),
        (["--num-blocks", "8"], "1 to 7"),
        (["--num-blocks", "2", "--blocks", "0:2"], "give one"),
        (["--dtype", "float99"], "float99"),
        (["--device", "abacus"], "abacus"),
        (["--cache-tokens", "1"], "cache_tokens"),
        (["--listen", "127.0.0.1:0"], "write tcp://HOST:PORT"),
        (["--announce", "somewhere"], "write tcp://HOST:PORT"),
        (["--invite", "please"], "not an invite"),
    ],
)
def test_what_cannot_be_served(capsys, model, options, text):
    code = run(["serve", str(model), *options])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert text in err
    assert err.count("error: ") == 1


def test_a_taken_port_is_named(capsys, model):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, line = said(capsys, "serve", str(model), "--listen", f"tcp://127.0.0.1:{port}")
    assert code == 2
    assert str(port) in line


def test_truncated_weights_are_the_files_fault(capsys, model, tmp_path):
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    code, line = said(capsys, "serve", str(tmp_path))
    assert code == 1
    assert "truncated" in line


def test_an_answer_belongs_to_its_model(capsys, model, tmp_path):
    path = tmp_path / "answer"
    path.write_bytes(pack_answer(saved_answer(given=str(tmp_path / "gone"))))
    command = ("--join", DEAD, "--resume", str(path))
    code, line = said(capsys, "generate", str(model), *command)
    assert code == 2
    assert "name the model it belongs to" in line
    code, line = said(capsys, "generate", *command)
    assert code == 1
    assert "which is gone: name it" in line


def test_retry_times_are_told(capsys):
    assert cli_app._report(PeerBusy("full", retry_after_s=2.0)) == 1
    assert capsys.readouterr().err == "error: full (try again in 2 s)\n"


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"shoal {shoal.__version__}\n"


def test_a_new_swarm_prints_an_invite_last(capsys, tmp_path):
    key = tmp_path / "key"
    assert run(["swarm", "new", "friends", "--key", str(key)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("shoal-invite-1-")
    assert key.stat().st_mode & 0o077 == 0
    assert run(["swarm", "new", "friends", "--key", str(key)]) == 2


def test_known_models_are_listed(capsys):
    assert run(["model", "list"]) == 0
    assert "smollm2-135m-instruct" in capsys.readouterr().out


def test_the_version_needs_no_torch():
    script = (
        "import sys\nfrom shoal.cli.app import run\nrun(['--version'])\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_a_reader_that_leaves_is_no_traceback():
    command = [str(Path(sys.executable).with_name("shoal")), "model", "list"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait(30)
