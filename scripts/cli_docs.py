#!/usr/bin/env python3
"""Renders docs/cli.md from the help of every `shoal` command.

`scripts/cli_docs.py` prints it, `--write` writes the document. A test fails while the two
differ, so that the documented interface is always the real one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from shoal.cli.app import make_app

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

INTRODUCTION = """# The command line

Generated from `--help` by `scripts/cli_docs.py --write`; don't edit it by hand.

* Results go to stdout, everything else (progress, logs, errors) to stderr.
* An error is one line, `error: ...`, that says what to do. `shoal --debug COMMAND ...` shows
  the traceback.
* Exit codes: 0 done, 1 it went wrong, 2 yours to fix (a flag, a file, an argument), 130
  interrupted. `shoal serve` ends with 0 on Ctrl-C and SIGTERM, `shoal status --watch` with 0 on q
  and Ctrl-C, `shoal chat` with 0 on Ctrl-D and `/quit`. `shoal doctor` and `shoal bench` end with 1
  when something that they looked at or ran failed.
* Every option may also come from a file or the environment: [configuration.md](configuration.md).
* A server prints one line when it serves, `ready peer=<id> address=<addr> blocks=[A,B)`. The
  address works unchanged as `--join`.

## The JSON of `generate --json`

One object in the last line on stdout:

| key | what |
|---|---|
| `text` | the new text |
| `token_ids` | the new tokens; an end token is included |
| `prompt_tokens` | tokens of the prompt |
| `time_to_first_token_s` | from the start of opening the session |
| `tokens_per_s` | tokens after the first, per second since the first |
| `chain` | at the end, in order: `{"peer": id, "blocks": [start, end]}` |
| `recoveries` | repairs: `position`, `lost` and `replacement` (ids), `replayed_tokens`, `pause_s` |
| `numerics` | `exact`, `same-class` or `crossed`: what servers and repairs did to the numbers |

## The JSON of `status --json`

`{"models": [...]}`, each model with `model` (its hash), `num_blocks`, `hidden_size`, `missing`
(blocks that no answering server has, as `[start, end]`) and `servers`. A server has `peer`,
`addresses`, `blocks`, `state`, `encodings`, `numerics`, `is_exact`, `version`,
`decode_s_per_block`, `cache_tokens`, `free_tokens`, `sessions`, `iterations`, `queued_tokens`,
`rtt_s` and `error` (why it did not answer, else empty; what only it could tell is then null).
"""


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all commands, groups before what is in them."""
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


def render() -> str:
    """The whole document."""
    app = make_app()
    runner = CliRunner()
    parts = [INTRODUCTION]
    for path in commands(typer.main.get_command(app)):
        title = " ".join(("shoal", *path))
        result = runner.invoke(app, [*path, "--help"], prog_name="shoal")
        lines = "\n".join(line.rstrip() for line in result.stdout.strip().splitlines())
        parts.append(f"## `{title}`\n\n```\n{lines}\n```\n")
    return "\n".join(parts)


def main() -> None:
    """Print or write the document."""
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(render(), encoding="utf-8")
    else:
        sys.stdout.write(render())


if __name__ == "__main__":
    main()
