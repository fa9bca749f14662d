"""What a LoRA adapter is, without its tensors: options, shapes, hashes, and so its name.

An adapter adds `scale * B(A(x))` to what linear layers inside blocks give (LoRA,
arXiv 2106.09685). A is (rank, inputs), B is (outputs, rank). It is named by the hash of its
manifest, which holds the hash of each block's tensors: whoever holds some of the blocks can
check them alone, and who says the same name means the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NewType, get_args

from shoal.base.content import CONTENT_BYTES, is_hash
from shoal.base.errors import AdapterBad
from shoal.base.spans import Span

AdapterName = NewType("AdapterName", bytes)
"""16 bytes: BLAKE2b-128 of an adapter's manifest. Shown as 32 hex characters."""

AdapterId = NewType("AdapterId", int)
"""An adapter's tensors inside one backend; chosen by the server, never reused."""

AdapterEncoding = Literal["float32", "bfloat16"]
"""How tensors are stored and travel: little-endian values, row by row."""

ITEM_BYTES: Final[Mapping[str, int]] = {"float32": 4, "bfloat16": 2}

HASH_STEP_BYTES: Final = 1 << 20
"""Hashed at once where others wait meanwhile: one or two milliseconds."""

RANK_MAX: Final = 1024
"""Above this an adapter is hardly smaller than the layers; real ones have 4 to 256."""

SCALE_MAX: Final = 1e6
"""Of `alpha / rank`; real ones are between 0.1 and 10."""

TARGETS_MAX: Final = 64
"""Linear layers of one block; transformers' blocks have up to a dozen."""

TARGET_CHARS_MAX: Final = 128

BLOCKS_MAX: Final = 65_536
"""As the wire's block numbers."""

FEATURES_MAX: Final = 1 << 20
"""Inputs or outputs of one layer; the widest fused ones have some 60,000."""

ADAPTER_MANIFEST_BYTES_MAX: Final = 1 << 20
"""126 blocks of 7 layers take 60 kB."""

