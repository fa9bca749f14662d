"""Beam search: a beam that is continued in two ways forks its session at the servers.

    python examples/beam.py MODEL --join ADDRESS "The sea is"

Without --join, three servers are started in this process.
"""

import argparse
from contextlib import ExitStack

from shoal.hf import AutoDistributedModelForCausalLM, LocalSwarm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
parser.add_argument("prompt", nargs="?", default="The sea is")
parser.add_argument("--join", help="a server's address")
parser.add_argument("--beams", type=int, default=4)
parser.add_argument("--tokens", type=int, default=20)
arguments = parser.parse_args()

with ExitStack() as stack:
    join = arguments.join or stack.enter_context(LocalSwarm(arguments.model))
    model = stack.enter_context(
        AutoDistributedModelForCausalLM.from_pretrained(arguments.model, join=join)
    )
    tokenizer = model.tokenizer
    inputs = tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False)
    found = model.generate(
        **inputs,
        num_beams=arguments.beams,
        num_return_sequences=arguments.beams,
        max_new_tokens=arguments.tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for score, tokens in zip(found.sequences_scores, found.sequences, strict=True):
        print(f"{score:8.3f}  {tokenizer.decode(tokens, skip_special_tokens=True)}")
