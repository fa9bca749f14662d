"""What `shoal ring run` shows while samples go round: the nodes and the speed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from shoal.base.ids import PeerId, peer_text
from shoal.plan.slots import Slots

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live
    from rich.table import Table

    from shoal.wire.ring import RingNode

MB = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLine:
    """One node between two looks."""

    peer: str
    name: str
    state: str
    start: int
    end: int
    memory_bytes: int
    memory_peak_bytes: int
    planned_bytes: int
    busy: float | None
    """Share of the time in which its engine ran; the rest is the bubble. None: not known yet."""
    rows_per_pass: float = 0.0
    pass_s: float = 0.0
    """Seconds of a pass, on average."""

    @classmethod
    def of(cls, node: RingNode, before: RingNode | None) -> Self:
        """What a node did since it was looked at before."""
        busy, rows, pass_s = None, 0.0, 0.0
        is_same = before is not None and (before.start, before.end) == (node.start, node.end)
        if before is not None and is_same and node.up_s > before.up_s:
            busy_s = max(0.0, node.busy_s - before.busy_s)
            busy = min(1.0, busy_s / (node.up_s - before.up_s))
            passes = node.iterations - before.iterations
            if passes > 0:
                rows, pass_s = max(0, node.rows - before.rows) / passes, busy_s / passes
        return cls(
            peer=peer_text(PeerId(node.peer)), name=node.name, state=node.state,
            start=node.start, end=node.end, memory_bytes=node.memory_bytes,
            memory_peak_bytes=node.memory_peak_bytes, planned_bytes=node.planned_bytes,
            busy=busy, rows_per_pass=rows, pass_s=pass_s,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A ring at one moment."""

    nodes: tuple[NodeLine, ...]
    tokens: int
    ended: int
    samples: int
    decoding: int
    slots: Slots
    most_slots: Slots
    """With most samples."""
    tokens_per_s: float
    """Of the last seconds."""
    mean_tokens_per_s: float
    seconds: float
    """From the start to the last token."""

    def headline(self) -> str:
        """The speed in a line."""
        expected = ""
        if self.slots.tokens_per_s:
            expected = f" (expected {self.slots.tokens_per_s:.1f})"
        rows = self.slots.rows(self.decoding) if self.decoding else 0
        return (
            f"{self.tokens_per_s:.1f} tokens/s{expected}, {self.tokens} tokens, "
            f"{self.ended} of {self.samples} samples ended, {self.decoding} decode in "
            f"{self.slots.count} slots of {rows}"
        )

    def summary(self) -> str:
        """How it was."""
        text = (
            f"{self.tokens} tokens of {self.ended} samples in {self.seconds:.1f} s: "
            f"{self.mean_tokens_per_s:.1f} tokens/s, {self.most_slots.count} slots"
        )
        peaks = [f"{node.name} {node.memory_peak_bytes / MB:.0f} MB" for node in self.nodes]
        return f"{text}; memory {', '.join(peaks)}" if peaks else text


def shown(picture: Picture) -> Group:
    """The nodes as a table, the speed below it."""
    from rich.console import Group
    from rich.text import Text

    return Group(table(picture.nodes), Text(picture.headline()))


def table(nodes: Sequence[NodeLine]) -> Table:
    """What nodes do."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE)
    for name in ("node", "state", "blocks", "memory MB", "peak MB", "planned MB", "busy", "rows"):
        shown.add_column(name, justify="left" if name in ("node", "state") else "right")
    for node in nodes:
        shown.add_row(*_cells(node))
    return shown


def _cells(node: NodeLine) -> Sequence[str]:
    has_blocks = node.end > node.start
    return (
        node.name or node.peer[:8],
        node.state,
        f"{node.start}:{node.end}" if has_blocks else "-",
        f"{node.memory_bytes / MB:.0f}",
        f"{node.memory_peak_bytes / MB:.0f}",
        f"{node.planned_bytes / MB:.0f}" if has_blocks else "-",
        f"{node.busy:.0%}" if has_blocks and node.busy is not None else "-",
        f"{node.rows_per_pass:.1f}" if node.rows_per_pass else "-",
    )


class RingTable(AbstractContextManager["RingTable"]):
    """The table on stderr while there is a terminal; nothing elsewhere."""

    def __init__(self, *, is_quiet: bool) -> None:
        self._is_quiet = is_quiet
        self._live: Live | None = None

    def __enter__(self) -> RingTable:
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True)
        if console.is_terminal and not console.is_dumb_terminal and not self._is_quiet:
            self._live = Live(console=console, auto_refresh=False)
            self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def show(self, picture: Picture) -> None:
        """Draw it anew."""
        if self._live is not None:
            self._live.update(shown(picture), refresh=True)

    def say(self, text: str) -> None:
        """Instead of nodes, before there is anything to tell of them."""
        if self._live is not None:
            self._live.update(text, refresh=True)
