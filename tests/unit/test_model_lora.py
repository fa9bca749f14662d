"""LoRA for training: the hook's sums and gradients, and dropout that can be drawn again."""

from __future__ import annotations

import pytest
import torch

from shoal.base.adapters import AdapterConfig, AdapterId, DropoutKey, RowRun
from shoal.base.errors import AdapterBad
from shoal.base.spans import Span
from shoal.model.adapter_tensors import adapter_of
from shoal.model.lora import LoraDropout, LoraPair, lora_in, targets_of
from shoal.model.lora_dropout import dropout_mask
from shoal.model.lora_rows import LoraLayers
from shoal.model.row_tiles import COUNTS

KEY = DropoutKey(seed=3, step=7)
WIDTH = 50


def mask(*runs: RowRun, key: DropoutKey = KEY, block: int = 2, target: str = "up") -> torch.Tensor:
    return dropout_mask(0.25, key, block, target, runs, WIDTH)


def test_dropout_depends_on_nothing_but_its_key() -> None:
    whole = mask(RowRun(0, 0, 40), RowRun(1, 0, 30))
    assert whole.shape == (70, WIDTH)
    parts = [mask(RowRun(1, 0, 30)), mask(RowRun(0, 10, 30)), mask(RowRun(0, 0, 10))]
    assert torch.equal(whole, torch.cat([parts[2], parts[1], parts[0]]))
    assert abs(whole.float().mean() - 0.75) < 0.03


@pytest.mark.parametrize(
    "change",
    [
        {"key": DropoutKey(seed=4, step=7)},
        {"key": DropoutKey(seed=3, step=8)},
        {"block": 3},
        {"target": "down"},
    ],
    ids=str,
)
def test_dropout_differs_everywhere(change: dict[str, object]) -> None:
    one, other = mask(RowRun(0, 0, 40)), mask(RowRun(0, 0, 40), **change)  # type: ignore[arg-type]
    assert 0.3 < (one != other).float().mean() < 0.45
    assert not torch.equal(mask(RowRun(1, 0, 40)), one)


def test_dropout_stays_what_it_is() -> None:
    """Servers of all versions draw the same: these are Philox's numbers for this key."""
    drawn = mask(RowRun(0, 5, 1))[0].int().tolist()
    assert drawn == FIXED


FIXED = [int(digit) for digit in "01111111110111111010100111001110111011111111100001"]


def test_hooks_add_lora_with_gradients() -> None:
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    block.requires_grad_(False)
    assert targets_of(block) == {"0": (6, 8), "2": (8, 4)}
    pairs = {
        target: LoraPair(
            torch.randn(3, inputs, requires_grad=True), torch.randn(outputs, 3, requires_grad=True)
        )
        for target, (inputs, outputs) in targets_of(block).items()
    }
    rows = torch.randn(1, 5, 6, requires_grad=True)
    with lora_in(block, pairs, 0.5):
        found = block(rows)
    weights = [block[int(t)].weight + 0.5 * pair.b @ pair.a for t, pair in pairs.items()]
    inner = torch.tanh(rows @ weights[0].T + block[0].bias)
    expected = inner @ weights[1].T + block[2].bias
    assert torch.allclose(found, expected, atol=1e-5)
    inputs = [rows, *(tensor for pair in pairs.values() for tensor in (pair.a, pair.b))]
    mine = torch.autograd.grad(found.square().sum(), inputs)
    theirs = torch.autograd.grad(expected.square().sum(), inputs)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(block(rows), torch.nn.Sequential(*block)(rows))  # hooks are gone


def test_hooks_drop_what_the_key_says() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH, bias=False))
    torch.nn.init.zeros_(block[0].weight)
    pairs = {"0": LoraPair(torch.eye(WIDTH), torch.eye(WIDTH))}
    runs = (RowRun(0, 3, 4), RowRun(5, 0, 2))
    dropout = LoraDropout(probability=0.25, key=KEY, block=2, runs=runs)
    with lora_in(block, pairs, 1.0, dropout), torch.no_grad():
        found = block(torch.ones(1, 6, WIDTH))[0]
    kept = dropout_mask(0.25, KEY, 2, "0", runs, WIDTH)
    assert torch.allclose(found, kept / 0.75)


def test_an_unknown_target_is_named() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())
    pair = LoraPair(torch.zeros(1, 2), torch.zeros(2, 1))
    for target in ("1", "q_proj"):
        with pytest.raises(AdapterBad, match="no linear layer"), lora_in(block, {target: pair}, 1):
            pass


def test_a_size_is_probed_once_and_in_steps() -> None:
    block = torch.nn.ModuleDict({"up": torch.nn.Linear(8, 16), "down": torch.nn.Linear(16, 8)})
    modules = dict(block.items())
    part = adapter_of(
        AdapterConfig(rank=3, alpha=3.0, targets=("down", "up")),
        "float32",
        {
            0: {
                "up": LoraPair(torch.ones(3, 8), torch.ones(16, 3)),
                "down": LoraPair(torch.ones(3, 16), torch.ones(8, 3)),
            }
        },
    )
    manifest, (entry,) = part.manifest, part.manifest.blocks
    layers = LoraLayers(Span(0, 1), lambda _: modules, "cpu", is_exact=True)
    assert layers.unprobed(manifest, entry) == [(3, 8), (3, 16), (8, 3), (16, 3)]
    for size in layers.unprobed(manifest, entry):
        assert len(list(layers.probe(size))) == len(COUNTS)
    assert layers.unprobed(manifest, entry) == []
    layers.load(AdapterId(1), manifest, entry, part.blocks[0])
    assert layers.num_bytes == manifest.num_bytes(Span(0, 1))
    plain = LoraLayers(Span(0, 1), lambda _: modules, "cpu", is_exact=False)
    assert plain.unprobed(manifest, entry) == []