_TARGET: Final = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_KIND: Final = "shoal-adapter-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The options of an adapter.

    Raises:
        AdapterBad: a value that cannot be, and which.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Linear layers by their path inside a block (`self_attn.q_proj`), sorted, each once."""
    dropout: float = 0.0
    """Of the rows before A, in training."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) (arXiv 2312.03732)."""

    def __post_init__(self) -> None:
        if type(self.rank) is not int or not 1 <= self.rank <= RANK_MAX:
            raise AdapterBad(f"rank {self.rank!r:.40}: write 1 to {RANK_MAX}")
        if not _is_number(self.alpha) or not 0 < self.scale <= SCALE_MAX:
            raise AdapterBad(f"alpha {self.alpha!r:.40}: above 0, and its scale below {SCALE_MAX}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise AdapterBad(f"dropout {self.dropout!r:.40}: at least 0, below 1")
        if not 1 <= len(self.targets) <= TARGETS_MAX:
            raise AdapterBad(f"{len(self.targets)} targets (1 to {TARGETS_MAX})")
        for target in self.targets:
            if len(target) > TARGET_CHARS_MAX or not _TARGET.fullmatch(target):
                raise AdapterBad(f"target {target!r:.140} is no path of a layer inside a block")
        if list(self.targets) != sorted(set(self.targets)):
            raise AdapterBad("targets must be sorted, each once")

    @property
    def scale(self) -> float:
        """What B(A(x)) is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class DropoutKey:
    """What the dropout of one training step is drawn from: `model/lora_dropout.py`."""

    seed: int
    step: int


@dataclass(frozen=True, slots=True)
class RowRun:
    """Consecutive rows of one sequence of a batch: positions [position, position + count)."""

    sequence: int
    """Its number in the whole batch of the step, however that is cut."""
    position: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraShape:
    """The two tensors of one layer: A (rank, inputs), B (outputs, rank)."""

    target: str
    inputs: int
    outputs: int

    def num_values(self, rank: int) -> int:
        """Values of A and B together."""
        return rank * (self.inputs + self.outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterBlock:
    """An adapter's tensors in one block: for each layer in order, A then B."""

    index: int
    shapes: tuple[LoraShape, ...]
    """Sorted by target; a block may lack some of the adapter's targets."""
    content: str
    """`block_hash` of the tensors' bytes, 32 hex characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterManifest:
    """All of an adapter but its numbers. Read from a peer by `parse_adapter_manifest`."""

    config: AdapterConfig
    encoding: AdapterEncoding
    blocks: tuple[AdapterBlock, ...]
    """By rising index; blocks without tensors are left out."""

    @property
    def name(self) -> AdapterName:
        """What the adapter is called on the wire."""
        digest = hashlib.blake2b(self.text(), digest_size=CONTENT_BYTES, person=b"shoal-adapter")
        return AdapterName(digest.digest())

    def text(self) -> bytes:
        """The manifest in its only form."""
        config = self.config
        options = {
            "alpha": float(config.alpha),
            "dropout": float(config.dropout),
            "encoding": self.encoding,
            "rank": config.rank,
            "targets": list(config.targets),
            "use_rslora": config.use_rslora,
        }
        blocks = [
            [block.index, block.content, [[s.target, s.inputs, s.outputs] for s in block.shapes]]
            for block in self.blocks
        ]
        whole = [_KIND, options, blocks]
        return json.dumps(whole, separators=(",", ":"), sort_keys=True).encode()

    def within(self, span: Span) -> tuple[AdapterBlock, ...]:
        """The blocks of `span` that have tensors."""
        return tuple(block for block in self.blocks if block.index in span)

    def block_bytes(self, block: AdapterBlock) -> int:
        """Bytes of one block's tensors."""
        values = sum(shape.num_values(self.config.rank) for shape in block.shapes)
        return values * ITEM_BYTES[self.encoding]

    def num_bytes(self, span: Span) -> int:
        """Bytes of the tensors within `span`."""
        return sum(self.block_bytes(block) for block in self.within(span))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPart:
    """What a backend is given of an adapter: the checked bytes of the blocks that it has."""

    manifest: AdapterManifest
    blocks: Mapping[int, bytes | bytearray | memoryview]


def block_hash(data: bytes | bytearray | memoryview) -> str:
    """What the tensors of one block are named by: 32 hex characters."""
    digest = _block_digest()
    digest.update(data)
    return digest.hexdigest()


def make_adapter_manifest(
    config: AdapterConfig,
    encoding: AdapterEncoding,
    blocks: Mapping[int, tuple[Iterable[LoraShape], bytes | bytearray | memoryview]],
) -> AdapterManifest:
    """The manifest of an adapter whose blocks have these shapes and bytes.

    Raises:
        AdapterBad: shapes that cannot be, or bytes of another size.
    """
    entries = [
        AdapterBlock(
            index=index,
            shapes=tuple(sorted(shapes, key=lambda shape: shape.target)),
            content=block_hash(data),
        )
        for index, (shapes, data) in sorted(blocks.items())
    ]
    manifest = AdapterManifest(config=config, encoding=encoding, blocks=tuple(entries))
    for entry in entries:
        check_block_bytes(manifest, entry, blocks[entry.index][1])
    return parse_adapter_manifest(manifest.text(), manifest.name)


def check_block_bytes(
    manifest: AdapterManifest, block: AdapterBlock, data: bytes | bytearray | memoryview
) -> None:
    """Raise AdapterBad unless these are the bytes of that block."""
    for _ in check_block_in_steps(manifest, block, data):
        pass


def check_block_in_steps(
    manifest: AdapterManifest, block: AdapterBlock, data: bytes | bytearray | memoryview
) -> Iterator[None]:
    """`check_block_bytes`, with a stop after each millisecond of hashing.

    Raises:
        AdapterBad: at the end, or at once where the length is wrong.
    """
    view, expected = memoryview(data).cast("B"), manifest.block_bytes(block)
    if view.nbytes != expected:
        raise AdapterBad(f"block {block.index}: {view.nbytes} bytes of tensors, not {expected}")
    digest = _block_digest()
    for start in range(0, view.nbytes, HASH_STEP_BYTES):
        digest.update(view[start : start + HASH_STEP_BYTES])
        yield
    if digest.hexdigest() != block.content:
        raise AdapterBad(f"block {block.index}: the tensors don't have the hash of the manifest")


def _block_digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=CONTENT_BYTES, person=b"shoal-lora-block")


