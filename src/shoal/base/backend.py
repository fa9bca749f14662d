"""The BlockBackend contract: what a server needs from whatever runs blocks.

Activations are opaque here: bytes in, bytes out. Implementations: the torch engine in
`shoal.model`, toy blocks in `shoal.lab`. All pass tests/contracts/test_backend.py.

Division of labour: the server owns accounting, the fork tree, logs and the choice of
victims; the backend owns the layout of its KV cache and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType, Protocol

from shoal.base.adapters import AdapterId, AdapterManifest, AdapterPart
from shoal.base.errors import AdapterBad, ShoalError
from shoal.base.spans import Span
from shoal.base.training import BlockTrainer

SequenceId = NewType("SequenceId", int)
"""A sequence's cache inside one backend; chosen by the server, never reused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendFacts:
    """What a backend is, for records and checks. Constant for its life."""

    model: str
    """The model's name on the wire: the hash of its manifest."""
    span: Span
    """The blocks it can run; a sequence may use any part of them."""
    num_blocks: int
    """Blocks of the whole model."""
    hidden_size: int
    """Values per row of hidden states."""
    encodings: tuple[str, ...]
    """Encodings (wire/tensors.py) it reads and writes; the first is its own dtype's."""
    numerics: str
    """Numerics class: servers with equal classes give equal bits (design section 5)."""
    is_exact: bool
    """Whether results don't depend on company and a replay repeats the bits."""
    cache_tokens: int
    """Positions that fit into the KV cache, over all sequences."""
    page_tokens: int
    """Cache is accounted in pages of this many positions."""
    session_tokens_max: int
    """The longest sequence the model itself supports."""
    calls_per_sequence_max: int = 1
    """Consecutive calls of one sequence that one run may hold: replays repeat many at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Run `count` new rows of one sequence through `span`, after its cached ones."""

    sequence: SequenceId
    span: Span
    position: int
    """Index of the first new row; equals the sequence's cached length."""
    count: int
    call_count: int
    """Rows of the call that first computed these (>= count): exact engines repeat its shape."""
    payload: bytes | bytearray | memoryview
    """`count` rows in `encoding`."""
    encoding: str
    output_encoding: str
    rows_wanted: int
    """How many trailing rows to return: 0, 1 or `count`."""


Outcome = bytes | ShoalError
"""A call's output rows, or why this call alone failed (its cache is then as before)."""


class BlockBackend(Protocol):
    """Runs spans of blocks for many sequences, each with its own KV cache.

    All methods but `run` are called only while no `run` is in progress.
    """

    @property
    def facts(self) -> BackendFacts:
        """What this backend is."""

    def open(self, sequence: SequenceId, span: Span, adapter: AdapterId | None = None) -> None:
        """Start an empty sequence over `span`, a part of `facts.span`.

        Its rows, and those of its forks, go through a loaded adapter as well.
        """

    def close(self, sequence: SequenceId) -> None:
        """Free the sequence's cache. Unknown sequences are ignored."""

    def truncate(self, sequence: SequenceId, length: int) -> int:
        """Forget positions >= `length`; returns the length that is left.

        May return less than asked (recurrent state, rows that slid out of a window);
        the server then replays from there.
        """

    def fork(self, parent: SequenceId, child: SequenceId, length: int) -> int:
        """Open `child` over the parent's span as a copy of its first `length` positions.

        Returns the length that could be copied; later changes to either side don't
        touch the other.
        """

    async def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """Run all calls, one outcome each, in order.

        At most `facts.calls_per_sequence_max` calls per sequence; each begins where the one
        before it ends, and fails when that one fails.
        A non-finite or malformed row is that call's `BadInput`; good rows that gave
        others which can't be sent are its `BadOutput`. An exception means that nothing
        is known about any of the calls: the server truncates and runs them one by one.
        """

    def check_adapter(self, manifest: AdapterManifest) -> None:
        """See that an adapter fits our blocks. May be called during a `run`.

        Raises:
            AdapterBad: its layers are not ours, by name or by shape.
        """

    async def load_adapter(self, adapter: AdapterId, part: AdapterPart) -> None:
        """Hold an adapter's tensors in our blocks, until `drop_adapter`. Runs may go on.

        Raises:
            AdapterBad: as `check_adapter`, or values that are not finite; nothing is held.
        """

    async def drop_adapter(self, adapter: AdapterId) -> None:
        """Free it; no open sequence uses it. Unknown ones are ignored. Runs may go on."""

    def holds_adapter(self, adapter: AdapterId) -> bool:
        """Whether sequences that are opened now may name it. May be called during a `run`."""

    def trainer(self) -> BlockTrainer | None:
        """What runs training passes here; None: nothing does."""

    async def aclose(self) -> None:
        """Stop threads, free memory."""


class NoAdapters:
    """The adapter half of a backend that takes none."""

    def check_adapter(self, manifest: AdapterManifest) -> None:
        """Raise AdapterBad."""
        raise AdapterBad("this server takes no adapters")

    async def load_adapter(self, adapter: AdapterId, part: AdapterPart) -> None:
        """Raise AdapterBad."""
        self.check_adapter(part.manifest)

    async def drop_adapter(self, adapter: AdapterId) -> None:
        """There are none."""

    def holds_adapter(self, adapter: AdapterId) -> bool:
        """There are none."""
        return False
