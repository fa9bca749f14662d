"""What `shoal ring run` does: join, measure, send the samples round, watch the nodes, report."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shoal.base.errors import BadInput, NoRouteError, ShoalError
from shoal.base.ids import PeerId
from shoal.cli.answering import as_dict, check_model, common_encoding, open_swarm_client
from shoal.cli.joining import SwarmChoice, Visitor, visit
from shoal.cli.models import OpenModel
from shoal.cli.ring_run_show import NodeLine, Picture, RingTable
from shoal.cli.ring_run_text import check_writable, draw_tokens, require_matplotlib, write_csv
from shoal.cli.waiting import WaitingLine, with_hint
from shoal.client.ring import ask_ring
from shoal.hf.detokenize import Detokenizer
from shoal.hf.generation import Answer, Token
from shoal.hf.head import load_head
from shoal.hf.head_batch import HeadBatch, find_head_tiles
from shoal.hf.ring import Ring, RingChoice, RingModel, RingReader, RingSample, open_ring
from shoal.hf.sampling import Sampler
from shoal.net.channel import PURPOSE_RING, Channel, open_channel
from shoal.plan.slots import Slots
from shoal.wire.ring import RingNode, RingState

LOOK_S: Final = 1.0
"""Nodes report to the starter as often."""

SPEED_S: Final = 5.0
"""Tokens of so many last seconds make the speed that is shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RingRunSettings:
    """What `shoal ring run` was asked to do, checked."""

    swarm: SwarmChoice
    prompts: tuple[str, ...]
    """One for each sample."""
    max_new_tokens: int
    samplers: tuple[Sampler, ...]
    choice: RingChoice
    dtype: str | None
    patience_s: float
    csv: Path | None = None
    plot: Path | None = None
    is_json: bool = False


async def run_ring(settings: RingRunSettings, model: OpenModel) -> bool:
    """Run all samples; texts go to stdout, the rest to stderr. Returns whether all succeeded.

    Raises:
        ConfigError: another model than the ring's, or samples that don't fit.
        NoRouteError, PeerError, SessionError: the ring could do none of them.
    """
    if settings.plot is not None:
        require_matplotlib()
    check_writable(settings.csv, settings.plot)
    line = WaitingLine()
    async with visit(settings.swarm) as visitor:
        snapshot = visitor.directory.snapshot()
        check_model(snapshot, model)
        encoding = settings.dtype or common_encoding(snapshot, model.name)
        head = await asyncio.to_thread(load_head, model.source, dtype=encoding)
        parts = RingModel(
            head=head,
            batch=HeadBatch(head, await asyncio.to_thread(find_head_tiles, head)),
            encoding=encoding,
            eos_ids=model.source.eos_token_ids,
        )
        tokenizer = model.source.tokenizer()
        samples = _samples(settings, tokenizer)
        async with open_swarm_client(visitor, model, settings.patience_s, line.told) as client:
            try:
                with RingTable(is_quiet=settings.is_json) as table:
                    table.say("measuring the ring")
                    ring = await open_ring(client, parts, settings.choice, samples)
                    return await _Run(settings, tokenizer, samples).run(ring, visitor, table)
            except NoRouteError as error:
                raise with_hint(error, model.given) from error


def _samples(settings: RingRunSettings, tokenizer: Any) -> list[RingSample]:
    known: dict[str, tuple[int, ...]] = {}
    for prompt in settings.prompts:
        if prompt not in known:
            known[prompt] = tuple(int(token) for token in tokenizer(prompt)["input_ids"])
            if not known[prompt]:
                raise BadInput(f"the prompt {prompt!r} has no tokens; give another one")
    return [
        RingSample(
            prompt_ids=known[prompt], max_new_tokens=settings.max_new_tokens, sampler=sampler
        )
        for prompt, sampler in zip(settings.prompts, settings.samplers, strict=True)
    ]


