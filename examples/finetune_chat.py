"""LoRA on chats: a model learns to answer for a ferry company, and is asked before and after.

    python examples/finetune_chat.py MODEL --join ADDRESS --out tuned

The chats (data/ferry_chats.jsonl, made up) go through the model's own chat template, and only
the answers are learned. The adapter is yours, in PEFT's format. Without --join, three servers
are started in this process.
"""

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from shoal.hf import AutoDistributedModelForCausalLM, LocalSwarm
from shoal.hf.tuning import (
    Method,
    SwarmBase,
    TuningRun,
    TuningSettings,
    build,
    prepare,
    read_lines,
    write_result,
)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
parser.add_argument("--join", help="a server's address")
parser.add_argument("--data", default=Path(__file__).parent / "data" / "ferry_chats.jsonl")
parser.add_argument("--question", default="When does the ferry to Gull Bay leave?")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--out", help="folder for the adapter: shoal generate --adapter FOLDER")
arguments = parser.parse_args()

with ExitStack() as stack:
    join = arguments.join or stack.enter_context(LocalSwarm(arguments.model))
    model = stack.enter_context(
        AutoDistributedModelForCausalLM.from_pretrained(arguments.model, join=join)
    )
    tokenizer = model.tokenizer

    def asked() -> str:
        turns = [{"role": "user", "content": arguments.question}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(
            text, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False
        )
        answer = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        begin = inputs["input_ids"].shape[1]
        return tokenizer.decode(answer[0, begin:], skip_special_tokens=True)

    print("before:", asked())

    base = SwarmBase(model)
    method = Method(name="lora", rank=8, alpha=16.0, targets=("q_proj", "v_proj"))
    tuned = build(base, method, num_classes=0, seed=1)
    run = TuningRun(
        tuned,
        TuningSettings(num_steps=arguments.steps, batch_size=arguments.batch, learning_rate=2e-3),
        prepare(read_lines(Path(arguments.data)), tokenizer, length_max=96),
        None,
        time.perf_counter,
    )
    for event in run.advance():
        if event.step % 5 == 0 or event.step == 1:
            print(f"step {event.step}: loss {event.loss:.3f}", flush=True)

    folder = Path(arguments.out or stack.enter_context(tempfile.TemporaryDirectory()))
    write_result(folder, tuned, config=model.config, given=arguments.model, label_names=())
    model.load_adapter(folder)  # from now on sessions have it; servers get their blocks' part
    print("after:", asked())
