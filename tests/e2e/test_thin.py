"""Clients without weights: the texts of those that have them, also when a head server is killed."""

import json
import signal
import subprocess
from urllib.request import urlopen

import openai
import pytest

from tests.e2e.processes import (
    ENVIRONMENT,
    SHOAL,
    Process,
    Server,
    alone,
    end_all,
    run,
    servers,
    wait_until,
)
from tests.e2e.test_chat import STATS, TEMPLATE
from tests.e2e.test_gateway import started

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def swarm(model, serve):
    """A server without a head, one with a head, and metrics on the latter."""
    (first,) = serve(model, ["0:7"])
    head = serve(model, ["0:7"], "--with-head", "--metrics", ":0", join=first.address)
    return [first, *head]


@pytest.fixture
def mortal(model, swarm, nursery):
    """Two more heads, which may be killed."""
    launch = nursery.launch()
    found = [
        Server(model, "0:3", "--with-head", join=swarm[0].address, launch=launch) for _ in range(2)
    ]
    yield [server.ready() for server in found]
    end_all(found)


def head_of(heads):
    """The one of these that a thin client is at."""
    for head in heads:
        if any("guest came" in line for line in head.err):
            return head
    return None


@pytest.fixture
def say(nursery, swarm, model):
    """Runs `shoal generate ... --json` to its end; gives the object."""
    launch = nursery.launch()

    def generate(*options):
        start = [] if "--resume" in options else [str(model), "--prompt", "The sea"]
        process = Process(
            "generate", *start, "--join", swarm[0].address, "--threads", "1", "--json", *options,
            launch=launch,
        )  # fmt: skip
        try:
            assert process.wait(60) == 0, process.report()
            return json.loads(process.out[-1])
        finally:
            process.end()

    return generate


def test_generate_says_the_same(model, swarm, say, tmp_path):
    ids, text = alone(model, "The sea", 40)
    thin = say("--max-new-tokens", "40", "--thin")
    assert (thin["token_ids"], thin["text"]) == (ids, text)
    sampled = ("--temperature", "0.9", "--seed", "5", "--max-new-tokens", "30")
    assert say(*sampled, "--thin")["token_ids"] == say(*sampled)["token_ids"]
    seen = servers(swarm[0].address)
    assert seen[swarm[1].peer]["head"].startswith("float32-")
    assert seen[swarm[0].peer]["head"] == ""

    path = str(tmp_path / "answer.shoal")
    say("--max-new-tokens", "15", "--thin", "--save", path)
    resumed = say("--resume", path, "--thin", "--max-new-tokens", "40")
    assert resumed["token_ids"] == ids
    assert resumed["resumed_tokens"] == 15