def parse_adapter_manifest(text: bytes, name: AdapterName) -> AdapterManifest:
    """The manifest whose text this is.

    Raises:
        AdapterBad: too long, not what hashes to `name`, malformed, or over a limit.
    """
    if len(text) > ADAPTER_MANIFEST_BYTES_MAX:
        raise AdapterBad(f"a manifest of {len(text)} bytes (limit {ADAPTER_MANIFEST_BYTES_MAX})")
    try:
        manifest = _read(json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise AdapterBad(f"the adapter's manifest is malformed: {error}") from error
    if manifest.text() != text or manifest.name != name:
        raise AdapterBad(f"this is not the manifest of adapter {name.hex()}")
    return manifest


def adapter_name(text: str) -> AdapterName | None:
    """The name written as 32 hex characters; None where `text` is no such name."""
    return AdapterName(bytes.fromhex(text)) if is_hash(text) else None


def _read(value: Any) -> AdapterManifest:
    kind, options, rows = value
    if kind != _KIND or not isinstance(options, dict) or not isinstance(rows, list):
        raise ValueError("not an adapter of version 1")
    encoding = options.pop("encoding")
    if encoding not in get_args(AdapterEncoding):
        raise ValueError(f"encoding {encoding!r:.40}")
    targets = options.pop("targets")
    if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
        raise ValueError("targets are not a list of paths")
    if type(options.get("use_rslora")) is not bool:
        raise ValueError("use_rslora is neither true nor false")
    config = AdapterConfig(targets=tuple(targets), **options)
    blocks = tuple(_block(row, config) for row in rows)
    indices = [block.index for block in blocks]
    if not indices or indices != sorted(set(indices)):
        raise ValueError("blocks must rise, and there must be one")
    return AdapterManifest(config=config, encoding=encoding, blocks=blocks)


def _block(row: Any, config: AdapterConfig) -> AdapterBlock:
    index, content, rows = row
    if not _is_within(index, 0, BLOCKS_MAX - 1):
        raise ValueError(f"a block {index!r:.40}")
    if not isinstance(content, str) or not is_hash(content):
        raise ValueError(f"block {index} has no hash")
    if not isinstance(rows, list):
        raise ValueError(f"block {index} has no shapes")
    shapes = tuple(_shape(row, config) for row in rows)
    targets = [shape.target for shape in shapes]
    if not targets or targets != sorted(set(targets)):
        raise ValueError(f"the layers of block {index} must be sorted, and there must be one")
    return AdapterBlock(index=index, shapes=shapes, content=content)


def _shape(row: Any, config: AdapterConfig) -> LoraShape:
    target, inputs, outputs = row
    if target not in config.targets:
        raise ValueError(f"{target!r:.140} is not one of the targets")
    if not _is_within(inputs, 1, FEATURES_MAX) or not _is_within(outputs, 1, FEATURES_MAX):
        raise ValueError(f"{target} has {inputs!r:.40} inputs and {outputs!r:.40} outputs")
    return LoraShape(target=target, inputs=inputs, outputs=outputs)


def _is_within(value: object, lowest: int, highest: int) -> bool:
    return type(value) is int and lowest <= value <= highest


def _is_number(value: object) -> bool:
    # Not isfinite, which fails for whole numbers beyond the range of floats.
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e300
