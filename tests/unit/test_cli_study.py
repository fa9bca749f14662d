"""`shoal study`: what it prints and writes, and that every number says where it comes from."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path

import pytest

import shoal
from shoal.cli.app import run
from shoal.cli.study_made import commit_of
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
    assert content["environment"]["date"].startswith("20")
    assert content["environment"]["commit"] == commit_of(Path(shoal.__file__).parent)
    figures = [figure for row in content["rows"] for figure in row["figures"]]
    assert len(figures) == len(rows)
    assert run(command) == 0
    assert capsys.readouterr().out == text, "the same seeds give the same figures"


def test_the_verdict_on_kept_results(tmp_path, capsys):
    out = tmp_path / "kept"
    assert run(["study", "bprr-ablation", "--quick", "--seeds", "2", "--out", str(out)]) == 0
    capsys.readouterr()
    assert run(["study", "acceptance", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "2 seeds, quick | " in text
    assert "| 5 | both programs agree" in text
    figures = json.loads((out / "acceptance.json").read_text(encoding="utf-8"))["figures"]
    assert [one["number"] for one in figures if one["run"]] == [3, 4]
    assert figures[2]["run"]["seeds"] == 2
    assert (figures[2]["of"], figures[4]["verdict"]) == (6, "not run")
    assert len(figures[2]["differing"]) == figures[2]["of"] - figures[2]["held"]


def git(folder: Path, *words: str) -> None:
    own = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", "-C", str(folder), *own, *words], check=True, capture_output=True)


def test_the_commit_is_that_of_the_package_and_tells_of_changes(tmp_path):
    package = tmp_path / "src" / "shoal"
    package.mkdir(parents=True)
    assert commit_of(package) == "", "no checkout"
    file = package / "a.py"
    file.write_text("A = 1\n", encoding="utf-8")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "a")
    commit = commit_of(package)
    assert 6 < len(commit) < 20
    file.write_text("A = 2\n", encoding="utf-8")
    assert commit_of(package) == f"{commit}+"
    elsewhere = tmp_path / "env" / "shoal"
    elsewhere.mkdir(parents=True)
    assert commit_of(elsewhere) == "", "another project's checkout"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["petals"], "no study is called 'petals' (choose bprr-clustered"),
        (["petals"], "or one of list, all, acceptance"),
        (["acceptance"], "say where the results are: shoal study acceptance --out DIR"),
        (["acceptance", "--out", "{tmp}"], "holds no results of studies"),
        (["acceptance", "--out", "{tmp}/broken"], "is not what a study wrote (JSONDecodeError"),
        (["acceptance", "--out", "{tmp}/other"], "is not what a study wrote (KeyError"),
        (["ring", "--out", "{tmp}/file"], "can't write to"),
        (["ring", "--seeds", "0"], "greater than or equal to 1"),
        (["chains", "--rtts", "{tmp}/file"], "--rtts is for realism; chains needs no such file"),
        (["helix", "--map", "{tmp}/file"], "--map is for bprr-scattered; helix needs no"),
        (["realism", "--requests", "{tmp}/file"], "add --rtts FILE"),
        (["realism", "--rtts", "{tmp}/nothing"], "can't read"),
        (["realism", "--rtts", "{tmp}/file"], "is no square table"),
        (["bprr-scattered", "--map", "{tmp}/file"], "has no line `NODES COUNT`"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(tmp_path, capsys, arguments, said):
    (tmp_path / "file").write_text("hello\n", encoding="utf-8")
    for name, text in (("broken", "{"), ("other", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "churn.json").write_text(text, encoding="utf-8")
    assert run(["study", *(one.format(tmp=tmp_path) for one in arguments)]) == 2
    assert said in capsys.readouterr().err
