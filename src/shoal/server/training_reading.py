"""What training messages say, checked before memory is taken. Pure functions."""

from __future__ import annotations

from typing import cast

from shoal.base.adapters import ITEM_BYTES, AdapterConfig, AdapterEncoding, LoraShape
from shoal.base.backend import BackendFacts
from shoal.base.errors import AdapterBad, BadInput, MessageTooLarge, SessionLost
from shoal.base.spans import Span
from shoal.base.training import BlockTensors, TrainedSpec
from shoal.server.training_limits import TrainingLimits
from shoal.wire.tensors import row_bytes
from shoal.wire.training import Backward, Forward, PutTensors


def check_tensors(message: PutTensors, facts: BackendFacts, limits: TrainingLimits) -> None:
    """Refuse tensors that can't be.

    Raises:
        AdapterBad: options, blocks or sizes that don't fit together.
        MessageTooLarge: more than this server takes.
    """
    expected = spec_of(message).num_bytes(facts.hidden_size)
    if message.num_bytes != expected:
        raise AdapterBad(f"{message.num_bytes} bytes announced for tensors of {expected}")
    if expected > limits.tensor_bytes_per_client:
        raise MessageTooLarge(
            f"tensors of {expected} bytes; this server takes {limits.tensor_bytes_per_client}: "
            "train fewer layers or a lower rank"
        )


def check_pass(message: Forward | Backward, facts: BackendFacts, limits: TrainingLimits) -> None:
    """Refuse a pass that can't be run here.

    Raises:
        BadInput: lengths, sizes or an encoding that can't be.
        MessageTooLarge: more rows than this server takes at once.
        SessionLost: blocks that are not served here (any more).
    """
    micro, rows = message.micro, sum(message.micro.lengths)
    if rows > limits.rows_per_pass_max:
        raise MessageTooLarge(
            f"{rows} rows at once; this server takes {limits.rows_per_pass_max} "
            "(see --training-rows): send smaller micro-batches, or shorter sequences"
        )
    if max(micro.lengths) > facts.session_tokens_max:
        raise BadInput(f"the model ends at {facts.session_tokens_max} positions")
    if micro.start >= micro.end or not facts.span.covers(Span(micro.start, micro.end)):
        what = f"blocks [{micro.start},{micro.end})"
        raise SessionLost(f"{what} are not served here (we have {facts.span})")
    if micro.encoding not in facts.encodings:
        raise BadInput(f"encoding {micro.encoding!r} is not served here")
    parts = 2 if isinstance(message, Backward) and message.has_rows else 1
    expected = parts * rows * row_bytes(micro.encoding, facts.hidden_size)
    if message.num_bytes != expected:
        raise BadInput(f"{rows} rows are {expected} bytes, {message.num_bytes} are announced")


def spec_of(message: PutTensors) -> TrainedSpec:
    """What the message announces.

    Raises:
        AdapterBad: what it says can't be.
    """
    if message.encoding not in ITEM_BYTES:
        raise AdapterBad(f"tensors in {message.encoding!r:.40}: write {', '.join(ITEM_BYTES)}")
    names = sorted({layer.target for block in message.blocks for layer in block.layers})
    config = None
    if names:
        config = AdapterConfig(
            rank=message.rank,
            alpha=message.alpha,
            targets=tuple(names),
            dropout=message.dropout,
            use_rslora=message.use_rslora,
        )
    elif message.rank:
        raise AdapterBad(f"rank {message.rank} without layers")
    blocks = tuple(
        BlockTensors(
            index=block.index,
            prompt_tokens=block.prompt_tokens,
            lora=tuple(
                LoraShape(target=layer.target, inputs=layer.inputs, outputs=layer.outputs)
                for layer in block.layers
            ),
        )
        for block in message.blocks
    )
    indices = [block.index for block in blocks]
    if indices != sorted(set(indices)):
        raise AdapterBad("blocks must rise")
    for block in blocks:
        targets = [one.target for one in block.lora]
        if targets != sorted(set(targets)) or not (targets or block.prompt_tokens):
            raise AdapterBad(f"block {block.index}: layers must be sorted, or there is nothing")
    encoding = cast(AdapterEncoding, message.encoding)
    return TrainedSpec(config=config, encoding=encoding, blocks=blocks)
