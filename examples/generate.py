"""Continue a prompt through a swarm and stream the text, as with any transformers model.

    python examples/generate.py MODEL --join ADDRESS "The sea is"

ADDRESS is what a server's ready line says. Without --join, three servers are started in this
process. MODEL is a directory, a .gguf file or a name that `shoal model get` knows.
"""

import argparse
from contextlib import ExitStack

import torch
from transformers import TextStreamer

from shoal.hf import AutoDistributedModelForCausalLM, LocalSwarm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
parser.add_argument("prompt", nargs="?", default="The sea is")
parser.add_argument("--join", help="a server's address")
parser.add_argument("--tokens", type=int, default=40)
arguments = parser.parse_args()

with ExitStack() as stack:
    join = arguments.join or stack.enter_context(LocalSwarm(arguments.model))
    model = stack.enter_context(
        AutoDistributedModelForCausalLM.from_pretrained(arguments.model, join=join)
    )
    tokenizer = model.tokenizer
    inputs = tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False)

    # Greedy, token by token on the screen.
    model.generate(
        **inputs,
        max_new_tokens=arguments.tokens,
        do_sample=False,
        streamer=TextStreamer(tokenizer),
    )

    # Sampled, the same text for the same seed.
    torch.manual_seed(7)
    sampled = model.generate(
        **inputs, max_new_tokens=arguments.tokens, do_sample=True, temperature=0.8, top_p=0.9
    )
    print("sampled:", tokenizer.decode(sampled[0], skip_special_tokens=True))

    # Drafts from the text itself: several tokens are checked in one trip along the chain.
    looked_up = model.generate(
        **inputs, max_new_tokens=arguments.tokens, do_sample=False, prompt_lookup_num_tokens=3
    )
    print("looked up:", tokenizer.decode(looked_up[0], skip_special_tokens=True))
