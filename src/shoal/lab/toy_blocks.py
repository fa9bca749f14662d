"""Toy blocks: hash functions that behave like transformer blocks.

A block's output at a position depends on its input there and, through a chain of hashes
(its "KV cache"), on every input before, in order. One wrong, missing, repeated or
misplaced row anywhere in a chain of servers changes every later output. Rows are valid
finite float32 values, so that nothing else notices they are hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from shoal.base.errors import BadInput
from shoal.base.spans import Span
from shoal.wire.tensors import row_bytes

ENCODINGS: Final = ("float32", "bfloat16")
"""What toy blocks read and write; bfloat16 keeps the upper halves of the values."""

HIDDEN_SIZE: Final = 16
"""Values per row unless said otherwise: a row is one 64-byte hash."""

_NO_ADAPTER: Final[Mapping[int, bytes]] = MappingProxyType({})

_SMALL: Final = bytes(byte & 0xBF for byte in range(256))
"""Clears the upper exponent bit of a float's highest byte: its size is below 2, so finite."""

TOY_LAYER: Final = "toy"
"""What adapters may target in a toy block: a layer from hidden size to hidden size."""

_CHAIN_BYTES: Final = 16


class ToySequence:
    """One sequence's state in the blocks of a span."""

    def __init__(
        self,
        span: Span,
        hidden_size: int = HIDDEN_SIZE,
        adapter: Mapping[int, bytes] = _NO_ADAPTER,
    ) -> None:
        """`adapter` gives the hash of its tensors for each block that it changes."""
        self.span = span
        self._adapter = adapter
        self._row_bytes = row_bytes("float32", hidden_size)
        self._chains: list[list[bytes]] = [[b""] for _ in range(len(span))]
        self._length = 0

    @property
    def length(self) -> int:
        """Positions held."""
        return self._length

    def push(self, row: bytes, *, shape: int = 0) -> bytes:
        """The span's output for the next position. `row` and the result are float32.

        `shape` is mixed in: a run with other call shapes gives other results.
        """
        if len(row) != self._row_bytes:
            raise BadInput(f"a row has {len(row)} bytes, expected {self._row_bytes}")
        salt = shape.to_bytes(8, "little")
        for block, chain in zip(range(self.span.start, self.span.end), self._chains, strict=True):
            person = block.to_bytes(8, "little")
            digest = hashlib.blake2b(
                chain[-1] + row,
                digest_size=_CHAIN_BYTES,
                person=person,
                salt=salt,
                key=self._adapter.get(block, b""),
            ).digest()
            chain.append(digest)
            row = finite_row(digest, self._row_bytes)
        self._length += 1
        return row

    def truncate(self, length: int) -> None:
        """Forget positions >= `length`."""
        for chain in self._chains:
            del chain[length + 1 :]
        self._length = min(self._length, length)

    def copy(self, length: int) -> ToySequence:
        """A second sequence with the first `length` positions of this one."""
        child = ToySequence(self.span, adapter=self._adapter)
        child._row_bytes = self._row_bytes
        child._chains = [chain[: length + 1] for chain in self._chains]
        child._length = min(self._length, length)
        return child


def expected_output(
    span: Span,
    inputs: Iterable[bytes],
    *,
    hidden_size: int = HIDDEN_SIZE,
    adapter: Mapping[int, bytes] = _NO_ADAPTER,
) -> list[bytes]:
    """The float32 rows that blocks of `span` give for the float32 rows `inputs`."""
    sequence = ToySequence(span, hidden_size, adapter)
    return [sequence.push(row) for row in inputs]


def toy_embedding(token: int, *, hidden_size: int = HIDDEN_SIZE) -> bytes:
    """The float32 row that stands for a token."""
    digest = hashlib.blake2b(token.to_bytes(8, "little"), person=b"toy-embedding").digest()
    return finite_row(digest, row_bytes("float32", hidden_size))


def toy_next_token(row: bytes, *, vocabulary: int = 50_000) -> int:
    """The token that "greedy decoding" reads off an output row."""
    digest = hashlib.blake2b(row, digest_size=8, person=b"toy-head").digest()
    return int.from_bytes(digest, "little") % vocabulary


def expected_tokens(
    num_blocks: int,
    prompt: Sequence[int],
    count: int,
    *,
    adapter: Mapping[int, bytes] = _NO_ADAPTER,
) -> list[int]:
    """The `count` tokens that follow `prompt` when all blocks run in one place."""
    sequence = ToySequence(Span(0, num_blocks), adapter=adapter)
    tokens: list[int] = []
    row = b""
    for token in prompt:
        row = sequence.push(toy_embedding(token))
    while len(tokens) < count:
        tokens.append(toy_next_token(row))
        row = sequence.push(toy_embedding(tokens[-1]))
    return tokens


def encode_rows(rows: bytes, encoding: str) -> bytes:
    """Float32 rows in `encoding`.

    Raises:
        BadInput: not one of ENCODINGS.
    """
    if encoding == "float32":
        return rows
    if encoding != "bfloat16":
        raise BadInput(f"toy blocks don't write {encoding!r} (only {', '.join(ENCODINGS)})")
    halves = bytearray(len(rows) // 2)
    halves[0::2], halves[1::2] = rows[2::4], rows[3::4]
    return bytes(halves)


def decode_rows(rows: bytes, encoding: str) -> bytes:
    """Rows in `encoding` as float32.

    Raises:
        BadInput: not one of ENCODINGS.
    """
    if encoding == "float32":
        return rows
    if encoding != "bfloat16":
        raise BadInput(f"toy blocks don't read {encoding!r} (only {', '.join(ENCODINGS)})")
    full = bytearray(len(rows) * 2)
    full[2::4], full[3::4] = rows[0::2], rows[1::2]
    return bytes(full)


def is_finite(rows: bytes) -> bool:
    """Whether no float32 value is NaN or infinite."""
    pairs = zip(rows[3::4], rows[2::4], strict=True)
    return not any(high & 0x7F == 0x7F and low & 0x80 for high, low in pairs)


def finite_row(digest: bytes, num_bytes: int) -> bytes:
    row = bytearray(hashlib.shake_128(digest).digest(num_bytes))
    row[3::4] = row[3::4].translate(_SMALL)
    return bytes(row)
