"""LoRA adapters: what transformers with PEFT computes, for every family, in mixed batches."""

from __future__ import annotations

import asyncio
from functools import cache
from pathlib import Path

import pytest
import torch

from shoal.base.adapters import AdapterId
from shoal.base.backend import BlockBackend
from shoal.base.errors import AdapterBad
from shoal.base.spans import Span
from shoal.model.adapter_files import write_peft
from shoal.model.memory_source import MemorySource
from shoal.model.torch_backend import BackendConfig, load_backend
from tests.golden.adapter_cases import Runner, States, peft_model, read, save_adapter
from tests.golden.test_batched import PACKED
from tests.golden.test_chain_equals_model import prompt_of
from tests.models import FAMILIES, tiny_config, tiny_model, tiny_source

pytestmark = [
    # PEFT asks transformers in an old way.
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

TOLERANCE = 2e-5
"""Largest difference relative to the largest value, float32."""

TOKENS = 18


@cache
def source(family: str) -> MemorySource:
    return tiny_source(family)


def loaded(family: str, engine: str, exact: str = "never", **options: str) -> BlockBackend:
    blocks = tiny_config(family).num_hidden_layers
    config = BackendConfig(model="m", engine=engine, exact=exact, **options)
    return load_backend(source(family), Span(0, blocks), config)


def targets_for(family: str) -> list[str] | None:
    """All linear layers, but for those that packed passes or PEFT take in another way."""
    if family == "deepseek_v3":
        return ["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj"]
    if family == "glm4_moe":
        return ["self_attn.k_proj", "self_attn.o_proj"]
    if family == "qwen3_next":
        return ["linear_attn.in_proj_qkvz", "linear_attn.out_proj", "self_attn.q_proj"]
    return ["mixer.in_proj"] if family == "mamba2" else None


def close(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((mine - theirs).abs().max() <= TOLERANCE * theirs.abs().max())


async def check_mixed(backend: BlockBackend, family: str, directories: list[Path]) -> None:
    """Sequences with the first adapter, the second, none and the first again, in one batch."""
    models = [States(peft_model(one, family)) for one in directories]
    models.append(States(tiny_model(family)))
    for number, directory in enumerate(directories, 1):
        await backend.load_adapter(AdapterId(number), read(directory, family))
    runner = Runner(backend)
    plan = {0: 0, 1: 1, 2: 2, 3: 0}
    expected = {}
    for sequence, which in plan.items():
        runner.open(sequence, None if which == 2 else which + 1)
        tokens = [(token + sequence) % 90 for token in prompt_of(TOKENS)]
        expected[sequence] = models[which].of(tokens)
    for start, end in ((0, 11), (11, 12), (12, 15), (15, 16), (16, TOKENS)):
        rows = {sequence: first[start:end] for sequence, (first, _) in expected.items()}
        for sequence, found in (await runner.run(rows)).items():
            assert close(found, expected[sequence][1][start:end]), (sequence, start)
    await backend.aclose()


@pytest.fixture
def two(tmp_path: Path, family: str) -> list[Path]:
    """Two adapters of a family."""
    for seed in (1, 2):
        options = {} if seed == 1 else {"lora_alpha": 3, "use_rslora": True, "r": 2}
        save_adapter(tmp_path / str(seed), family, seed, targets=targets_for(family), **options)
    return [tmp_path / "1", tmp_path / "2"]


TOGETHER = [
    *((family, "always") for family in PACKED),
    *((family, "never") for family in ("llama", "gemma2", "deepseek_v3", "gpt2", "mixtral")),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_sequences_one_by_one(family: str, two: list[Path]) -> None:
    asyncio.run(check_mixed(loaded(family, "per-session"), family, two))


@pytest.mark.parametrize(("family", "exact"), TOGETHER)
def test_mixed_batches(family: str, exact: str, two: list[Path]) -> None:
    asyncio.run(check_mixed(loaded(family, "batched", exact), family, two))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_peft_reads_what_we_write(family: str, two: list[Path], tmp_path: Path) -> None:
    tokens = prompt_of(TOKENS)
    for directory in two:
        write_peft(tmp_path / "again", read(directory, family), tiny_config(family), "base")
        (_, expected), (_, found) = (
            States(peft_model(one, family)).of(tokens) for one in (directory, tmp_path / "again")
        )
        assert torch.equal(found, expected)


def test_layers_that_are_taken_apart_are_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, "deepseek_v3", 1, targets=["self_attn.kv_b_proj"])
    adapter = read(tmp_path, "deepseek_v3")

    async def scenario() -> None:
        backend = loaded("deepseek_v3", "batched")
        with pytest.raises(AdapterBad, match="kv_b_proj"):
            await backend.load_adapter(AdapterId(1), adapter)
        await backend.aclose()
        alone = loaded("deepseek_v3", "per-session")
        await alone.load_adapter(AdapterId(1), adapter)
        await alone.aclose()

    asyncio.run(scenario())
