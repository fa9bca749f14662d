"""ring.toml: a ring in one file; MDI-LLM's nodes JSON is read as well.

Every key is optional, and so is the file; options of the command come before it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from shoal.base.errors import ConfigError
from shoal.cli.plan_reader import Table, read_table

JSON_BYTES_MAX: Final = 1 << 20

AUTO: Final = "auto"
"""As many starter blocks as the split gives it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RingConfig:
    """What a person said of a ring; None: nothing."""

    model: str | None = None
    nodes: int | None = None
    split: tuple[int, ...] | None = None
    starter_blocks: str | None = None
    """A number, or `auto`."""
    listen: str | None = None
    announce: str | None = None
    lan: bool | None = None
    swarm: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    exact: str | None = None
    cache_tokens: int | None = None
    weights_rate: str | None = None
    auto_resplit: bool | None = None
    threads: int | None = None
    memory: str | None = None

    def over(self, other: RingConfig) -> RingConfig:
        """This, and `other` where this says nothing."""
        return replace(
            other,
            **{
                field.name: value
                for field in fields(self)
                if (value := getattr(self, field.name)) is not None
            },
        )


def read_config(path: Path) -> RingConfig:
    """The ring that a file describes.

    Raises:
        ConfigError: not readable, or nonsense; says where.
    """
    return _read_json(path) if path.suffix == ".json" else _read_toml(path)


def _read_toml(path: Path) -> RingConfig:
    table = read_table(path)
    texts = ("model", "listen", "announce", "swarm", "dtype", "quantize", "exact",
             "weights_rate", "memory")  # fmt: skip
    found: dict[str, Any] = {key: table.text(key) for key in texts if _has(table, key)}
    for key in ("nodes", "cache_tokens", "threads"):
        if _has(table, key):
            found[key] = table.integer(key)
    for key in ("lan", "auto_resplit"):
        if _has(table, key):
            found[key] = _switch(table, key)
    if _has(table, "split"):
        found["split"] = _counts(table)
    if _has(table, "starter_blocks"):
        value = table.content["starter_blocks"]
        found["starter_blocks"] = str(value)
        if value != AUTO and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise table.fail(f'{value!r} is no number of blocks, nor "{AUTO}"', "starter_blocks")
    table.done()
    return RingConfig(**found)


def _has(table: Table, key: str) -> bool:
    table.asked.add(key)
    return key in table


def _switch(table: Table, key: str) -> bool:
    value = table.content[key]
    if not isinstance(value, bool):
        raise table.fail(f"{value!r}: write true or false", key)
    return value


def _counts(table: Table) -> tuple[int, ...]:
    value = table.content["split"]
    is_list = isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)
    if not is_list or not value:
        raise table.fail(f"{value!r}: write blocks by node, such as [10, 12]", "split")
    return tuple(value)


def parse_split(text: str) -> tuple[int, ...]:
    """`10,12` as numbers of blocks.

    Raises:
        ConfigError: no such list.
    """
    parts = text.replace(" ", "").split(",")
    if not all(part.isdigit() for part in parts):
        raise ConfigError(f"--split {text!r}: write blocks by node, such as 10,12")
    return tuple(map(int, parts))


def _read_json(path: Path) -> RingConfig:
    """MDI-LLM's nodes file: its starter has blocks too; ports and addresses of others are ours
    to find out, so only how many they are counts."""
    try:
        if path.stat().st_size > JSON_BYTES_MAX:
            raise ConfigError(f"{path} is larger than {JSON_BYTES_MAX} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"can't read {path}: {error}") from error
    nodes = content.get("nodes", content) if isinstance(content, dict) else {}
    try:
        starter, secondaries = nodes["starter"], nodes.get("secondary", [])
        host, port = starter["addr"], starter["communication"]["port"]
        if not isinstance(host, str) or type(port) is not int or not 0 < port < 1 << 16:
            raise ValueError(f"no address: {host!r}, {port!r}")
        if not isinstance(secondaries, list):
            raise ValueError("`secondary` is no list")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f'{path} is no nodes file: expected {{"nodes": {{"starter": {{"addr", '
            f'"communication": {{"port"}}}}, "secondary": [...]}}}} ({error!r})'
        ) from error
    return RingConfig(
        nodes=len(secondaries),
        starter_blocks=AUTO,
        listen=f"tcp://{'127.0.0.1' if host == 'localhost' else host}:{port}",
    )
