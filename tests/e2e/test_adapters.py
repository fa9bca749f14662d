"""LoRA adapters through real processes: brought, served, and kept when a server is killed."""

import json
import signal

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.processes import Process, error_line, generate, run, servers, wait_until
from tests.golden.adapter_cases import save_adapter
from tests.golden.test_adapters import pytestmark as quiet_peft

pytestmark = [pytest.mark.e2e, *quiet_peft]

PROMPT = "What the sea gives, the sea takes."
LONG = 150


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters of the tiny model, as PEFT saves them."""
    root = tmp_path_factory.mktemp("adapters")
    for name, seed in (("mine", 1), ("theirs", 2)):
        save_adapter(root / name, "llama", seed)
    return root


@pytest.fixture(scope="module")
def swarm(model, adapters, serve):
    """Two servers of each span; all of them serve an adapter of their own."""
    return serve(model, ("0:3", "3:7", "0:3", "3:7"), "--adapter", f"story={adapters / 'theirs'}")


def alone(folder, adapter, num_tokens):
    """What transformers with PEFT says in this process, greedy in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter)
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")["input_ids"]
    whole = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
    )
    return whole[0, ids.shape[1] :].tolist()


def test_servers_have_an_adapter(model, adapters, swarm):
    join = swarm[0].address
    said = [server["adapters"] for server in servers(join).values()]
    assert all(set(one) == {"story"} for one in said)
    (name,) = {one["story"] for one in said}
    expected = alone(model, adapters / "theirs", 20)
    for given in ("story", name):
        answer = generate(model, join, PROMPT, "--max-new-tokens", "20", "--adapter", given)
        assert answer["token_ids"] == expected


def test_a_killed_server_does_not_change_the_answer(model, adapters, swarm):
    join = swarm[0].address
    expected = alone(model, adapters / "mine", LONG)
    before = {peer: server["iterations"] for peer, server in servers(join).items()}
    client = Process(
        "generate", str(model), "--join", join, "--prompt", PROMPT, "--json",
        "--max-new-tokens", str(LONG), "--adapter", str(adapters / "mine"),
    )  # fmt: skip
    victims = []

    def is_running():
        now = servers(join)
        victims[:] = [one for one in swarm if now[one.peer]["iterations"] > before[one.peer] + 5]
        return len(victims) >= 2

    wait_until(is_running, "an answer in progress")
    victim = next(one for one in victims if one is not swarm[0])
    victim.signal(signal.SIGKILL)
    assert client.wait(60) == 0, client.report()
    answer = json.loads(client.out[-1])
    client.end()
    assert answer["token_ids"] == expected
    (recovery,) = answer["recoveries"]
    assert recovery["lost"] == [victim.peer]


def test_a_saved_answer_remembers_its_adapter(model, adapters, swarm, tmp_path):
    join, file = swarm[0].address, str(tmp_path / "saved")
    answer = generate(
        model, join, PROMPT, "--max-new-tokens", "8", "--adapter", "story", "--save", file
    )
    resume = ("generate", "--resume", file, "--join", join, "--max-new-tokens", "12", "--json")
    refused = run(*resume, "--adapter", str(adapters / "mine"))
    assert "the answer began with adapter" in error_line(refused.stderr)
    again = run(*resume)
    assert again.returncode == 0, again.stderr
    token_ids = json.loads(again.stdout.splitlines()[-1])["token_ids"]
    assert token_ids == alone(model, adapters / "theirs", 12)
    assert token_ids[:8] == answer["token_ids"]


def test_an_adapter_of_another_model_is_refused(model, swarm, tmp_path):
    save_adapter(tmp_path, "wide", 1)
    asked = ("generate", str(model), "--join", swarm[0].address, "--prompt", PROMPT)
    for command in (asked, ("serve", str(model), "--blocks", "0:3")):
        given = str(tmp_path) if command is asked else f"a={tmp_path}"
        assert "made for another model" in error_line(run(*command, "--adapter", given).stderr)
