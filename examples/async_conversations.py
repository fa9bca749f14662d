"""Eight conversations at the same time; the servers compute them together.

    python examples/async_conversations.py MODEL --join ADDRESS

Without --join, three servers are started in this process.
"""

import argparse
import asyncio
import time
from contextlib import ExitStack

from shoal.hf import AutoDistributedModelForCausalLM, DistributedModelForCausalLM, LocalSwarm

TOPICS = ["the sea", "rain", "a train", "bread", "old maps", "bees", "the moon", "chess"]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
parser.add_argument("--join", help="a server's address")
parser.add_argument("--tokens", type=int, default=20)
arguments = parser.parse_args()


async def generated(model: DistributedModelForCausalLM, topic: str) -> str:
    """transformers' generate, on a thread of its own."""
    inputs = model.tokenizer(
        f"A few words about {topic}:", return_tensors="pt", return_token_type_ids=False
    )
    tokens = await model.generate_async(**inputs, max_new_tokens=arguments.tokens, do_sample=False)
    return str(model.tokenizer.decode(tokens[0], skip_special_tokens=True))


async def stepped(model: DistributedModelForCausalLM, topic: str) -> str:
    """The same as a loop of one's own: no threads, and every token is ours."""
    new_ids = model.tokenizer(f"A few words about {topic}:")["input_ids"]
    async with await model.session_async() as session:
        for _ in range(arguments.tokens):
            hidden = await session.step_ids_async(new_ids, last=True)
            new_ids = [int(model.logits(hidden)[-1].argmax())]
        return str(model.tokenizer.decode(session.token_ids + new_ids))


async def main(model: DistributedModelForCausalLM) -> None:
    for converse in (generated, stepped):
        started_s = time.monotonic()
        texts = await asyncio.gather(*(converse(model, topic) for topic in TOPICS))
        rate = len(TOPICS) * arguments.tokens / (time.monotonic() - started_s)
        print(f"{converse.__name__}: {rate:.1f} tokens/s in all")
        for text in texts:
            print("-", text)


with ExitStack() as stack:
    join = arguments.join or stack.enter_context(LocalSwarm(arguments.model))
    model = stack.enter_context(
        AutoDistributedModelForCausalLM.from_pretrained(arguments.model, join=join)
    )
    asyncio.run(main(model))
