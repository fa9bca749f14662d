"""Hidden states between the servers, and parts of the model as torch modules.

    python examples/hidden_states.py MODEL --join ADDRESS "The sea is"

Without --join, three servers are started in this process. This prints what the model would
say if its later blocks were left out, block after block (the "logit lens").
"""

import argparse
from contextlib import ExitStack

import torch

from shoal.hf import AutoDistributedModelForCausalLM, LocalSwarm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
parser.add_argument("prompt", nargs="?", default="The sea is")
parser.add_argument("--join", help="a server's address")
arguments = parser.parse_args()

with ExitStack() as stack:
    join = arguments.join or stack.enter_context(LocalSwarm(arguments.model))
    model = stack.enter_context(
        AutoDistributedModelForCausalLM.from_pretrained(arguments.model, join=join)
    )
    tokenizer = model.tokenizer
    ids = tokenizer(arguments.prompt, return_tensors="pt")["input_ids"]

    # At the borders between servers; `from_pretrained(borders=...)` chooses others.
    output = model(ids, output_hidden_states=True)
    for border, states in zip(model.hidden_borders(), output.hidden_states, strict=True):
        print(f"border {border:3}: {tuple(states.shape)}, norm {states.norm():.1f}")

    # Any blocks, on any hidden states: step by step through the whole model.
    states = output.hidden_states[0]
    for index in range(len(model.blocks)):
        states = model.blocks[index](states)
        token = model.logits(states)[0, -1].argmax()
        print(f"after block {index:3}: {tokenizer.decode([int(token)])!r}")

    # They are modules, so they go wherever torch puts modules.
    first_half = torch.nn.Sequential(model.blocks[: len(model.blocks) // 2], torch.nn.Tanh())
    print("through half of the blocks:", tuple(first_half(output.hidden_states[0]).shape))
