"""A chat's session goes on from turn to turn, and answers as a new one would."""

import asyncio
import hashlib
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shoal.base.errors import ConfigError, PeerError
from shoal.base.spans import Span
from shoal.cli.chatting import Conversation, Listener, behind, common_prefix, template_renderer
from shoal.cli.speakers import ChainSpeaker
from shoal.cli.transcript import Transcript
from shoal.hf.sampling import Sampler
from shoal.lab.clock import run_virtual
from shoal.lab.network import LinkConditions, SimulatedNetwork
from shoal.lab.script import toy_embedding
from shoal.lab.swarm import ServerSpec, SimulatedSwarm
from shoal.lab.toy_blocks import HIDDEN_SIZE
from shoal.wire.tensors import row_bytes
from tests.simulation.scene import until

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content == 'forbidden' %}{{ raise_exception('not that') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROW_BYTES = row_bytes("float32", HIDDEN_SIZE)
NUM_LETTERS = 26


def byte_tokenizer():
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE)
    fast.add_special_tokens({"eos_token": "<end>"})
    return fast


TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id
LETTERS = TOKENIZER("abcdefghijklmnopqrstuvwxyz").input_ids


class ToyHead:
    """A letter by the hash of the last row; about every twentieth is the end."""

    def embed(self, token_ids, encoding, position=0):
        return b"".join(toy_embedding(token) for token in token_ids)

    def logits(self, rows, encoding):
        data = bytes(rows)
        scores = torch.zeros(len(data) // ROW_BYTES, END + 1)
        for index in range(len(scores)):
            row = data[index * ROW_BYTES : (index + 1) * ROW_BYTES]
            choice = int.from_bytes(hashlib.sha256(row).digest()[:4], "little") % 27
            scores[index, END if choice == NUM_LETTERS else LETTERS[choice]] = 1.0
        return scores


class Chat:
    """A person who talks, and what they were told."""

    def __init__(self, client, ids_before=()):
        self.client = client
        self.ids_before = ids_before
        self.transcript = Transcript()
        self.conversation = self.fresh()
        self.repairs = []
        self.heard = []

    def fresh(self):
        return Conversation(
            ChainSpeaker(self.client, ToyHead(), "float32"),
            TOKENIZER,
            behind(self.ids_before, template_renderer(TOKENIZER, None)),
            {END},
        )

    async def say(self, text, *, limit=30, conversation=None):
        listener = Listener(text=self.heard.append, repaired=self.repairs.append)
        messages = self.transcript.messages(text)
        return await (conversation or self.conversation).answer(
            messages, Sampler(), limit, listener
        )

    async def expected(self, text, *, limit=30):
        """What a session that knows nothing yet answers."""
        fresh = self.fresh()
        reply = await self.say(text, limit=limit, conversation=fresh)
        assert reply.kept_tokens == 0
        fresh.close()
        return reply.text

    async def turn(self, text, *, limit=30):
        expected = await self.expected(text, limit=limit)
        reply = await self.say(text, limit=limit)
        assert reply.text == expected
        self.transcript = self.transcript.answered(text, reply.text)
        return reply


def simulated(story, *, spare=False, patience_s=120.0):
    async def run():
        rng = random.Random(3)
        network = SimulatedNetwork(rng, default=LinkConditions(delay_s=0.005))
        specs = [ServerSpec(name="a", span=Span(0, 2)), ServerSpec(name="b", span=Span(2, 4))]
        if spare:
            specs.append(ServerSpec(name="spare", span=Span(2, 4), iteration_s=0.05))
        async with SimulatedSwarm(specs, network, rng, num_blocks=4) as swarm:
            await story(Chat(await swarm.open_client(patience_s=patience_s)), swarm)

    run_virtual(run, timeout_s=1000.0)


def test_a_learned_prompt_stands_before_every_turn():
    async def story(chat, swarm):
        behind_prompt = Chat(chat.client, ids_before=(END + 1, END + 2))
        first = await behind_prompt.turn("hello")
        assert first.text != (await chat.turn("hello")).text
        assert first.prompt_tokens == 2 + len(TOKENIZER("<user>hello</><assistant>").input_ids)
        second = await behind_prompt.turn("and again")
        assert second.kept_tokens >= first.prompt_tokens, "it was sent once"

    simulated(story)


def test_a_turn_sends_only_what_is_new():
    async def story(chat, swarm):
        first = await chat.turn("hello")
        assert first.kept_tokens == 0
        second = await chat.turn("and then?")
        # All of the first turn but its last token, which nobody had to be sent.
        kept = first.prompt_tokens + first.num_tokens - 1
        assert second.kept_tokens == kept
        assert second.prompt_tokens > kept
        session = chat.conversation.session
        await chat.turn("go on")
        assert chat.conversation.session is session
        assert session.rev == 0

    simulated(story)


def test_any_edit_of_the_conversation_answers_as_if_it_were_new():
    async def story(chat, swarm):
        rng = random.Random(5)
        for _ in range(25):
            deed = rng.choice(["say", "say", "undo", "system", "reset", "retry"])
            turns = chat.transcript.turns
            if deed == "undo" and turns:
                chat.transcript = chat.transcript.without_last()
            elif deed == "system":
                system = rng.choice([None, "be kind", "be brief"])
                chat.transcript = Transcript(system=system, turns=turns)
            elif deed == "reset":
                chat.transcript = Transcript(system=chat.transcript.system)
            elif deed == "retry" and turns:
                chat.transcript = chat.transcript.without_last()
                await chat.turn(turns[-1].user, limit=rng.randint(1, 20))
            await chat.turn(rng.choice(["hi", "why?", "tell me more"]), limit=rng.randint(1, 20))

    simulated(story)


@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.02, 0.05, 0.1, 0.15])
def test_a_stopped_answer_leaves_a_session_that_goes_on(after_s):
    async def story(chat, swarm):
        await chat.turn("hello")
        for limit in (40, 1000):
            answering = asyncio.ensure_future(chat.say("once more", limit=limit))
            await asyncio.sleep(after_s)
            chat.conversation.stop()
            chat.conversation.stop()
            reply = await answering
            if reply.is_stopped:
                assert not reply.is_cut
                chat.transcript = chat.transcript.answered("once more", reply.text)
        chat.conversation.stop()
        reply = await chat.turn("and now?")
        assert not reply.is_stopped

    simulated(story)