class _Run:
    """Samples under way: what came when, what is shown."""

    def __init__(
        self, settings: RingRunSettings, tokenizer: Any, samples: Sequence[RingSample]
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._samples = samples
        self._answers: dict[int, dict[str, Any]] = {}
        self._clock = asyncio.get_running_loop().time
        self._started_s = 0.0
        self._at_s: list[float] = []
        self._nodes: list[NodeLine] = []
        self._ring: Ring | None = None
        self._watched: dict[PeerId, RingNode] = {}
        self._mark: int | None = None
        self._most_slots = Slots(count=1)
        self._most_decoding = 0

    async def run(self, ring: Ring, visitor: Visitor, table: RingTable) -> bool:
        """All of it; files are written for what there is, also when it is stopped.

        Returns whether all samples succeeded; those that failed are told at the end.
        """
        self._ring = ring
        watch = asyncio.ensure_future(self._watch(ring, visitor, table))
        self._started_s = self._clock()
        try:
            failed = await ring.run(self._samples, RingReader(token=self._came, answer=self._ended))
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            self._write_files()
        picture = self._picture(ring)
        for number, error in sorted(failed.items()):
            self._failed(number, error)
        if self._settings.is_json:
            print(json.dumps(self._whole(picture)), flush=True)
        else:
            print(picture.summary(), file=sys.stderr)
        return not failed

    def _came(self, number: int, token: Token) -> None:
        if self._ring is not None and self._ring.decoding >= self._most_decoding:
            self._most_decoding, self._most_slots = self._ring.decoding, self._ring.slots
        self._at_s.append(token.at_s - self._started_s)

    def _ended(self, number: int, answer: Answer) -> None:
        detokenizer = Detokenizer(self._tokenizer)
        text = "".join(map(detokenizer.push, answer.token_ids)) + detokenizer.finish()
        prompt = self._settings.prompts[number]
        self._answers[number] = {"prompt": prompt} | as_dict(text, answer)
        if not self._settings.is_json:
            print(f"--- sample {number + 1}, {len(answer.token_ids)} tokens", flush=True)
            print(prompt + text, flush=True)

    def _failed(self, number: int, error: ShoalError) -> None:
        text = error.detail or type(error).__name__
        print(f"error: sample {number + 1} failed: {text}", file=sys.stderr)
        self._answers[number] = {"prompt": self._settings.prompts[number], "error": text}

    # --- watching ----------------------------------------------------------------------

    async def _watch(self, ring: Ring, visitor: Visitor, table: RingTable) -> None:
        """Until cancelled: look at the nodes, put the times right, show."""
        channel = await self._dial(visitor)
        while True:
            if channel is not None:
                try:
                    self._look(ring, await ask_ring(channel))
                except ShoalError:
                    channel.close()
                    channel = await self._dial(visitor)
            table.show(self._picture(ring))
            await asyncio.sleep(LOOK_S)

    async def _dial(self, visitor: Visitor) -> Channel | None:
        """A stream to the starter; None: what was joined is no ring's starter."""
        for address in self._settings.swarm.joins:
            with suppress(ShoalError):
                return await open_channel(
                    visitor.transport, address, PURPOSE_RING, visitor.swarm_pass
                )
        return None

    def _look(self, ring: Ring, state: RingState) -> None:
        """Take over what nodes say; their passes count if no prompt was in them."""
        before, self._watched = self._watched, {PeerId(n.peer): n for n in state.nodes}
        mark_before, self._mark = self._mark, ring.prompts.mark()
        self._nodes = [NodeLine.of(node, before.get(PeerId(node.peer))) for node in state.nodes]
        if self._mark is None or self._mark != mark_before:
            return
        ring.pace.observe(
            {
                peer: (line.rows_per_pass, line.pass_s)
                for peer, line in zip(self._watched, self._nodes, strict=True)
            }
        )
        ring.choose_again()

    def _picture(self, ring: Ring) -> Picture:
        now_s = self._clock() - self._started_s
        since_s = max(0.0, now_s - SPEED_S)
        recent = sum(at_s >= since_s for at_s in self._at_s[-4096:])
        last_s = self._at_s[-1] if self._at_s else 0.0
        return Picture(
            nodes=tuple(self._nodes),
            tokens=len(self._at_s),
            ended=len(self._answers),
            samples=len(self._samples),
            decoding=ring.decoding,
            slots=ring.slots,
            most_slots=self._most_slots,
            tokens_per_s=recent / max(1e-9, min(now_s, SPEED_S)),
            mean_tokens_per_s=len(self._at_s) / last_s if last_s else 0.0,
            seconds=last_s,
        )

    # --- at the end --------------------------------------------------------------------

    def _write_files(self) -> None:
        if self._settings.csv is not None:
            write_csv(self._settings.csv, self._at_s)
        if self._settings.plot is not None:
            title = f"{len(self._samples)} samples, {max(1, len(self._nodes))} nodes"
            draw_tokens(self._settings.plot, self._at_s, title)

    def _whole(self, picture: Picture) -> dict[str, Any]:
        return {
            "samples": [self._answers[number] for number in sorted(self._answers)],
            "tokens": picture.tokens,
            "seconds": picture.seconds,
            "tokens_per_s": picture.mean_tokens_per_s,
            "slots": picture.most_slots.count,
            "rows": picture.most_slots.rows(max(1, self._most_decoding)),
            "nodes": [node.as_dict() for node in picture.nodes],
        }
