"""cluster.toml: what it means, and that nonsense is told with file, line and key."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from shoal.base.errors import ConfigError, ModelUnknown
from shoal.base.spans import Span
from shoal.cli.plan_file import Asked, read_cluster
from shoal.cli.plan_lines import key_lines, line_of
from shoal.cli.plan_reader import parse_table, read_table
from shoal.plan.distance import Position, fibre_rtt_s

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples" / "clusters").glob("*.toml"))

GOOD = """\
[model]
blocks = 8
block_size = "10MB"
hidden_size = 64
kv_heads = 2
head_size = 32

[workload]
tokens_in = 30
tokens_out = 2

[links]
rtt_ms = 20

[[servers]]
name = "a"
memory = "1GB"
decode_ms = 2.0

[[servers]]
name = "b"
memory = "100MB"
decode_ms = { 1 = 3.0, 4 = 4.0 }
"""


def cluster(text, asked=None):
    return read_cluster(parse_table(text, Path("c.toml")), asked)


def test_what_a_file_means():
    found = cluster(GOOD)
    problem = found.problem
    assert problem.num_blocks == 8
    assert problem.model.weight_bytes[0] == 10_000_000
    # 32 tokens in a page of 32, 2 x 2 x 32 values of 4 bytes; and the log of 64 x 4 bytes.
    assert problem.session_bytes(Span(0, 1)) == 32 * 128 * 4 + 32 * 256
    assert [server.memory_bytes for server in problem.servers] == [10**9, 10**8]
    assert problem.servers[1].decode.at(4) == pytest.approx(0.004)
    assert problem.links.flow == "push"
    assert problem.links.client_rtt_s == ((0.02, 0.02),)
    assert problem.links.server_rtt_s == ((0.0, 0.02), (0.02, 0.0))
    assert problem.workload.sessions == 1
    assert found.present is None
    assert any("Decode times of a are for one session" in note for note in found.notes)


def test_flags_go_before_the_file():
    asked = Asked(tokens_in=5, tokens_out=6, requests_per_s=0.5, sessions=7)
    workload = cluster(GOOD, asked).problem.workload
    assert (workload.tokens_in, workload.tokens_out) == (5, 6)
    assert (workload.requests_per_s, workload.sessions) == (0.5, 7)


def test_a_rate_makes_sessions():
    assert cluster(GOOD, Asked(requests_per_s=200.0)).problem.workload.sessions > 1


def test_a_prefill_time_tells_about_batches():
    text = GOOD.replace("decode_ms = 2.0", "decode_ms = 2.0\nprefill_ms = 0.5")
    server = cluster(text).problem.servers[0]
    assert server.decode.at(64) == pytest.approx(0.032)
    assert server.prefill_s(10) == pytest.approx(0.005)


def test_count_makes_several():
    text = GOOD.replace('name = "b"', 'name = "b"\ncount = 3\nsite = "x"')
    text += '[[links.pairs]]\nbetween = ["a", "b"]\nrtt_ms = 1\n'
    text += '[[links.pairs]]\nbetween = ["a", "b-2"]\nrtt_ms = 2\n'
    problem = cluster(text).problem
    assert [server.name for server in problem.servers] == ["a", "b-1", "b-2", "b-3"]
    assert problem.links.server_rtt_s[0] == (0.0, 0.001, 0.002, 0.001)
    assert problem.links.server_rtt_s[1] == (0.001, 0.0, 0.0005, 0.0005)


def test_a_machines_own_line():
    text = GOOD.replace("rtt_ms = 20", 'rtt_ms = 20\nuplink = "8Mbit/s"\nrate = "80Mbit/s"')
    text = text.replace('name = "b"', 'name = "b"\nuplink = "16Mbit/s"\ndownlink = "40Mbit/s"')
    one, other = cluster(text).problem.servers
    assert (one.sent_bytes_per_s, one.received_bytes_per_s) == (1e6, 1e7)
    assert (other.sent_bytes_per_s, other.received_bytes_per_s) == (2e6, 5e6)


def test_rates_of_ways_between_servers():
    assert cluster(GOOD).problem.links.server_bytes_per_s is None
    text = GOOD.replace('name = "b"', 'name = "b"\ncount = 2\nsite = "x"')
    text = text.replace("rtt_ms = 20", 'rtt_ms = 20\nbetween_rate = "8Mbit/s"')
    text += '[[links.pairs]]\nbetween = ["a", "b-2"]\nrate = "16Mbit/s"\n'
    links = cluster(text).problem.links
    assert links.server_rtt_s[0] == (0.0, 0.02, 0.02)
    never = float("inf")
    assert links.server_bytes_per_s == (
        (1e6, 1e6, 2e6),
        (1e6, never, never),
        (2e6, never, never),
    )


@pytest.mark.parametrize(
    ("links", "said"),
    [
        ('flow = "hub"\nbetween_rate = "8Mbit/s"', r'links\.between_rate: servers send .* "push"'),
        ('between_rate = "fast"', r"links\.between_rate: 'fast' is no rate"),
        ('pairs = [{ between = ["a", "b"] }]', r"links\.pairs\[1\]: rtt_ms is missing"),
        (
            'flow = "hub"\npairs = [{ between = ["a", "b"], rate = "1Mbit/s" }]',
            r"links\.pairs\[1\]\.rate: servers send",
        ),
        (
            'pairs = [{ between = ["a", "client 1"], rate = "1Mbit/s" }]',
            r"links\.pairs\[1\]\.rate: rates are for ways between servers",
        ),
    ],
)
def test_rates_that_mean_nothing_are_refused(links, said):
    with pytest.raises(ConfigError, match=said):
        cluster(GOOD.replace("rtt_ms = 20", f"rtt_ms = 20\n{links}"))


def test_round_trips_from_places():
    text = GOOD.replace("rtt_ms = 20", "last_mile_ms = 3\nstretch = 2")
    text = text.replace('name = "a"', 'name = "a"\nat = [52.5, 13.4]\nsite = "berlin"')
    text = text.replace('name = "b"', 'name = "b"\nat = [48.1, 11.6]')
    text += '[[clients]]\nname = "me"\nsite = "berlin"\n'
    links = cluster(text).problem.links
    way_s = fibre_rtt_s(Position(52.5, 13.4), Position(48.1, 11.6), stretch=2) + 0.006
    assert links.client_rtt_s[0] == (0.0005, pytest.approx(way_s))
    assert links.server_rtt_s[0][1] == pytest.approx(way_s)


def test_devices_stand_in_for_measurements():
    text = GOOD.replace("decode_ms = 2.0", 'device = "rtx-3060"').replace('memory = "1GB"\n', "")
    found = cluster(text)
    assert found.problem.servers[0].memory_bytes == int(0.9 * 12e9)
    assert found.servers[0].is_estimated
    assert found.servers[0].device == "cuda"
    assert not found.servers[1].is_estimated
    own = GOOD.replace("decode_ms = 2.0", 'bandwidth = "100GB/s"\ntflops = 1')
    assert cluster(own).problem.servers[0].decode.at(1) == pytest.approx(0.0002 + 1e7 / 6e10, 1e-2)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_good(path):
    assert len(read_cluster(read_table(path)).problem.servers) >= 3


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} >= {"home", "wan", "boards"}


# --- nonsense -------------------------------------------------------------------------

WRONG = [
    ("blocks = 8", "blocks = 0", 2, r"model\.blocks: 0 is not between 1 and 4096"),
    ("blocks = 8", "blocks = true", 2, r"model\.blocks: True is no whole number"),
    ("blocks = 8", "block = 8", 2, r"model\.block: unknown key; did you mean blocks\?"),
    ("hidden_size = 64", "hidden_size = 64\nhiden = 3", 5, r"model\.hiden: unknown key; did you"),
    ('"10MB"', '"10 apples"', 3, r"model\.block_size: '10 apples' is no size"),
    ('"10MB"', "10", 3, r"model\.block_size: 10 is no size"),
    ("head_size = 32", "", 1, r"model: head_size is missing"),
    ("head_size = 32", "head_size = 32\nparams_per_block = 9", 1, r"give one of params_per_block"),
    ("[model]", "[model]\nname = 'x'", 3, r"model\.blocks: is for a model without a name"),
    ("[model]", "[model]\ndtype = 'float23'", 2, r"model\.dtype: 'float23' .* did you mean 'float"),
    ("tokens_out = 2", "tokens_out = 2.5", 10, r"workload\.tokens_out: 2\.5 is no whole number"),
    ("tokens_out = 2", "objective = 'quick'", 10, r"workload\.objective: 'quick' is unknown"),
    ("tokens_out = 2", "requests_per_s = nan", 10, r"workload\.requests_per_s: nan is not between"),
    ("tokens_out = 2", "requests_per_s = inf", 10, r"workload\.requests_per_s: inf is not between"),
    ("rtt_ms = 20", "rtt_ms = -1", 13, r"links\.rtt_ms: -1 is not between 0"),
    ("rtt_ms = 20", "rtt = 20", 13, r"links\.rtt: unknown key; did you mean rtt_ms\?"),
    ("rtt_ms = 20", "", 1, r"no round trip is known between client 1 and a: set rtt_ms"),
    ("rtt_ms = 20", "rtt_ms = 20\nflow = 'pull'", 14, r"links\.flow: 'pull' is unknown"),
    ("rtt_ms = 20", "rtt_ms = 20\nrate = '5 fast'", 14, r"links\.rate: '5 fast' is no rate"),
    ('name = "b"', 'name = "a"', 21, r"servers\[2\]\.name: two servers are called 'a'"),
    ('memory = "100MB"', 'memory = "0MB"', 22, r"servers\[2\]\.memory: '0MB' is not between"),
    ('memory = "100MB"', "", 20, r"servers\[2\]: memory is missing"),
    ('memory = "100MB"', 'memry = "1GB"', 22, r"servers\[2\]\.memry: unknown key; did you"),
    ("decode_ms = 2.0", "decode_ms = 0", 18, r"servers\[1\]\.decode_ms: 0 is not above 0"),
    ("decode_ms = 2.0", "decode_ms = 'fast'", 18, r"servers\[1\]\.decode_ms: 'fast' is no number"),
    ("decode_ms = 2.0", "", 15, r"servers\[1\]: its speed is missing: give decode_ms"),
    ("decode_ms = 2.0", "prefill_ms = 2.0", 15, r"its speed is missing"),
    ("decode_ms = 2.0", "device = 'rtx3090'", 18, r"device: 'rtx3090' .* did you mean 'rtx-3090'"),
    ("decode_ms = 2.0", "bandwidth = '9GB/s'", 15, r"tflops is missing"),
    ("{ 1 = 3.0, 4 = 4.0 }", "{ 0 = 3.0 }", 23, r"decode_ms\.0: a batch is a whole number from 1"),
    ("{ 1 = 3.0, 4 = 4.0 }", "{}", 23, r"servers\[2\]\.decode_ms: give a time"),
    ('name = "b"', 'name = "b"\nblocks = "0:9"', 22, r"servers\[2\]\.blocks: the model has 8"),
    ('name = "b"', 'name = "b"\nblocks = "3"', 22, r"servers\[2\]\.blocks: not a span"),
    ('name = "b"', 'name = "b"\ncount = 2\nblocks = "0:2"', 22, r"\.count: servers of one table"),
    ('name = "b"', 'name = "b"\nat = [1]', 22, r"servers\[2\]\.at: \[1\] is no list of 2 numbers"),
    ('name = "b"', 'name = "b"\nat = [100, 0]', 22, r"servers\[2\]\.at: \[100.*is no position"),
    ('name = "b"', 'name = "b"\nlisten = "here"', 22, r"servers\[2\]\.listen: "),
    ('name = "b"', 'name = "b"\nruns_on = "tpu"', 22, r"servers\[2\]\.runs_on: 'tpu': write cpu"),
    ("[[servers]]", "[[server]]", 15, r"server: unknown key; did you mean servers\?"),
    ("[links]", "[[links]]", 12, r"links: is a table: write \[links\]"),
    ("[workload]", "[workloads]", 8, r"workloads: unknown key; did you mean workload\?"),
    ("[model]", "[model", 1, r"is no TOML: .*line 1"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "line", "said"), WRONG)
def test_nonsense_is_told_with_its_line(old, new, line, said):
    assert old in GOOD
    with pytest.raises(ConfigError, match=said) as caught:
        cluster(GOOD.replace(old, new))
    assert f"c.toml, line {line}: " in caught.value.detail or "is no TOML" in said


def test_blocks_that_do_not_fit_are_told():
    text = GOOD.replace('name = "b"', 'name = "b"\nblocks = "0:8"').replace("100MB", "70MB")
    with pytest.raises(ConfigError, match=r"line 22: servers\[2\]\.blocks: .*don't fit"):
        cluster(text)


def test_pairs_name_somebody():
    text = GOOD + '[[links.pairs]]\nbetween = ["a", "c"]\nrtt_ms = 1\n'
    with pytest.raises(ConfigError, match=r"line 25: links\.pairs\[1\]\.between: no server, .*'c'"):
        cluster(text)
    twice = '[[links.pairs]]\nbetween = ["a", "b"]\nrtt_ms = 1\n' * 2
    with pytest.raises(ConfigError, match=r"line 28: .*given before"):
        cluster(GOOD + twice)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="can't read"):
        read_table(tmp_path / "nowhere.toml")
    (tmp_path / "a").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="can't read"):
        read_table(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="larger than"):
        read_table(tmp_path / "b")
    with pytest.raises(ConfigError, match="is no TOML"):
        parse_table("a = " + "9" * 5000, Path("c.toml"))


LINES = GOOD.splitlines()


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_whatever_is_in_a_file_it_is_read_or_told(data):
    """Lines are lost, doubled or swapped, values become others: never another exception."""
    lines = list(LINES)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(lines) - 1))
        match data.draw(st.sampled_from(["lose", "double", "swap", "value"])):
            case "lose":
                del lines[place]
            case "double":
                lines.insert(place, lines[place])
            case "swap":
                other = data.draw(st.integers(0, len(lines) - 1))
                lines[place], lines[other] = lines[other], lines[place]
            case "value":
                value = data.draw(st.sampled_from(VALUES))
                lines[place] = f"{lines[place].split('=')[0]}= {value}"
    text = "\n".join(lines)
    with suppress(ConfigError):
        assert cluster(text).problem.servers


VALUES = [
    "0", "-1", "1e308", "1" + "0" * 400, "nan", "inf", "true", '""', '"x"', "[]", "[1, 2]", "{}",
    "{ 1 = 2.0 }", "1979-05-27", '"9GB"', '"5Mbit/s"', '"""\nlong\n"""', "[[1], 2]",
]  # fmt: skip


# --- lines ------------------------------------------------------------------------------


def test_keys_stand_on_their_lines():
    text = '''\
top = 1
long = [
  "[no.header]",  # x = 1
]
text = """
also = "no key"
"""
[a]
b.c = 2
"q r" = 3
[[many]]
x = { y = 1 }
[[many]]
x = 2
[many.deep]
z = 3
[[many.more]]
w = 1
'''
    lines = key_lines(text)
    found = {
        ("top",): 1, ("long",): 2, ("text",): 5, ("a",): 8, ("a", "b"): 9, ("a", "b", "c"): 9,
        ("a", "q r"): 10, ("many",): 11, ("many", 0): 11, ("many", 0, "x"): 12, ("many", 1): 13,
        ("many", 1, "x"): 14, ("many", 1, "deep"): 15, ("many", 1, "deep", "z"): 16,
        ("many", 1, "more"): 17, ("many", 1, "more", 0): 17, ("many", 1, "more", 0, "w"): 18,
    }  # fmt: skip
    assert lines == found
    assert line_of(lines, ("many", 0, "x", "y")) == 12
    assert line_of(lines, ("nowhere",)) == 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_lines_are_found_in_files_as_people_write_them(seed):
    rng = random.Random(seed)
    text, truth, number = "", {}, 0
    counts = {}
    for _ in range(rng.randint(1, 5)):
        text += "\n# words = [\n" * rng.randint(0, 2)
        number = text.count("\n") + 1
        name = rng.choice(["alpha", "beta"])
        counts[name] = counts.get(name, -1) + 1
        text += f"[[{name}]] # {{\n"
        truth[(name, counts[name])] = number
        for key in rng.sample("pqrs", rng.randint(0, 4)):
            truth[(name, counts[name], key)] = text.count("\n") + 1
            text += f"{key} = {rng.choice(VALUES[:16])}  # = [\n"
    found = key_lines(text)
    assert {path: found[path] for path in truth} == truth


# --- models on this machine -----------------------------------------------------------


def test_a_model_beside_the_file(tmp_path):
    """Its config is enough: sizes by block, sliding windows where it has them."""
    config = AutoConfig.for_model(
        "gemma2", hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=100,
        sliding_window=32,
    )  # fmt: skip
    config.architectures = ["Gemma2ForCausalLM"]
    (tmp_path / "tiny").mkdir()
    config.save_pretrained(tmp_path / "tiny")
    model = GOOD[: GOOD.index("[workload]")]
    text = GOOD.replace(model, '[model]\nname = "tiny"\ndtype = "bfloat16"\n')
    found = read_cluster(parse_table(text, tmp_path / "c.toml"))
    assert found.model.given == str(tmp_path / "tiny")
    spec = found.problem.model
    assert spec.num_blocks == 4
    assert spec.row_bytes == 128
    assert {cache.window for cache in spec.caches} == {32, None}
    assert spec.caches[0].values_per_token == 2 * 2 * 16
    assert spec.weight_bytes[0] == pytest.approx(2 * found.model.params_per_block, rel=0.01)


def test_a_model_that_is_nowhere():
    text = GOOD.replace(GOOD[: GOOD.index("[workload]")], '[model]\nname = "nowhere"\n')
    with pytest.raises(ModelUnknown, match=r"c\.toml, line 2: model\.name: no model 'nowhere'"):
        cluster(text)
