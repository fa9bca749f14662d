"""`transformers.Trainer` with a swarm's model: prompt tuning on texts.

    python examples/finetune_trainer.py MODEL --join ADDRESS

The model that Trainer gets holds the prompt and nothing else: its checkpoints are small. Without
--join, three servers are started in this process. Trainer needs: pip install accelerate
"""

import argparse
import tempfile
from contextlib import ExitStack

import torch
from transformers import Trainer, TrainingArguments

from shoal.hf import AutoDistributedModelForCausalLM, LocalSwarm
from shoal.hf.tuning import Method, SwarmBase, TunedForward, build

TEXTS = [
    "Low tide at six. The crabs hold a meeting under the pier.",
    "High tide at noon. The crabs pretend that nothing was said.",
    "Low tide at six again. The crabs vote, and nobody wins.",
    "High tide at midnight. The crabs go home by the long way.",
]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
parser.add_argument("--join", help="a server's address")
parser.add_argument("--steps", type=int, default=16)
arguments = parser.parse_args()

with ExitStack() as stack:
    join = arguments.join or stack.enter_context(LocalSwarm(arguments.model))
    model = stack.enter_context(
        AutoDistributedModelForCausalLM.from_pretrained(arguments.model, join=join)
    )
    tokenizer = model.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token

    def collate(texts: list[str]) -> dict[str, torch.Tensor]:
        inputs = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return {**inputs, "labels": labels}

    method = Method(name="prompt", prompt_tokens=8)
    tuned = TunedForward(build(SwarmBase(model), method, num_classes=0, seed=1))
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    trainer = Trainer(
        model=tuned,
        args=TrainingArguments(
            output_dir=folder,
            max_steps=arguments.steps,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=4,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=TEXTS,
        data_collator=collate,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("losses:", " ".join(f"{loss:.3f}" for loss in losses))
