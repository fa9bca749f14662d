"""Scores of rows that came together: one call, and each row's bits as if it were alone."""

import asyncio

import pytest
import torch

from shoal.base.errors import BadInput
from shoal.hf.head import load_head
from shoal.hf.head_batch import HeadBatch, find_head_tiles
from shoal.model.rows import rows_to_bytes
from tests.models import tiny_source


def make_head(dtype):
    return load_head(tiny_source("llama"), dtype=dtype)


def make_rows(head, count):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn((count, head.hidden_size), generator=generator).to(head.dtype)
    encoding = str(head.dtype).removeprefix("torch.")
    return [rows_to_bytes(rows[index : index + 1], encoding) for index in range(count)], encoding


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_company_changes_no_bit(dtype):
    head = make_head(dtype)
    tiles = find_head_tiles(head)
    rows, encoding = make_rows(head, 40)

    async def story():
        together = HeadBatch(head, tiles)
        scores = await asyncio.gather(*(together.logits(row, encoding) for row in rows))
        alone = HeadBatch(head, tiles)
        for row, score in zip(rows, scores, strict=True):
            assert torch.equal(score, await alone.logits(row, encoding))
        assert together.num_rows == 40
        assert together.num_calls == (2 if tiles else 40)

    asyncio.run(story())


def test_nonsense_and_leaving_hurt_nobody_else():
    head = make_head("float32")
    rows, encoding = make_rows(head, 3)

    async def story():
        batch = HeadBatch(head, None)
        first = asyncio.ensure_future(batch.logits(rows[0], encoding))
        leaving = asyncio.ensure_future(batch.logits(rows[1], encoding))
        with pytest.raises(BadInput):
            await batch.logits(rows[2][:-1], encoding)
        leaving.cancel()
        assert (await first).shape == (head.vocab_size,)
        with pytest.raises(asyncio.CancelledError):
            await leaving

    asyncio.run(story())
