"""scripts/demo starts, waits for, and always stops its processes.

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

STAND_IN = """#!{python}
import os, pathlib, signal, sys, threading
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
        (here / ("stopped-" + span)).touch()
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    start, end = span.split(":")
    print(f"ready peer=p{{start}} address=tcp://p{{start}}@127.0.0.1:1 blocks=[{{start}},{{end}})")
    sys.stdout.flush()
    threading.Event().wait()
elif command == "generate":
    print("an answer", flush=True)
    if os.environ.get("GENERATE_WAITS"):
        threading.Event().wait()
    sys.exit(int(os.environ.get("GENERATE_EXIT", "0")))
"""


@pytest.fixture
def bin_folder(tmp_path):
    (tmp_path / "python").symlink_to(sys.executable)
    command = tmp_path / "shoal"
    command.write_text(STAND_IN.format(python=sys.executable))
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
    return sorted(path.name.removeprefix("stopped-") for path in bin_folder.glob("stopped-*"))


def calls(bin_folder, command):
    lines = (bin_folder / "calls").read_text().splitlines()
    return [line for line in lines if line.startswith(command)]


def test_runs_three_servers_and_one_client(bin_folder):
    demo = start(bin_folder, PROMPT="Say why.")
    out, err = demo.communicate(timeout=30)
    assert (demo.returncode, "an answer" in out) == (0, True), err
    assert stopped(bin_folder) == ["0:10", "10:20", "20:30"]
    serves = calls(bin_folder, "serve")
    assert ["--join tcp://p0@127.0.0.1:1" in line for line in sorted(serves)] == [False, True, True]
    (generate,) = calls(bin_folder, "generate")
    assert "/models/demo --join tcp://p0@127.0.0.1:1 --prompt Say why." in generate


def test_a_failing_client_is_the_demos_failure(bin_folder):
    demo = start(bin_folder, GENERATE_EXIT="3")
    demo.communicate(timeout=30)
    assert demo.returncode == 3
    assert stopped(bin_folder) == ["0:10", "10:20", "20:30"]


def test_a_server_that_dies_is_named_with_its_log(bin_folder):
    demo = start(bin_folder, BROKEN_SPAN="10:20")
    _, err = demo.communicate(timeout=30)
    assert demo.returncode == 1
    assert "server 10:20 stopped" in err
    assert "no such weights" in err
    assert "0:10" in stopped(bin_folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_everything(bin_folder, number):
    demo = start(bin_folder, GENERATE_WAITS="1")
    assert demo.stdout is not None
    while "an answer" not in demo.stdout.readline():
        pass
    demo.send_signal(number)
    _, err = demo.communicate(timeout=30)
    assert demo.returncode == 130, err
    assert stopped(bin_folder) == ["0:10", "10:20", "20:30"]
