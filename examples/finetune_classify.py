"""Tell letters apart by prompt tuning: the swarm stays frozen, 16 kB are learned here.

    python examples/finetune_classify.py MODEL --join ADDRESS

Letters to a ferry company ask for money back, for lost things, for the timetable, or say
thanks (data/letters.jsonl, made up). A prompt of 8 positions and a head for the four classes
learn from most of them; the rest are told afterwards. Without --join, three servers are
started in this process.
"""

import argparse
import json
from contextlib import ExitStack
from pathlib import Path

import torch

from shoal.hf import AutoDistributedModelForSequenceClassification, LocalSwarm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
parser.add_argument("--join", help="a server's address")
parser.add_argument("--data", default=Path(__file__).parent / "data" / "letters.jsonl")
parser.add_argument("--steps", type=int, default=24)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--kept-back", type=int, default=40, help="letters to tell afterwards")
parser.add_argument("--rate", type=float, default=3e-3)
parser.add_argument("--out", help="folder for what was learned: shoal generate --adapter FOLDER")
arguments = parser.parse_args()

letters = [json.loads(line) for line in Path(arguments.data).read_text("utf-8").splitlines()]
back, learned = letters[: arguments.kept_back], letters[arguments.kept_back :]
names = sorted({letter["label"] for letter in letters})

with ExitStack() as stack:
    join = arguments.join or stack.enter_context(LocalSwarm(arguments.model))
    model = stack.enter_context(
        AutoDistributedModelForSequenceClassification.from_pretrained(
            arguments.model, join=join, label_names=names, prompt_tokens=8, seed=1
        )
    )
    tokenizer = model.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token

    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate)
    chance = torch.Generator().manual_seed(1)
    model.train()
    for step in range(1, arguments.steps + 1):
        chosen = torch.randint(len(learned), (arguments.batch,), generator=chance).tolist()
        texts = [learned[at]["text"] for at in chosen]
        inputs = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        labels = torch.tensor([names.index(learned[at]["label"]) for at in chosen])
        loss = model(**inputs, labels=labels).loss
        loss.backward()  # the servers run their blocks back, and keep nothing
        optimizer.step()
        optimizer.zero_grad()
        if step % 4 == 0 or step == 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    told = []
    for start in range(0, len(back), arguments.batch):
        told += model.tell([one["text"] for one in back[start : start + arguments.batch]])
    right = sum(name == one["label"] for name, one in zip(told, back, strict=True))
    print(f"told right: {right} of {len(back)}")
    for name, one in zip(told[:4], back, strict=False):
        print(f"{name:>9}: {one['text']}")
    if arguments.out:
        model.save_pretrained(arguments.out, given=arguments.model)
