"""The demo model through servers: what transformers says, and `make demo` itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shoal.base.errors import ModelUnknown
from shoal.model.known import default_cache_dir
from shoal.model.source import open_source
from tests.e2e.processes import ENVIRONMENT, generate

pytestmark = [pytest.mark.e2e, pytest.mark.real_model, pytest.mark.timeout(300)]

NAME = "smollm2-135m-instruct"
PROMPT = "The three most important things to know about the sea are"
NUM_TOKENS = 32


@pytest.fixture(scope="module")
def source():
    try:
        return open_source(NAME, default_cache_dir(os.environ))
    except ModelUnknown as error:
        pytest.skip(error.detail)


def test_three_servers_say_what_transformers_says(source, serve):
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32)
    model.load_state_dict({name: source.read(name) for name in source.tensor_names()}, strict=False)
    model.tie_weights()
    ids = source.tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    whole = model.eval().generate(
        ids, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=list(source.eos_token_ids)
    )
    first, *_ = serve(NAME, ("0:10", "10:20", "20:30"))
    answer = generate(NAME, first.address, PROMPT, "--max-new-tokens", str(NUM_TOKENS))
    assert answer["token_ids"] == whole[0, ids.shape[1] :].tolist()
    assert [hop["blocks"] for hop in answer["chain"]] == [[0, 10], [10, 20], [20, 30]]


def test_the_demo_kills_a_server_and_the_text_is_the_same(source):
    demo = Path(__file__).resolve().parents[2] / "scripts" / "demo"
    result = subprocess.run(
        [sys.executable, str(demo)],
        env={**ENVIRONMENT, "PROMPT": PROMPT, "TOKENS": str(NUM_TOKENS)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    _, _, answer = result.stdout.partition(f"prompt: {PROMPT}")
    killed = re.search(r" \[kill -9 (\w+ \[10,20\))\] ", answer)
    assert killed, "in the middle of the answer"
    before, after = (
        re.search(rf"chain {when}: +(.*)", answer)[1].split(" -> ") for when in ("before", "after")
    )
    assert before[1] == killed[1]
    assert killed[1] not in after
    assert (before[0], before[2]) == (after[0], after[2])
    assert re.search(r"pause: +[\d.]+ s, in which \d+ tokens were replayed", answer)
    assert "same text:    yes" in answer
    assert f"chain: {' -> '.join(after)}" in result.stderr
    assert "stopped 3 servers" in result.stderr
