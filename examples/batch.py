"""Prompts of unequal length in one call: each is a session of its own, padding is not sent.

    python examples/batch.py MODEL --join ADDRESS

Without --join, three servers are started in this process.
"""

import argparse
from contextlib import ExitStack

import torch

from shoal.hf import AutoDistributedModelForCausalLM, LocalSwarm

PROMPTS = ["The sea", "A very short story about a lighthouse keeper:", "One, two, three,"]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
parser.add_argument("--join", help="a server's address")
parser.add_argument("--tokens", type=int, default=20)
arguments = parser.parse_args()

with ExitStack() as stack:
    join = arguments.join or stack.enter_context(LocalSwarm(arguments.model))
    model = stack.enter_context(
        AutoDistributedModelForCausalLM.from_pretrained(arguments.model, join=join)
    )
    tokenizer = model.tokenizer
    tokenizer.padding_side = "left"  # a row goes on at its end, so that padding comes first
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt", return_token_type_ids=False)

    # The cache is returned, so that the conversations can go on without computing it again.
    first = model.generate(
        **batch,
        max_new_tokens=arguments.tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
    )
    for text in tokenizer.batch_decode(first.sequences, skip_special_tokens=True):
        print("-", text)
    for number, row in enumerate(first.past_key_values.rows):
        servers = " -> ".join(str(stage.span) for stage in row.chain)
        print(f"row {number}: {row.length} positions at {servers}")

    mask = batch["attention_mask"]
    new = first.sequences.shape[1] - mask.shape[1]
    second = model.generate(
        first.sequences,
        attention_mask=torch.cat([mask, mask.new_ones(len(PROMPTS), new)], dim=1),
        past_key_values=first.past_key_values,
        max_new_tokens=arguments.tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    for text in tokenizer.batch_decode(second, skip_special_tokens=True):
        print("+", text)
