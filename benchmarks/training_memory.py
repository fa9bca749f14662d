"""What training.py will need of memory, so that it refuses instead of being killed.

A machine without memory kills whoever asks last, often the servers; no figure comes of that.
The figures are upper ends of what was measured with the demo model: a pass forward and back of
8 sequences of 144 positions took 2.1 GB beside the weights, and 2.2 are reckoned.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from shoal.model.facts import model_facts
from shoal.model.training import TRANSPOSED_BYTES_MAX
from shoal.server.training_limits import KEPT_BYTES_PER_CLIENT, OPEN_BYTES_PER_CLIENT

ITEM_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}

PROCESS_BYTES: Final = 500_000_000
"""Python, torch and transformers."""

LOADING: Final = 1.1
"""Of weights: what loading them leaves behind."""

FREE_SHARE: Final = 0.95
"""Of what is free: the rest is the system's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes of processes that live at the same time."""

    single: int
    """The whole model with transformers and peft."""
    servers: int
    clients: int

    @property
    def total(self) -> int:
        """Of all."""
        return self.single + self.servers + self.clients


def needed(config: Any, dtype: str, servers: tuple[int, ...], batch: int, positions: int) -> Need:
    """What a batch of so many sequences of so many positions needs, a prompt's included.

    Raises:
        ModelUnsupported: the model can't be served.
    """
    facts, item = model_facts(config), ITEM_BYTES[dtype]
    rows, size, vocabulary = batch * positions, facts.hidden_size, facts.vocabulary
    blocks = facts.block_bytes[dtype]
    embedding = item * vocabulary * size * (1 if config.tie_word_embeddings else 2)
    graph = row_graph_bytes(size, int(config.intermediate_size), item)
    # Scores in the model's type, as float32, their logarithms and their gradients.
    scores = rows * vocabulary * (item + 4 + 4)
    single = _process(sum(blocks) + embedding) + rows * graph * len(blocks) + scores
    served = 0
    for count in servers:
        borders = [index * len(blocks) // count for index in range(count + 1)]
        for start, end in pairwise(borders):
            weights = sum(blocks[start:end])
            weights += min(TRANSPOSED_BYTES_MAX, weights)
            kept = min(KEPT_BYTES_PER_CLIENT, rows * graph * (end - start))
            served += _process(weights) + kept + OPEN_BYTES_PER_CLIENT
    borders_bytes = 4 * rows * size * item * (max(servers, default=0) + 1)
    clients = len(servers) * (_process(embedding) + borders_bytes + 3 * 4 * 512 * vocabulary)
    return Need(single=single, servers=served, clients=clients)


def row_graph_bytes(hidden_size: int, intermediate_size: int, item_bytes: int) -> int:
    """What the graph of one block holds of a row: some eight rows of the model's width (norms,
    queries, keys, values, attention) and four of the width between."""
    return item_bytes * (8 * hidden_size + 4 * intermediate_size)


def free_bytes(proc: Path = Path("/proc")) -> int | None:
    """What can be had without swapping; None: the system doesn't tell."""
    try:
        for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def refusal(need: Need, free: int | None) -> str | None:
    """Why it can't be measured here; None: it can."""
    if free is None or need.total <= FREE_SHARE * free:
        return None
    parts = (
        f"single process {_gb(need.single)}, servers {_gb(need.servers)}, "
        f"clients {_gb(need.clients)}"
    )
    return (
        f"needs {_gb(need.total)} of memory ({parts}) and {_gb(free)} are free: "
        "ask for smaller --batches"
    )


def _process(weights: int) -> int:
    return PROCESS_BYTES + int(LOADING * weights)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
