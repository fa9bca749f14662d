"""`shoal study`: what it prints and writes, and that every number says where it comes from."""

from __future__ import annotations

import csv
import json

from shoal.cli.app import run
from shoal.lab.study_list import STUDIES


def test_the_list_names_every_study(capsys):
    assert run(["study", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(STUDIES)


def test_a_study_prints_a_table_and_writes_everything(tmp_path, capsys):
    out = tmp_path / "studies"
    command = ["study", "bprr-ablation", "--quick", "--seeds", "2", "--out", str(out)]
    assert run(command) == 0
    text = capsys.readouterr().out
    assert "| petals, s/token | simulated |" in text
    assert "Expected, and found:" in text
    written = sorted(path.name for path in out.iterdir())
    assert written == ["bprr-ablation-1.png", "bprr-ablation.csv", "bprr-ablation.json"]
    with (out / "bprr-ablation.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["origin"] for row in rows} <= {"published", "simulated", "measured"}
    content = json.loads((out / "bprr-ablation.json").read_text(encoding="utf-8"))
    assert content["seeds"] == [0, 1]
    assert content["environment"]["versions"]["topohub"] != "absent"
    figures = [figure for row in content["rows"] for figure in row["figures"]]
    assert len(figures) == len(rows)
    assert run(command) == 0
    assert capsys.readouterr().out == text, "the same seeds give the same figures"


def test_unknown_studies_are_named(capsys):
    assert run(["study", "petals"]) == 2
    assert "no study is called 'petals' (choose bprr-clustered" in capsys.readouterr().err
