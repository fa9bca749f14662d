"""Which of a batch's columns are tokens: padding stays at the client.

Every row of a batch is a session of its own without padding, so a row may begin later than
the others (left padding), and in a single pass it may end earlier (right padding). A mask
with holes would need rows that other rows don't see; it is refused.
Pure functions. B rows, P columns that the cache has seen, S new columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.base.errors import BadInput


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPart:
    """The new columns [start, end) of one row hold its tokens; the others are padding."""

    start: int
    end: int

    @property
    def count(self) -> int:
        """New tokens."""
        return self.end - self.start


def row_parts(
    mask: torch.Tensor | None, *, pads: Sequence[int], past: int, new: int, is_kept: bool
) -> list[RowPart]:
    """Where each row's new tokens are.

    Args:
        mask: (B, P + S), 1 for tokens; None: every new column is a token.
        pads: how many columns of padding each row had at its start (P for an unused row).
        past: P.
        new: S.
        is_kept: whether the rows will be continued.

    Raises:
        BadInput: a wrong shape, other values than 0 and 1, a hole, padding at the end of a
            row that is kept, a row without tokens, another mask for the past than before.
    """
    if mask is None:
        return [RowPart(start=0, end=new)] * len(pads)
    if mask.dim() != 2 or tuple(mask.shape) != (len(pads), past + new):
        raise BadInput(
            f"attention_mask of shape {tuple(mask.shape)}: give ({len(pads)}, {past + new}), a "
            "column for each token of the cache and of the input"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise BadInput("attention_mask may only hold 0 (padding) and 1 (token)")
    rows: list[list[int]] = mask.to(dtype=torch.long, device="cpu").tolist()
    return [
        _row_part(index, row, pads[index], past, is_kept=is_kept) for index, row in enumerate(rows)
    ]


def _row_part(index: int, row: list[int], pad: int, past: int, *, is_kept: bool) -> RowPart:
    if 1 not in row:
        raise BadInput(f"row {index} has no tokens: attention_mask is 0 everywhere")
    first = row.index(1)
    end = len(row) - row[::-1].index(1)
    if past and first != pad:
        raise BadInput(
            f"row {index} began at column {pad} of the cache, but attention_mask says {first}: "
            "give the mask of the whole conversation, as for the first call"
        )
    if 0 in row[first:end]:
        raise BadInput(
            f"attention_mask of row {index} has a hole at column {first + row[first:end].index(0)}"
            ": padding may only stand before a row's first token. Continue rows of unequal "
            "length in calls of their own"
        )
    if end < len(row) and is_kept:
        raise BadInput(
            f"row {index} ends with padding: pad on the left (tokenizer.padding_side = 'left'), "
            "or call the model with use_cache=False"
        )
    return RowPart(start=max(first - past, 0), end=max(end - past, 0))


def check_positions(
    position_ids: torch.Tensor, parts: Sequence[RowPart], lengths: Sequence[int]
) -> None:
    """Refuse positions that aren't those of rows without padding.

    Args:
        position_ids: (B or 1, S).
        parts: the new tokens of each row.
        lengths: tokens that each row has already.

    Raises:
        BadInput: a row's tokens are elsewhere.
    """
    columns = max((part.end for part in parts), default=0)
    is_batch = position_ids.dim() == 2 and position_ids.shape[0] in (1, len(parts))
    if not is_batch or position_ids.shape[1] < columns:
        raise BadInput(
            f"position_ids of shape {tuple(position_ids.shape)}: leave them out, or give (rows, "
            "new tokens)"
        )
    rows = position_ids.to("cpu").expand(len(parts), -1)
    for index, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        expected = torch.arange(length, length + part.count)
        if not torch.equal(rows[index, part.start : part.end].long(), expected):
            raise BadInput(
                f"position_ids of row {index} are not {length} to {length + part.count - 1}: a "
                "session's positions follow each other. Leave position_ids out; if the row is "
                "padded, give attention_mask"
            )
