"""A torch module of your own in the middle of a model whose blocks are at servers.

    python examples/finetune_own_modules.py MODEL --join ADDRESS

A small bottleneck between two spans learns one sentence; everything else stays frozen. Without
--join, three servers are started in this process.
"""

import argparse
from contextlib import ExitStack

import torch
from torch.nn import functional

from shoal.hf import AutoDistributedModelForCausalLM, LocalSwarm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
parser.add_argument("--join", help="a server's address")
parser.add_argument("--text", default="The keeper of the lamp counts every ship twice.")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--rate", type=float, default=5e-3)
arguments = parser.parse_args()


class Bottleneck(torch.nn.Module):
    """Adds what a narrow detour makes of the hidden states; nothing at first."""

    def __init__(self, size: int, width: int = 16) -> None:
        super().__init__()
        self.down = torch.nn.Linear(size, width)
        self.up = torch.nn.Linear(width, size)
        torch.nn.init.zeros_(self.up.weight)
        torch.nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.up(functional.gelu(self.down(hidden)))


with ExitStack() as stack:
    join = arguments.join or stack.enter_context(LocalSwarm(arguments.model))
    model = stack.enter_context(
        AutoDistributedModelForCausalLM.from_pretrained(arguments.model, join=join)
    )
    ids = model.tokenizer(arguments.text, return_tensors="pt")["input_ids"]
    middle = len(model.blocks) // 2
    torch.manual_seed(1)
    own = Bottleneck(model.head.hidden_size)
    optimizer = torch.optim.AdamW(own.parameters(), lr=arguments.rate)

    def scores() -> torch.Tensor:
        hidden = model.head.enter_blocks(model.head.look_up(ids))
        hidden = model.blocks[:middle](hidden)  # frozen, no gradients: runs once forward
        hidden = own(hidden)
        hidden = model.blocks[middle:](hidden)  # frozen, gradients flow through
        return model.head.score_states(model.head.leave_blocks(hidden))

    for step in range(1, arguments.steps + 1):
        loss = functional.cross_entropy(scores()[0, :-1], ids[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    with torch.no_grad():
        known = (scores()[0, :-1].argmax(-1) == ids[0, 1:]).sum().item()
    print(f"tokens known by heart: {known} of {ids.shape[1] - 1}")
