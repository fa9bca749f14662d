"""Hidden states, blocks as a module, sessions, files and async code over a chain."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from shoal.base.errors import (
    BadInput,
    ConfigError,
    ModelUnsupported,
    NoRouteError,
    SessionClosed,
)
from shoal.hf import (
    AutoDistributedModelForCausalLM,
    DistributedModelForCausalLM,
    LocalSwarm,
    Session,
)
from tests.golden.hf_cases import Collected, Pair, padded, pair, prompts
from tests.models import NUM_BLOCKS, VOCABULARY, save_safetensors, tiny_source

GREEDY: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
CLOSE: dict[str, float] = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def llama() -> Iterator[Pair]:
    with pair("llama") as made:
        yield made
        assert made.num_sessions == 0, "sessions were left open"


# --- hidden states and blocks ----------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "granite"])
def test_hidden_states_at_every_border_are_those_of_transformers(family: str) -> None:
    with pair(family) as both:
        both.ours = AutoDistributedModelForCausalLM.from_pretrained(
            tiny_source(family),
            join=both.swarm,
            borders=range(both.reference.config.num_hidden_layers + 1),
        )
        ids, mask = padded([4, 9])
        with both.ours as model:
            mine = model(ids, attention_mask=mask, output_hidden_states=True)
            theirs = both.reference(
                ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                output_hidden_states=True,
            )
            assert len(mine.hidden_states) == len(theirs.hidden_states)
            for ours, other in zip(mine.hidden_states, theirs.hidden_states, strict=True):
                torch.testing.assert_close(ours[0, 5:], other[0, 5:], **CLOSE)
                torch.testing.assert_close(ours[1], other[1], **CLOSE)
                assert not ours[0, :5].any()
            torch.testing.assert_close(mine.logits[:, -1], theirs.logits[:, -1], **CLOSE)


def test_borders_are_those_between_servers_unless_given(llama: Pair) -> None:
    assert llama.ours.hidden_borders() == (0, 2, 4, NUM_BLOCKS)
    states = llama.ours(prompts(2, 5), output_hidden_states=True).hidden_states
    theirs = llama.reference(prompts(2, 5), output_hidden_states=True).hidden_states
    for ours, border in zip(states, (0, 2, 4, NUM_BLOCKS), strict=True):
        torch.testing.assert_close(ours, theirs[border], **CLOSE)


def test_hidden_states_of_a_single_server() -> None:
    with pair("llama", borders=(0, NUM_BLOCKS)) as both:
        options = GREEDY | {"return_dict_in_generate": True, "output_hidden_states": True}
        mine = both.ours.generate(prompts(2, 5), **options)
        theirs = both.reference.generate(prompts(2, 5), **options)
        assert torch.equal(mine.sequences, theirs.sequences)
        for ours, other in zip(mine.hidden_states, theirs.hidden_states, strict=True):
            torch.testing.assert_close(ours[0], other[0], **CLOSE)
            torch.testing.assert_close(ours[1], other[-1], **CLOSE)


def test_generate_returns_hidden_states(llama: Pair) -> None:
    options = GREEDY | {"return_dict_in_generate": True, "output_hidden_states": True}
    mine = llama.ours.generate(prompts(1, 5), **options)
    theirs = llama.reference.generate(prompts(1, 5), **options)
    assert torch.equal(mine.sequences, theirs.sequences)
    for ours, other in zip(mine.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(ours[1], other[2], **CLOSE)
    cache = llama.ours(prompts(1, 5)).past_key_values
    with pytest.raises(BadInput, match="begun without output_hidden_states"):
        llama.ours(prompts(1, 1), past_key_values=cache, output_hidden_states=True)


def test_blocks_are_a_module_that_can_be_sliced(llama: Pair) -> None:
    states = llama.reference(prompts(2, 5), output_hidden_states=True).hidden_states
    blocks = llama.ours.blocks
    assert len(blocks) == NUM_BLOCKS
    for chosen, start, end in (
        (blocks[1:5], 1, 5),
        (blocks[2], 2, 3),
        (blocks[:-2], 0, NUM_BLOCKS - 2),
        (blocks[1:][1:3], 2, 4),
    ):
        mine = chosen(states[start].detach())
        assert mine.shape == states[end].shape
        torch.testing.assert_close(mine, states[end], **CLOSE)
    whole = torch.nn.Sequential(llama.reference.model.embed_tokens, blocks)
    with torch.no_grad():
        logits = llama.ours.logits(whole(prompts(1, 5)))
    torch.testing.assert_close(logits, llama.reference(prompts(1, 5)).logits, **CLOSE)


@pytest.mark.parametrize("index", [slice(3, 3), slice(0, 4, 2), slice(None, None, -1)])
def test_blocks_that_are_no_span_are_refused(llama: Pair, index: slice) -> None:
    with pytest.raises(BadInput, match="in order and without gaps"):
        llama.ours.blocks[index]
    with pytest.raises(IndexError):
        llama.ours.blocks[NUM_BLOCKS]


def test_sessions_refuse_gradients_and_weights_are_frozen(llama: Pair) -> None:
    states = torch.zeros(1, 2, 48, requires_grad=True)
    with llama.ours.session() as session, pytest.raises(BadInput, match="gradients don't flow"):
        session.step(states)
    assert not any(weight.requires_grad for weight in llama.ours.parameters())


@pytest.mark.parametrize("shape", [(48,), (2, 47), (1, 0, 48), (1, 1, 2, 48)])
def test_hidden_states_of_a_wrong_shape_are_refused(llama: Pair, shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="hidden states of shape"):
        llama.ours.blocks(torch.zeros(shape))
    with (
        llama.ours.session(1, 3) as session,
        pytest.raises(BadInput, match="hidden states of shape"),
    ):
        session.step(torch.zeros(shape))


def test_hidden_states_that_are_not_finite_are_refused(llama: Pair) -> None:
    with pytest.raises(BadInput), llama.ours.session(1, 3) as session:
        session.step(torch.full((2, 48), float("nan")))


def test_a_loss_without_gradients(llama: Pair) -> None:
    ids = prompts(2, 8)
    mine, theirs = (model(ids, labels=ids).loss for model in (llama.ours, llama.reference))
    torch.testing.assert_close(mine, theirs, **CLOSE)


# --- sessions ----------------------------------------------------------------------------------


def test_a_loop_of_ones_own(llama: Pair) -> None:
    prompt = prompts(1, 7)
    expected = llama.reference.generate(prompt, **GREEDY)[0, 7:].tolist()
    with llama.ours.session() as session:
        hidden = session.step_ids(prompt, last=True)
        tokens = [int(llama.ours.logits(hidden)[-1].argmax())]
        while len(tokens) < 16:
            hidden = session.step_ids(tokens[-1:])
            tokens.append(int(llama.ours.logits(hidden)[-1].argmax()))
        assert tokens == expected
        assert session.token_ids == prompt[0].tolist() + tokens[:-1]
        assert session.length == 22
        assert [stage.span.end for stage in session.chain] == [2, 4, NUM_BLOCKS]
    with pytest.raises((BadInput, SessionClosed)):
        session.step_ids([1])


def test_any_span_any_hidden_states(llama: Pair) -> None:
    states = llama.reference(prompts(1, 9), output_hidden_states=True).hidden_states
    with llama.ours.session(2, 6) as session:
        first = session.step(states[2][:, :5].detach())
        rest = [session.step(states[2][0, at : at + 1].detach()) for at in range(5, 9)]
        assert first.shape == (1, 5, 48)
        torch.testing.assert_close(torch.cat([first[0], *rest]), states[6][0], **CLOSE)
        session.truncate(3)
        with session.fork() as other:
            for each in (session, other):
                again = each.step(states[2][:, 3:].detach(), last=True)
                torch.testing.assert_close(again[0], states[6][0, -1:], **CLOSE)
        with pytest.raises(BadInput, match="begins at 2"):
            session.step_ids([1])
        with pytest.raises(BadInput, match="can't cut 9 columns to 12"):
            session.truncate(12)


def test_generate_goes_on_with_a_session(llama: Pair) -> None:
    prompt = prompts(1, 7)
    with llama.ours.session() as session:
        session.step_ids(prompt[:, :-1])
        text = llama.ours.generate(prompt, past_key_values=session.past_key_values, **GREEDY)
        assert session.length == text.shape[1] - 1
    assert torch.equal(text, llama.reference.generate(prompt, **GREEDY))


@pytest.mark.parametrize("span", [(3, 3), (-1, 2), (0, 99)])
def test_spans_that_are_none_are_refused(llama: Pair, span: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="borders"):
        llama.ours.session(*span)


# --- files -------------------------------------------------------------------------------------


def test_a_saved_session_goes_on_elsewhere(llama: Pair, tmp_path: Path) -> None:
    sampled = {"do_sample": True, "temperature": 0.8, "max_new_tokens": 8}
    path = tmp_path / "talk.safetensors"
    torch.manual_seed(3)
    with llama.ours.session() as session:
        session.generation_config = GenerationConfig(**sampled)
        cache = session.past_key_values
        first = llama.ours.generate(prompts(1, 7), past_key_values=cache, **sampled)
        session.save(path)
        expected = llama.ours.generate(first, past_key_values=cache, **sampled)
        chunks = [chunk.count for chunk in session._row.chunks]
    assert path.stat().st_mode & 0o077 == 0
    torch.manual_seed(99)
    with (
        pair("llama", borders=(0, 1, 5, NUM_BLOCKS)) as other,
        other.ours.load_session(path) as loaded,
    ):
        assert loaded.length == first.shape[1] - 1
        assert loaded.token_ids == first[0, :-1].tolist()
        assert [chunk.count for chunk in loaded._row.chunks] == chunks[: 1 + 7]
        text = other.ours.generate(
            first,
            past_key_values=loaded.past_key_values,
            generation_config=loaded.generation_config,
        )
    assert torch.equal(text, expected)


def test_a_session_of_given_rows_is_saved_too(llama: Pair, tmp_path: Path) -> None:
    states = llama.reference(prompts(1, 9), output_hidden_states=True).hidden_states[2].detach()
    with llama.ours.session(2, 6) as session:
        session.step(states[:, :6])
        session.truncate(5)
        session.save(tmp_path / "rows")
        expected = session.step(states[:, 5:])
    with llama.ours.load_session(tmp_path / "rows") as loaded:
        assert loaded.span == session.span
        torch.testing.assert_close(loaded.step(states[:, 5:]), expected, **CLOSE)


def test_another_models_session_is_refused(llama: Pair, tmp_path: Path) -> None:
    with llama.ours.session() as session:
        session.step_ids([1, 2, 3])
        session.save(tmp_path / "talk")
    before = llama.num_sessions
    with (
        pair("llama_tied") as other,
        pytest.raises(ConfigError, match="load it with the model it belongs to"),
    ):
        other.ours.load_session(tmp_path / "talk")
    with pytest.raises(ConfigError, match="can't read"):
        llama.ours.load_session(tmp_path / "missing")
    with pytest.raises(ConfigError, match="can't write"):
        Session(llama.ours, llama.ours(prompts(1, 2)).past_key_values).save(tmp_path / "no" / "x")
    assert llama.num_sessions == before


# --- async ---------------------------------------------------------------------------------------


def test_eight_conversations_at_once(llama: Pair) -> None:
    lines = [prompts(1, 3 + at, seed=at) for at in range(8)]

    async def talk() -> list[torch.Tensor]:
        calls = [llama.ours.generate_async(line, **GREEDY) for line in lines]
        return await asyncio.gather(*calls)

    for line, text in zip(lines, asyncio.run(talk()), strict=True):
        llama.compare(text, llama.reference.generate(line, **GREEDY), begin=line.shape[1])


def test_a_cancelled_conversation_stops(llama: Pair) -> None:
    class Telling(Collected):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            loop.call_soon_threadsafe(begun.set)

    async def give_up() -> None:
        nonlocal loop, begun
        loop, begun = asyncio.get_running_loop(), asyncio.Event()
        call = llama.ours.generate_async(prompts(1, 3), max_new_tokens=400, streamer=streamer)
        work = asyncio.create_task(call)
        await begun.wait()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    loop: asyncio.AbstractEventLoop
    begun: asyncio.Event
    streamer = Telling()

    asyncio.run(give_up())
    assert len(streamer.tokens) < 200
    assert llama.num_sessions == 0


def test_a_session_in_async_code(llama: Pair) -> None:
    prompt = prompts(1, 7)

    async def loop() -> list[int]:
        async with await llama.ours.session_async() as session:
            hidden = await session.step_ids_async(prompt, last=True)
            tokens = [int(llama.ours.logits(hidden)[-1].argmax())]
            async with await session.fork_async() as other:
                while len(tokens) < 16:
                    hidden = await other.step_ids_async(tokens[-1:])
                    tokens.append(int(llama.ours.logits(hidden)[-1].argmax()))
            return tokens

    assert asyncio.run(loop()) == llama.reference.generate(prompt, **GREEDY)[0, 7:].tolist()


# --- opening and closing -------------------------------------------------------------------------


def test_opened_from_a_directory(tmp_path: Path) -> None:
    reference = save_safetensors(tmp_path, "qwen3")
    GenerationConfig(
        max_new_tokens=5, eos_token_id=[1, 2], cache_implementation="hybrid"
    ).save_pretrained(tmp_path)
    with LocalSwarm(tmp_path, cache_dir=tmp_path / "cache") as swarm:
        model = AutoDistributedModelForCausalLM.from_pretrained(
            str(tmp_path), join=swarm, cache_dir=tmp_path / "cache"
        )
        assert model.generation_config.eos_token_id == [1, 2]
        assert model.generation_config.max_new_tokens == 5
        assert model.generation_config.cache_implementation is None
        text = model.generate(prompts(1, 4), do_sample=False, pad_token_id=0)
        assert torch.equal(
            text,
            reference.generate(
                prompts(1, 4), do_sample=False, pad_token_id=0, eos_token_id=[1, 2],
                max_new_tokens=5,
            ),
        )  # fmt: skip
        assert model.vocab_size == VOCABULARY
        model.close()
        model.close()
        with pytest.raises(SessionClosed, match="the model was closed"):
            model.generate(prompts(1, 4))


def test_a_model_that_is_dropped_leaves_the_swarm(llama: Pair) -> None:
    model = AutoDistributedModelForCausalLM.from_pretrained(tiny_source(), join=llama.swarm)
    client = model.connection.visit.client
    output = model(prompts(1, 3))
    assert client.num_sessions == 1
    del model, output
    gc.collect()
    llama.ours.connection.loop.run(asyncio.sleep(0))
    assert client.num_sessions == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"join": []}, "no server named"),
        ({"join": "nonsense"}, "nonsense"),
        ({"dtype": "int4"}, "dtype 'int4'"),
        ({"borders": [0, 9]}, "from 0 to 7"),
        ({"swarm": "a", "invite": "b", "join": ["tcp://x"]}, "give one"),
    ],
)
def test_wrong_arguments(llama: Pair, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoDistributedModelForCausalLM.from_pretrained(
            tiny_source(), **({"join": llama.swarm} | options)
        )


def test_the_model_class_says_how_to_open_one() -> None:
    for call in (DistributedModelForCausalLM.from_pretrained, AutoDistributedModelForCausalLM):
        with pytest.raises(ConfigError, match=r"AutoDistributedModelForCausalLM.from_pretrained\("):
            call()


def test_a_swarm_of_another_model_or_without_some_blocks(llama: Pair) -> None:
    with pytest.raises(ConfigError, match="the swarm serves model"):
        AutoDistributedModelForCausalLM.from_pretrained(tiny_source("qwen2"), join=llama.swarm)
    with (
        LocalSwarm(tiny_source(), spans=[(0, 2), (4, NUM_BLOCKS)]) as partial,
        pytest.raises(NoRouteError, match=r"no server has blocks \[2,4\)"),
    ):
        AutoDistributedModelForCausalLM.from_pretrained(tiny_source(), join=partial)


def test_what_a_model_without_weights_cannot_do(llama: Pair, tmp_path: Path) -> None:
    for call in (llama.ours.save_pretrained, llama.ours.push_to_hub, llama.ours.generate_batch):
        with pytest.raises(ModelUnsupported):
            call(tmp_path)


def test_bfloat16_and_compressed_links() -> None:
    source = tiny_source()
    with LocalSwarm(source, dtype="bfloat16") as swarm:
        for compress in (False, True):
            with AutoDistributedModelForCausalLM.from_pretrained(
                source, join=swarm, compress=compress
            ) as model:
                assert model.dtype == torch.bfloat16
                text = model.generate(prompts(2, 6), **GREEDY, num_beams=2)
                assert text.shape == (2, 22)
