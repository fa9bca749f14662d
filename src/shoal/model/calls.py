"""What both torch backends ask of a call, and how they answer it. T rows, D hidden size."""

from __future__ import annotations

import torch

from shoal.base.backend import BackendFacts, Call
from shoal.base.errors import BadInput, BadOutput, SessionTooLong
from shoal.base.spans import Span
from shoal.model.rows import all_finite, rows_from_bytes, rows_to_bytes


def check_call(call: Call, span: Span, length: int, facts: BackendFacts) -> None:
    """Check a call of a sequence over `span` that holds `length` positions.

    Raises:
        BadInput: what is wrong with it.
        SessionTooLong: it goes beyond the model's context.
    """
    if call.span != span:
        raise BadInput(f"blocks {call.span} of a sequence that was opened over {span}")
    if call.position != length:
        raise BadInput(f"position {call.position} after {length} cached rows")
    if not 0 <= call.rows_wanted <= call.count <= call.call_count:
        raise BadInput(f"{call.rows_wanted} rows wanted of {call.count}, once {call.call_count}")
    if call.output_encoding not in facts.encodings:
        raise BadInput(f"unknown encoding {call.output_encoding!r}")
    if call.position + call.count > facts.session_tokens_max:
        raise SessionTooLong(f"the model ends at {facts.session_tokens_max} positions")


def rows_of(call: Call, facts: BackendFacts, device: str, dtype: torch.dtype) -> torch.Tensor:
    """(T, D) rows of a call on the device.

    Raises:
        BadInput: a wrong size or encoding, or values that are not finite.
    """
    payload = rows_from_bytes(call.payload, call.encoding, call.count, facts.hidden_size)
    rows = payload.to(device=device, dtype=dtype)
    if not all_finite(rows):
        raise BadInput(f"rows {call.position} to {_last(call)} hold values that are not finite")
    return rows


def answer_to(call: Call, output: torch.Tensor, facts: BackendFacts) -> bytes:
    """The wanted rows of (T, D) output, encoded.

    Raises:
        BadOutput: there are values that are not finite, or that the encoding can't hold.
    """
    rows = f"rows {call.position} to {_last(call)}"
    if not all_finite(output):
        raise BadOutput(
            f"blocks {call.span} gave values that are not finite from {rows}: broken weights, or "
            f"values too large for {facts.encodings[0]} (serve in bfloat16)"
        )
    if not call.rows_wanted:
        return b""
    try:
        return rows_to_bytes(output[call.count - call.rows_wanted :], call.output_encoding)
    except BadInput as error:
        raise BadOutput(f"what blocks {call.span} gave from {rows}: {error.detail}") from error


def _last(call: Call) -> int:
    return call.position + call.count - 1
