"""What an adapter is called, and what a stranger's manifest may say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoal.base.adapters import (
    ADAPTER_MANIFEST_BYTES_MAX,
    HASH_STEP_BYTES,
    AdapterConfig,
    AdapterManifest,
    AdapterName,
    LoraShape,
    adapter_name,
    check_block_bytes,
    check_block_in_steps,
    make_adapter_manifest,
    parse_adapter_manifest,
)
from shoal.base.errors import AdapterBad
from shoal.base.spans import Span

Q, UP = LoraShape(target="attn.q", inputs=4, outputs=6), LoraShape(target="up", inputs=4, outputs=8)
Q_BYTES, BOTH_BYTES = bytes(2 * 10 * 4), bytes(2 * 22 * 4)


def manifest(**options: Any) -> AdapterManifest:
    config = AdapterConfig(**{"rank": 2, "alpha": 4.0, "targets": ("attn.q", "up")} | options)
    blocks = {3: ([UP, Q], BOTH_BYTES), 0: ([Q], Q_BYTES)}
    return make_adapter_manifest(config, "float32", blocks)


def test_a_manifest_survives_the_wire() -> None:
    one = manifest()
    assert parse_adapter_manifest(one.text(), one.name) == one
    assert [block.index for block in one.blocks] == [0, 3]
    assert one.blocks[1].shapes == (Q, UP)
    assert one.num_bytes(Span(0, 3)) == len(Q_BYTES)
    assert one.num_bytes(Span(0, 4)) == len(Q_BYTES) + len(BOTH_BYTES)
    assert adapter_name(one.name.hex()) == one.name
    assert adapter_name("assistant") is None


@pytest.mark.parametrize(
    "options",
    [{"alpha": 5.0}, {"use_rslora": True}, {"dropout": 0.1}, {"targets": ("attn.q", "up", "x")}],
)
def test_other_options_are_another_name(options: dict[str, Any]) -> None:
    assert manifest(**options).name != manifest().name


def test_scale() -> None:
    assert manifest().config.scale == 2.0
    assert AdapterConfig(rank=4, alpha=4, targets=("a",), use_rslora=True).scale == 2.0


def test_a_large_block_is_checked_in_steps() -> None:
    wide = LoraShape(target="up", inputs=HASH_STEP_BYTES // 8, outputs=5)
    data = bytes(2 * (wide.inputs + wide.outputs) * 4)
    config = AdapterConfig(rank=2, alpha=4.0, targets=("up",))
    one = make_adapter_manifest(config, "float32", {0: ([wide], data)})
    assert HASH_STEP_BYTES < len(data) < 2 * HASH_STEP_BYTES
    assert len(list(check_block_in_steps(one, one.blocks[0], data))) == 2
    with pytest.raises(AdapterBad, match="hash"):
        check_block_bytes(one, one.blocks[0], data[:-1] + b"\1")


def test_bytes_are_checked() -> None:
    one = manifest()
    check_block_bytes(one, one.blocks[0], Q_BYTES)
    with pytest.raises(AdapterBad, match="bytes of tensors"):
        check_block_bytes(one, one.blocks[0], Q_BYTES[1:])
    with pytest.raises(AdapterBad, match="hash"):
        check_block_bytes(one, one.blocks[0], b"\1" + Q_BYTES[1:])


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": 1025},
        {"rank": True},
        {"rank": 2.0},
        {"alpha": 0},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"alpha": 10**400},
        {"alpha": 1e9},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"targets": ()},
        {"targets": ("b", "a")},
        {"targets": ("a", "a")},
        {"targets": ("a..b",)},
        {"targets": ("../q",)},
        {"targets": ("x" * 200,)},
        {"targets": tuple(f"t{i:03}" for i in range(65))},
    ],
    ids=lambda options: repr(options)[:40],
)
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(AdapterBad):
        AdapterConfig(**{"rank": 2, "alpha": 4.0, "targets": ("attn.q", "up")} | options)


def _changed(path: list[Any], value: Any) -> bytes:
    whole = json.loads(manifest().text())
    place = whole
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(whole, separators=(",", ":"), sort_keys=True).encode()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b" " * (ADAPTER_MANIFEST_BYTES_MAX + 1),
        manifest().text() + b" ",
        _changed([0], "shoal-adapter-2"),
        _changed([1], []),
        _changed([1, "rank"], 10**30),
        _changed([1, "rank"], None),
        _changed([1, "alpha"], 10**400),
        _changed([1, "encoding"], "pickle"),
        _changed([1, "encoding"], {}),
        _changed([1, "targets"], "attn.q"),
        _changed([1, "targets"], [1]),
        _changed([1, "use_rslora"], 1),
        _changed([1, "surprise"], 1),
        _changed([2], []),
        _changed([2], {}),
        _changed([2, 0, 0], 3),
        _changed([2, 0, 0], -1),
        _changed([2, 0, 0], 10**9),
        _changed([2, 0, 1], "xyz"),
        _changed([2, 0, 2], []),
        _changed([2, 0, 2, 0, 0], "other"),
        _changed([2, 0, 2, 0, 1], 0),
        _changed([2, 0, 2, 0, 1], 1 << 40),
        _changed([2, 0, 2, 0, 2], True),
        _changed([2, 1, 2], [["up", 4, 8], ["attn.q", 4, 6]]),
    ],
    ids=lambda text: repr(text)[-60:],
)
def test_a_strangers_manifest(text: bytes) -> None:
    with pytest.raises(AdapterBad):
        parse_adapter_manifest(text, manifest().name)


def test_a_manifest_of_another_name() -> None:
    with pytest.raises(AdapterBad, match="not the manifest"):
        parse_adapter_manifest(manifest().text(), AdapterName(bytes(16)))
