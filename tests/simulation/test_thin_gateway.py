"""A gateway without weights: the same answers while head servers die, and only what is new sent."""

import json

from shoal.gateway.answering import Words
from shoal.gateway.engine import Engine, Job, Served
from shoal.gateway.grammars import Grammars
from shoal.gateway.kept import KeptConfig, KeptSessions
from shoal.gateway.meter import Meter
from shoal.gateway.requests import Settings
from shoal.gateway.sequences import ThinSequence
from shoal.hf.sampling import Sampler
from shoal.hf.score_rules import ScoreOptions
from shoal.lab.toy_head import VOCABULARY
from tests.gateway_cases import END, ascii_tokenizer
from tests.simulation.scene import scene

PROMPT = tuple(range(30, 70))
COLOURS = ["red", "blue", "green"]
SCHEMA = json.dumps(
    {
        "type": "array",
        "items": {"enum": COLOURS},
        "minItems": 3,
        "maxItems": 5,
        "x-guidance": {"whitespace_flexible": False},
    }
)
SERVERS = "a 0:2, b 2:4, h 0:4, g 0:4"
HEADS = {"h": "toy", "g": "toy"}


class Reader:
    """Takes an answer; crashes the head that has it after some pieces."""

    def __init__(self, gate, dies_after=None):
        self.gate = gate
        self.texts = {}
        self.tokens = {}
        self._left = dies_after

    async def begun(self, begun):
        self.kept = begun.kept_tokens

    async def piece(self, piece):
        at = piece.choice
        self.texts[at] = self.texts.get(at, "") + piece.text
        self.tokens[at] = (*self.tokens.get(at, ()), *(one.id for one in piece.tokens))
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                await self.gate.crash()


class Gate:
    """An engine over a thin client."""

    def __init__(self, it, client):
        tokenizer = ascii_tokenizer()
        words = Words(tokenizer=tokenizer, end_ids={END}, vocab_size=VOCABULARY)

        async def open_thin(chain):
            return ThinSequence(await client.open_session())

        self.it, self.client, self.repairs, self.used = it, client, [], 0
        self.kept = KeptSessions(KeptConfig(tokens_max=4000))
        grammars = Grammars(tokenizer, END + 1, {END})
        grammars._kept[SCHEMA] = grammars._build(SCHEMA, "")  # on virtual time no thread runs
        self.engine = Engine(
            Served(open_sequence=open_thin, words=words, context_tokens=1000),
            self.kept,
            grammars,
            Meter(self.repairs.append),
        )

    async def crash(self):
        (head,) = {session.head for session in self.client._sessions.values()}
        await self.it.servers[self.it.name(head)].crash()

    def use(self, count):
        self.used += count

    async def answer(self, prompt=PROMPT, *, dies_after=None, **fields):
        settings = Settings(**{
            "sampler": lambda choice: Sampler(temperature=0.9, seed=3 + choice),
            "options": ScoreOptions(presence=0.5), "stops": (), "max_tokens": 24,
            "num_choices": 1, "num_best": 2, "schema": None, "ignores_end": True, **fields,
        })  # fmt: skip
        reader = Reader(self, dies_after)
        job = Job(owner="x", prompt_ids=tuple(prompt), settings=settings, on_used=self.use)
        return reader, await self.engine.answer(job, reader)


def gated(story):
    @scene(SERVERS, heads=HEADS)
    async def test(it):
        client = await it.swarm.open_thin_client()
        await story(Gate(it, client))
        await client.close()

    return test


@gated
async def test_choices_go_on_at_another_head(gate):
    whole, done = await gate.answer(num_choices=3)
    assert len({*whole.tokens.values()}) == 3
    assert done.answer_tokens == 72
    assert gate.used == len(PROMPT) + 72
    gate.kept.clear()
    again, _ = await gate.answer(num_choices=3, dies_after=2)
    assert again.tokens == whole.tokens
    assert gate.repairs


@gated
async def test_a_schema_is_followed_at_another_head(gate):
    whole, _ = await gate.answer(schema=SCHEMA, max_tokens=400, ignores_end=False)
    assert set(json.loads(whole.texts[0])) <= set(COLOURS)
    gate.kept.clear()
    again, done = await gate.answer(schema=SCHEMA, max_tokens=400, dies_after=8, ignores_end=False)
    assert again.texts == whole.texts
    assert len(done.recoveries) == 1


@gated
async def test_the_next_turn_sends_what_is_new(gate):
    first, _ = await gate.answer()
    ids = (*PROMPT, *first.tokens[0])
    second, done = await gate.answer((*ids, 5, 6))
    assert done.kept_tokens == len(ids) - 1
    gate.kept.clear()
    alone, done = await gate.answer((*ids, 5, 6))
    assert done.kept_tokens == 0
    assert len(alone.tokens[0]) == len(second.tokens[0]) == 24
    assert gate.client.num_sessions == 1
    gate.kept.clear()
    assert gate.client.num_sessions == 0