def test_a_stop_before_the_session_is_open():
    async def story(chat, swarm):
        answering = asyncio.ensure_future(chat.say("hello"))
        await asyncio.sleep(0)
        chat.conversation.stop()
        reply = await answering
        assert (reply.text, reply.is_stopped) == ("", True)
        assert chat.conversation.session is None
        await chat.turn("hello")

    simulated(story)


def test_somebody_elses_cancellation_is_not_swallowed():
    async def story(chat, swarm):
        answering = asyncio.ensure_future(chat.say("hello", limit=1000))
        await asyncio.sleep(0.05)
        answering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answering

    simulated(story)


def test_a_repair_is_told_and_the_answer_goes_on():
    async def story(chat, swarm):
        expected = await chat.expected("hello")
        answering = asyncio.ensure_future(chat.say("hello"))
        await until(lambda: len(chat.heard) >= len(expected) + 2)
        await swarm.servers[1].crash()
        reply = await answering
        assert reply.text == expected
        assert [one.lost for one in chat.repairs] == [(swarm.servers[1].peer,)]
        assert [one.replacement for one in chat.repairs] == [(swarm.servers[2].peer,)]
        chat.transcript = chat.transcript.answered("hello", reply.text)
        reply = await chat.turn("still there?")
        assert reply.kept_tokens > 0
        assert len(chat.repairs) == 1

    simulated(story, spare=True)


def test_after_a_failure_the_next_answer_begins_anew():
    async def story(chat, swarm):
        await chat.turn("hello")
        await swarm.servers[1].crash()
        with pytest.raises(PeerError):
            await chat.say("anybody?")
        assert chat.conversation.session is None
        await swarm.servers[1].start()
        reply = await chat.turn("anybody?")
        assert reply.kept_tokens == 0

    simulated(story, patience_s=2.0)


def test_what_the_template_refuses_is_your_mistake():
    async def story(chat, swarm):
        await chat.turn("hello")
        with pytest.raises(ConfigError, match="refuses the conversation: not that"):
            await chat.say("forbidden")
        reply = await chat.turn("hi")
        assert reply.kept_tokens > 0

    simulated(story)


def test_a_model_without_a_template_says_so():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="--template FILE"):
        template_renderer(tokenizer, None)
    ids = template_renderer(tokenizer, "{{ messages[0].content }}!")(
        [{"role": "user", "content": "hi"}]
    )
    assert tokenizer.decode(ids) == "hi!"


@pytest.mark.parametrize(
    ("held", "ids", "length"),
    [
        ([], [1], 0),
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 3], [1, 2, 3], 2),
        ([1, 2, 3], [1, 9, 3], 1),
        ([1, 2, 3], [1], 0),
        ([9], [1, 2], 0),
    ],
)
def test_common_prefix_leaves_one_token_to_send(held, ids, length):
    assert common_prefix(held, ids) == length
