"""scripts/demo starts, waits for, kills one of, and always stops its processes.

A stand-in `shoal` command plays the parts, so that this needs no model; the demo with
the real one is an end-to-end test.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "scripts" / "demo"

TEXT = "an answer of some length, so that a server can be killed in the middle of it"
REPAIR = "repaired at position 9: p10 replaced by p10, 9 tokens replayed, 0.25 s"

STAND_IN = """#!{python}
import json, os, pathlib, signal, sys, threading
here = pathlib.Path(__file__).parent
command, *rest = sys.argv[1:]
with open(here / "calls", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if command == "model":
    print("progress", file=sys.stderr)
    print("/models/demo")
elif command == "serve":
    span = rest[rest.index("--blocks") + 1]
    if span == os.environ.get("BROKEN_SPAN"):
        sys.exit("no such weights")
    def stop(*_):
        (here / f"stopped-{{span}}-{{os.getpid()}}").touch()
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    start, end = span.split(":")
    print("session opened", file=sys.stderr, flush=True)
    print(f"ready peer=p{{start}} address=tcp://p{{start}}@127.0.0.1:1 blocks=[{{start}},{{end}})")
    sys.stdout.flush()
    threading.Event().wait()
elif command == "generate":
    text = os.environ.get("ANSWER", "{text}")
    if "--json" in rest:
        print(json.dumps({{"text": os.environ.get("OTHER_ANSWER", text)}}))
    else:
        print(text, flush=True)
        if os.environ.get("GENERATE_WAITS"):
            threading.Event().wait()
        print(os.environ.get("REPAIR", "{repair}"), file=sys.stderr)
    sys.exit(int(os.environ.get("GENERATE_EXIT", "0")))
"""


@pytest.fixture
def bin_folder(tmp_path):
    (tmp_path / "python").symlink_to(sys.executable)
    command = tmp_path / "shoal"
    command.write_text(STAND_IN.format(python=sys.executable, text=TEXT, repair=REPAIR))
    command.chmod(0o755)
    return tmp_path


def start(bin_folder, **environment):
    return subprocess.Popen(
        [str(bin_folder / "python"), str(DEMO)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def stopped(bin_folder):
    """Spans of the servers that were asked to stop: all but those that were killed."""
    names = [path.name for path in bin_folder.glob("stopped-*")]
    return sorted(name.split("-")[1] for name in names)


def calls(bin_folder, command):
    lines = (bin_folder / "calls").read_text().splitlines()
    return [line for line in lines if line.startswith(command)]


def test_a_server_is_killed_in_the_answer_and_the_texts_are_compared(bin_folder):
    demo = start(bin_folder, PROMPT="Say why.")
    out, err = demo.communicate(timeout=30)
    assert demo.returncode == 0, err
    assert TEXT in out
    assert "[kill -9 p10 [10,20)]" in out
    assert "0.25 s, in which 9 tokens were replayed" in out
    assert "same text:    yes" in out
    assert REPAIR in err
    assert stopped(bin_folder) == ["0:10", "10:20", "20:30"], "the fourth one was killed"
    assert "stopped 3 servers" in err
    serves = calls(bin_folder, "serve")
    assert ["--join tcp://p0@127.0.0.1:1" in line for line in serves] == [False, True, True, True]
    first, second = calls(bin_folder, "generate")
    assert "/models/demo --join tcp://p0@127.0.0.1:1 --prompt Say why." in first
    assert second == f"{first} --json"


@pytest.mark.parametrize(
    ("environment", "code", "text"),
    [
        ({"OTHER_ANSWER": "another one"}, 1, "same text:    NO: 'another one'"),
        ({"ANSWER": "short"}, 1, "too short to kill a server in it"),
        ({"REPAIR": "all was well"}, 1, "before its server died"),
        ({"GENERATE_EXIT": "3"}, 3, TEXT),
        ({"TOKENS": "many"}, 1, "TOKENS=many: give a number"),
    ],
)
def test_what_goes_wrong_is_said(bin_folder, environment, code, text):
    demo = start(bin_folder, **environment)
    out, err = demo.communicate(timeout=30)
    assert demo.returncode == code
    assert text in out + err
    assert "Traceback" not in err
    if "TOKENS" not in environment:
        assert set(stopped(bin_folder)) == {"0:10", "10:20", "20:30"}


def test_a_server_that_dies_is_named_with_its_log(bin_folder):
    demo = start(bin_folder, BROKEN_SPAN="20:30")
    _, err = demo.communicate(timeout=30)
    assert demo.returncode == 1
    assert "server 20:30 stopped" in err
    assert "no such weights" in err
    assert stopped(bin_folder) == ["0:10", "10:20", "10:20"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_everything(bin_folder, number):
    demo = start(bin_folder, GENERATE_WAITS="1")
    assert demo.stdout is not None
    while "an answer" not in demo.stdout.readline():
        pass
    demo.send_signal(number)
    _, err = demo.communicate(timeout=30)
    assert demo.returncode == 130, err
    assert set(stopped(bin_folder)) == {"0:10", "10:20", "20:30"}
