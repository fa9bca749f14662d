"""`shoal ring run`: prompts, files, what is shown, and what is refused before anything starts."""

from __future__ import annotations

import pytest
from rich.console import Console

from shoal.base.errors import ConfigError
from shoal.cli.ring_run_show import NodeLine, Picture, RingTable, shown
from shoal.cli.ring_run_text import (
    check_writable,
    draw_tokens,
    paragraphs,
    read_prompts,
    taken_in_turn,
    write_csv,
)
from shoal.plan.slots import Slots
from shoal.wire.ring import RingNode
from tests.unit.test_cli_errors import DEAD, environment, said

__all__ = ["environment"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("\n \n", []),
        ("one", ["one"]),
        ("one\nline\n\n\ntwo\n", ["one\nline", "two"]),
        ("\n\n  indented\r\n\r\nlast", ["  indented", "last"]),
    ],
)
def test_paragraphs(text, found):
    assert paragraphs(text) == found


def test_prompts_come_from_both_places_and_in_turn(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("two\n\nthree", encoding="utf-8")
    prompts = read_prompts(["one"], file)
    assert prompts == ["one", "two", "three"]
    assert taken_in_turn(prompts, 5) == ["one", "two", "three", "one", "two"]
    assert taken_in_turn(prompts, None) == prompts
    assert taken_in_turn(prompts, 2) == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "fix"),
    [(b"\n\n", "blank lines between"), (b"\xff\xfe\xff", "can't read prompts")],
)
def test_bad_files_of_prompts(tmp_path, content, fix):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=fix):
        read_prompts(None, tmp_path / "p.txt")
    with pytest.raises(ConfigError, match="give --prompt"):
        read_prompts(None, None)
    with pytest.raises(ConfigError, match="empty"):
        read_prompts([""], None)


def test_tokens_by_time_have_the_columns_of_mdi_llm(tmp_path):
    path = tmp_path / "t.csv"
    write_csv(path, [0.5, 0.75])
    assert path.read_text() == "0.500000,1\n0.750000,2\n"
    check_writable(path, None)
    with pytest.raises(ConfigError, match="can't write"):
        check_writable(tmp_path / "missing" / "t.csv")


def test_the_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    draw_tokens(tmp_path / "t.png", [0.5, 0.75], "2 samples")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def node(busy_s, up_s, iterations, rows, **changes):
    fields = {
        "peer": b"p" * 32, "name": "attic", "state": "online", "start": 0, "end": 5,
        "is_starter": True, "memory_bytes": 200_000_000, "memory_peak_bytes": 210_000_000,
        "planned_bytes": 205_000_000, "offered_bytes": 0, "busy_s": busy_s, "up_s": up_s,
        "iterations": iterations, "rows": rows, "pace_s": 0.0, "age_s": 0.0,
        "decode_s_by_batch": [],
    }  # fmt: skip
    return RingNode(**(fields | changes))


def test_a_node_between_two_looks():
    line = NodeLine.of(node(3.0, 5.0, 20, 60), node(2.5, 4.0, 10, 20))
    assert (line.busy, line.rows_per_pass, line.pass_s) == (0.5, 4.0, pytest.approx(0.05))
    assert NodeLine.of(node(3.0, 5.0, 20, 60), None).busy is None
    # Other blocks since then: counters began anew.
    assert NodeLine.of(node(0.1, 1.0, 1, 1), node(9.0, 9.0, 9, 9, end=3)).busy is None
    assert NodeLine.of(node(3.0, 5.0, 20, 60), node(3.0, 4.0, 20, 60)).rows_per_pass == 0.0


def picture(*nodes):
    return Picture(
        nodes=nodes, tokens=120, ended=1, samples=6, decoding=5, slots=Slots(count=2),
        most_slots=Slots(count=3), tokens_per_s=12.34, mean_tokens_per_s=10.0, seconds=12.0,
    )  # fmt: skip


def test_the_table_tells_blocks_memory_and_bubble():
    line = NodeLine.of(node(3.0, 5.0, 20, 60), node(2.5, 4.0, 10, 20))
    console = Console(width=120)
    with console.capture() as captured:
        console.print(shown(picture(line)))
    text = captured.get()
    for part in ("attic", "0:5", "200", "210", "50%", "4.0", "12.3 tokens/s", "2 slots of 3"):
        assert part in text
    assert "memory attic 210 MB" in picture(line).summary()
    assert picture().summary().endswith("3 slots")
    with RingTable(is_quiet=True) as quiet:
        quiet.show(picture(line))
        quiet.say("measuring")


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["--prompt", "a", "--ring", "missing.json"], "no ring is up"),
        (["--ring", "missing.json"], "no prompts"),
        (["--prompt", "a", "--join", DEAD], "--model MODEL"),
        (["--prompts-file", "missing.txt"], "can't read prompts"),
    ],
)
def test_what_is_refused_at_once(capsys, arguments, fix):
    assert fix in said(capsys, "ring", "run", *arguments)[1]
