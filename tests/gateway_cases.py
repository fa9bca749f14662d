"""A gateway before a swarm in this process, on a real port of loopback."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shoal.client.client import Client
from shoal.client.config import ClientConfig
from shoal.gateway.listening import Listening, serving
from shoal.gateway.opening import Backing, GatewayConfig, open_gateway
from shoal.hf import LocalSwarm
from shoal.hf.connection import wall_clock
from shoal.hf.head import load_head
from shoal.model.manifest import model_hash
from shoal.model.memory_source import MemorySource
from tests.models import VOCABULARY, tiny_model

END = VOCABULARY - 1
TEMPLATE = (
    "{% if tools %}[tools]{{ tools | tojson }}<tool_call>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
)


def ascii_tokenizer(template: str | None = TEMPLATE) -> Any:
    """Every printable character of ASCII is a token; the last one ends a text."""
    byte_names = {" ": "Ġ"}
    vocabulary = {byte_names.get(chr(32 + index), chr(32 + index)): index for index in range(END)}
    vocabulary["<|end|>"] = END
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    made.chat_template = template
    return made


class Gate:
    """A running gateway, and what is behind it."""

    def __init__(self, swarm: LocalSwarm, url: str, client: Client, reference: Any) -> None:
        self.swarm = swarm
        self.url = url
        self.client = client
        self.reference = reference
        self.tokenizer = ascii_tokenizer()

    def openai(self, **options: Any) -> openai.OpenAI:
        """The official client."""
        options = {"api_key": "none", "max_retries": 0, "timeout": 30.0} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text)["input_ids"]
        return found

    @torch.no_grad()
    def alone(self, prompt: str, num_tokens: int) -> str:
        """What transformers says, greedy."""
        ids = torch.tensor([self.ids(prompt)])
        whole = self.reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False,
            eos_token_id=END, pad_token_id=END,
        )  # fmt: skip
        text: str = self.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
        return text

    def on_loop(self, ask: Callable[[], Any]) -> Any:
        """What `ask` says on the gateway's own loop."""

        async def work() -> Any:
            return ask()

        loop = self.swarm.loop()
        assert loop is not None
        return loop.run(work())

    def wait_until(self, ask: Callable[[], bool]) -> None:
        """Ask again and again until it is so."""
        deadline = time.monotonic() + 20
        while not self.on_loop(ask):
            assert time.monotonic() < deadline, "not in time"

    def metrics(self) -> dict[str, float]:
        """What Prometheus would read."""
        import httpx2

        text = httpx2.get(f"{self.url}/metrics").text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}


@contextmanager
def gate(
    config: GatewayConfig | None = None,
    *,
    cache: Path,
    patience_s: float = 10.0,
    replicas: int = 1,
    **served: Any,
) -> Iterator[Gate]:
    """A gateway over servers of the tiny llama."""
    config = config or GatewayConfig(names=("tiny",))
    reference = tiny_model("llama")
    tokenizer = ascii_tokenizer(served.pop("template", TEMPLATE))
    source = MemorySource(reference.config, reference.state_dict(), tokenizer=tokenizer)
    with LocalSwarm(source, replicas=replicas, cache_dir=cache, **served) as swarm:
        loop = swarm.loop()
        assert loop is not None
        client_config = ClientConfig(
            model=model_hash(source, cache),
            num_blocks=int(source.config.num_hidden_layers),
            hidden_size=int(source.config.hidden_size),
            patience_s=patience_s,
        )
        head = load_head(source)
        stack = AsyncExitStack()

        async def start() -> tuple[str, Client]:
            visit = await stack.enter_async_context(swarm.visit(client_config))
            backing = Backing(
                client=visit.client,
                head=head,
                encoding="float32",
                inner_encoding=None,
                tokenizer=tokenizer,
                end_ids=(END,),
                config=source.config,
                snapshot=lambda: visit.snapshot,
            )
            app = await stack.enter_async_context(open_gateway(backing, config, wall_clock))
            listening = Listening(host="127.0.0.1", port=0)
            return await stack.enter_async_context(serving(app, listening)), visit.client

        async def keep(opened: asyncio.Future[Any], stop: asyncio.Event) -> None:
            async with stack:
                opened.set_result(await start())
                await stop.wait()

        async def begin() -> tuple[Any, asyncio.Event, asyncio.Task[None]]:
            opened, stop = asyncio.get_running_loop().create_future(), asyncio.Event()
            task = asyncio.ensure_future(keep(opened, stop))
            await asyncio.wait({opened, task}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            return opened.result(), stop, task

        async def end(stop: asyncio.Event, task: asyncio.Task[None]) -> None:
            stop.set()
            await task

        (url, client), stop, task = loop.run(begin())
        try:
            yield Gate(swarm, url, client, reference)
        finally:
            loop.run(end(stop, task))


def seeded() -> random.Random:
    """Chance for tests."""
    return random.Random(20_261_121)
