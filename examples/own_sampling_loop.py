"""A sampling loop of one's own over a session, saved to a file and continued from it.

    python examples/own_sampling_loop.py MODEL --join ADDRESS "The sea is"

Without --join, three servers are started in this process.
"""

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

from shoal.hf import AutoDistributedModelForCausalLM, LocalSwarm, Session

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
parser.add_argument("prompt", nargs="?", default="The sea is")
parser.add_argument("--join", help="a server's address")
parser.add_argument("--tokens", type=int, default=20)
arguments = parser.parse_args()


def sample(session: Session, new_ids: list[int], count: int) -> list[int]:
    """`count` tokens after the session and `new_ids`; the last one is not in the session."""
    found: list[int] = []
    while len(found) < count:
        hidden = session.step_ids(new_ids, last=True)
        scores = model.logits(hidden)[-1] / 0.8
        best = scores.topk(20)
        choice = torch.multinomial(best.values.softmax(-1), 1)
        found.append(int(best.indices[choice]))
        new_ids = found[-1:]
    return found


with ExitStack() as stack:
    join = arguments.join or stack.enter_context(LocalSwarm(arguments.model))
    model = stack.enter_context(
        AutoDistributedModelForCausalLM.from_pretrained(arguments.model, join=join)
    )
    tokenizer = model.tokenizer
    file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "talk.safetensors"
    torch.manual_seed(7)

    with model.session() as session:
        tokens = sample(session, tokenizer(arguments.prompt)["input_ids"], arguments.tokens)
        print(tokenizer.decode(session.token_ids + tokens[-1:]))

        # A fork shares the past; what comes after is its own.
        session.save(file)
        with session.fork() as other:
            once = sample(other, tokens[-1:], arguments.tokens)
        print("...", tokenizer.decode(once))

    # Days later, other servers: the file holds tokens and torch's random state, no cache.
    with model.load_session(file) as again:
        twice = sample(again, tokens[-1:], arguments.tokens)
    print("the loaded session goes on", "the same" if twice == once else "otherwise")