def test_chat_says_the_same(model, swarm, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    said = subprocess.run(
        [SHOAL, "chat", str(model), "--join", swarm[0].address, "--template", str(template),
         "--temperature", "0", "--max-new-tokens", "20", "--thin", "--threads", "1"],
        input="The sea\nand the sky\n/retry\n", capture_output=True, text=True, timeout=100,
        env=ENVIRONMENT,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    first = alone(model, "[user]The sea[assistant]", 20)[1]
    second = alone(model, f"[user]The sea[assistant]{first}[user]and the sky[assistant]", 20)[1]
    assert said.stdout.splitlines() == [first, second, second]
    prompt = len("[user]The sea[assistant]")
    kept = [int(found[3]) for found in STATS.finditer(said.stderr)]
    assert kept[0] == 0
    assert kept[1] == prompt + 19  # the second turn sent only what was new


def test_a_killed_head_is_a_pause(model, swarm, mortal, nursery):
    """Kill whoever has the answer, if it may be killed; the text is the same."""
    swarm[1].signal(signal.SIGSTOP)  # so that one of the others is taken
    try:
        process = Process(
            "generate", str(model), "--join", mortal[0].address, "--prompt", "The sea",
            "--max-new-tokens", "400", "--threads", "1", "--thin", launch=nursery.launch(),
        )  # fmt: skip
        try:
            wait_until(lambda: head_of(mortal) is not None, "a head that is asked")
            victim = head_of(mortal)
            victim.signal(signal.SIGKILL)
            assert process.wait() == 0, process.report()
            assert "".join(process.out).rstrip("\n") == alone(model, "The sea", 400)[1]
            assert f"{victim.peer[:8]} replaced by" in "".join(process.err)
        finally:
            end_all([process])
    finally:
        swarm[1].signal(signal.SIGCONT)


def test_a_head_that_is_told_to_stop_ends_its_answers_first(model, serve, nursery):
    """It has no sessions of its own: the chain is another server. Meanwhile metrics answer."""
    (chain,) = serve(model, ["0:7"])
    launch = nursery.launch()
    head = Server(model, "0:1", "--with-head", "--metrics", ":0", join=chain.address, launch=launch)
    asking = None
    try:
        head.ready()
        asking = Process(
            "generate", str(model), "--join", chain.address, "--prompt", "The sea",
            "--max-new-tokens", "400", "--threads", "1", "--thin", launch=nursery.launch(),
        )  # fmt: skip
        wait_until(lambda: head_of([head]) is not None, "a head that is asked")
        head.signal(signal.SIGTERM)
        assert "answers=1" in head.wait_line(head.out, "draining ")
        url = head.wait_line(head.err, "metrics url=").split("url=")[1].strip()
        assert "shoal_server_head_answers 1" in urlopen(url, timeout=30).read().decode()
        assert asking.wait() == 0, asking.report()
        assert "replaced by" not in "".join(asking.err)
        assert "".join(asking.out).rstrip("\n") == alone(model, "The sea", 400)[1]
        assert head.wait() == 0, head.report()
    finally:
        end_all([one for one in (asking, head) if one is not None])


def test_a_thin_gateway_answers_as_one_with_weights(model, swarm):
    join = ("--join", swarm[0].address, "--threads", "1")
    found = [started("gateway", str(model), *join, *more) for more in ((), ("--thin",))]
    try:
        asked = [
            {"max_tokens": 20, "temperature": 0},
            {"max_tokens": 20, "temperature": 0.9, "seed": 3, "n": 3, "logprobs": 2},
            {"max_tokens": 20, "temperature": 0, "presence_penalty": 1.5, "stop": ["x"]},
        ]
        for body in asked:
            said = []
            for _, url in found:
                with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                    for stream in (False, True):
                        made = client.completions.create(
                            model=str(model), prompt="The sea", stream=stream, **body
                        )
                        texts = joined(made) if stream else [one.text for one in made.choices]
                        said.append(texts)
            assert all(one == said[0] for one in said), body
        metrics = urlopen(f"{found[1][1]}/metrics", timeout=30).read().decode()
        assert "shoal_gateway_token_seconds_count" in metrics
    finally:
        end_all([process for process, _ in found])
    url = next(line for line in swarm[1].err if "metrics url=" in line).split("url=")[1].strip()
    counted = urlopen(url, timeout=30).read().decode()
    for name in ("head_tokens_total", "rows_total", "sent_bytes_total", "cache_pages_free"):
        assert f"shoal_server_{name}" in counted


def joined(chunks):
    """The texts of the choices of a stream."""
    texts = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return [texts[index] for index in sorted(texts)]


def test_without_a_head_it_says_what_to_do(model, serve):
    (lonely,) = serve(model, ["0:7"])
    result = run("generate", str(model), "--join", lonely.address, "--prompt", "x", "--thin",
                 "--patience", "1")  # fmt: skip
    assert result.returncode != 0
    assert "--with-head" in result.stderr
    result = run("generate", str(model), "--join", lonely.address, "--prompt", "x", "--thin",
                 "--standby", "1")  # fmt: skip
    assert result.returncode == 2
