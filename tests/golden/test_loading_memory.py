"""A server with k of L blocks needs the memory of k of L blocks.

Measured in processes of their own: peak resident memory over what the libraries need.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from shoal.model.parts import meta_model

NUM_BLOCKS = 12
SLACK = 0.10

_SIZES = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
_EXPERTS = {"num_local_experts": 8, "intermediate_size": 384}

_CHILD = """
import sys
from pathlib import Path
import torch
from shoal.base.spans import Span
from shoal.model.safetensors_source import SafetensorsSource
from shoal.model.span_model import load_span


def status(key):  # getrusage's peak would include the parent's, from before exec
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key + ":"))) * 1024


torch.set_num_threads(1)
start, end, *directories = sys.argv[1:]
kept = []
for directory in directories:
    source = SafetensorsSource(Path(directory))
    load_span(source, Span(0, 1), dtype="bfloat16")  # what libraries load on first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    kept.append(load_span(source, Span(int(start), int(end)), dtype="bfloat16"))
    print(status("VmHWM") - before)
"""


def save_cheap_model(directory: Path, model_type: str, **options: int) -> int:
    """A model of zeros with experts stored one by one; returns its bytes."""
    directory.mkdir()
    config = AutoConfig.for_model(model_type, **_SIZES | options)
    config.save_pretrained(directory)
    tensors = {}
    for name, like in meta_model(config, torch.bfloat16).state_dict().items():
        if ".experts.gate_up_proj" in name:
            for expert in range(like.shape[0]):
                for part in ("w1", "w3"):
                    stored = name.replace(".mlp.experts.gate_up_proj", "")
                    key = f"{stored}.block_sparse_moe.experts.{expert}.{part}.weight"
                    tensors[key] = torch.zeros(like.shape[1] // 2, like.shape[2], dtype=like.dtype)
        elif ".experts.down_proj" in name:
            stored = name.replace(".mlp.experts.down_proj", "")
            for expert in range(like.shape[0]):
                key = f"{stored}.block_sparse_moe.experts.{expert}.w2.weight"
                tensors[key] = torch.zeros(like.shape[1:], dtype=like.dtype)
        elif ".mlp.gate.weight" in name and options:
            key = name.replace(".mlp.gate", ".block_sparse_moe.gate")
            tensors[key] = torch.zeros(like.shape, dtype=like.dtype)
        else:
            tensors[name] = torch.zeros(like.shape, dtype=like.dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_memory_is_that_of_the_span(tmp_path: Path) -> None:
    kinds: list[tuple[str, dict[str, int]]] = [("llama", {}), ("mixtral", _EXPERTS)]
    sizes = [save_cheap_model(tmp_path / kind, kind, **options) for kind, options in kinds]
    start, end = 4, 8
    arguments = [str(start), str(end), *(str(tmp_path / kind) for kind, _ in kinds)]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    share = (end - start) / NUM_BLOCKS
    for whole_bytes, line in zip(sizes, done.stdout.split(), strict=True):
        assert whole_bytes > 180_000_000
        peak = int(line) / whole_bytes
        assert share * 0.6 <= peak <= share + SLACK, f"{peak:.3f} of the weights for {share:.3f}"
