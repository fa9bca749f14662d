"""What commands are made of: threads, checks of the swarm, what is printed."""

import pytest

from shoal.base.errors import ConfigError, NoRouteError
from shoal.base.ids import PeerId, peer_text
from shoal.base.spans import Span
from shoal.cli.answering import as_dict, check_model, common_encoding, summary
from shoal.cli.generate import read_prompt
from shoal.cli.models import OpenModel
from shoal.cli.status import Seen, as_dicts
from shoal.cli.threads import physical_cores
from shoal.client.session import Move, Recovery
from shoal.discovery.directory import SignedRecord, Snapshot
from shoal.discovery.records import Record
from shoal.hf.connection import check_served
from shoal.hf.generation import Answer, Speed, Token, measure
from shoal.plan.view import Stage
from shoal.wire.directory import Load

A, B = PeerId(bytes([1]) * 32), PeerId(bytes([2]) * 32)
MODEL = OpenModel(given="./mine", source=None, name="abc", num_blocks=6, hidden_size=16)


def record(start, end, **changes):
    facts = {
        "peer": A,
        "swarm": "s",
        "boot_ms": 1,
        "counter": 1,
        "ttl_s": 60.0,
        "state": "online",
        "addresses": [f"tcp://{peer_text(A)}@127.0.0.1:1"],
        "model": "abc",
        "num_blocks": 6,
        "hidden_size": 16,
        "start": start,
        "end": end,
        "encodings": ["float32"],
        "cache_tokens": 100,
    }
    return Record(**{**facts, **changes})


def snapshot(*records):
    signed = tuple(SignedRecord(record=one, data=b"") for one in records)
    return Snapshot(version=1, records=signed)


def test_cores_are_counted_once_per_pair_of_threads(tmp_path, monkeypatch):
    for cpu, siblings in enumerate(("0-1", "0-1", "2-3", "2-3")):
        path = tmp_path / f"cpu{cpu}" / "topology"
        path.mkdir(parents=True)
        (path / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert physical_cores(tmp_path) == 2
    assert physical_cores(tmp_path / "nowhere") == 1


def served(*records):
    check_served(snapshot(*records), given=MODEL.given, model=MODEL.name, num_blocks=6)


def test_all_blocks_served_is_fine_joining_servers_included():
    served(record(0, 3), record(3, 6, state="joining"))


def test_missing_blocks_are_named():
    with pytest.raises(NoRouteError, match=r"\[0,2\), \[4,6\)") as caught:
        served(record(2, 4))
    assert caught.value.missing == ((0, 2), (4, 6))


def test_nobody_there_means_all_blocks_are_missing():
    with pytest.raises(NoRouteError, match=r"\[0,6\)"):
        served()


@pytest.mark.parametrize("records", [[], [record(2, 4)]])
def test_commands_wait_for_missing_blocks(records):
    check_model(snapshot(*records), MODEL)


def test_another_model_is_named_with_ours():
    with pytest.raises(ConfigError, match=r"model xyz \(8 blocks\).*\./mine is model abc"):
        check_model(snapshot(record(0, 8, model="xyz", num_blocks=8)), MODEL)


def test_encoding_is_that_of_most_servers():
    bf16 = record(0, 3, encodings=["bfloat16", "float32"])
    assert common_encoding(snapshot(bf16, bf16, record(3, 6)), "abc") == "bfloat16"
    assert common_encoding(snapshot(bf16), "other") == "float32"


def test_prompt_comes_from_one_place(tmp_path):
    path = tmp_path / "prompt"
    path.write_text("Grüße\n", encoding="utf-8")
    assert read_prompt(None, path) == "Grüße\n"
    assert read_prompt("x", None) == "x"
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="can't read the prompt"):
        read_prompt(None, path)


def tokens(*times):
    return [Token(id=7, at_s=at, is_last=False) for at in times]


@pytest.mark.parametrize(
    ("times", "first_s", "per_s"), [((), 0, 0), ((3.0,), 1.0, 0), ((3.0, 3.5, 4.0), 1.0, 2.0)]
)
def test_decode_speed_leaves_the_first_token_out(times, first_s, per_s):
    speed = measure(tokens(*times), 2.0)
    assert speed == Speed(time_to_first_token_s=first_s, tokens_per_s=per_s)


def test_answer_as_json_and_for_people():
    recovery = Recovery(
        position=9, lost=(A,), replacement=(B,), replayed_tokens=8, pause_s=0.25
    )  # fmt: skip
    answer = Answer(
        token_ids=(1, 2),
        prompt_tokens=3,
        speed=Speed(time_to_first_token_s=0.5, tokens_per_s=4.0),
        chain=(Stage(peer=B, span=Span(0, 6)),),
        recoveries=(recovery,),
        numerics="exact",
        moves=(Move(position=5, left=(B,), entered=(A,), reason="leaving", prepared_s=0.5),),
    )
    assert as_dict("hi", answer) == {
        "text": "hi",
        "token_ids": [1, 2],
        "prompt_tokens": 3,
        "resumed_tokens": 0,
        "time_to_first_token_s": 0.5,
        "tokens_per_s": 4.0,
        "chain": [{"peer": peer_text(B), "blocks": [0, 6]}],
        "recoveries": [
            {
                "position": 9,
                "lost": [peer_text(A)],
                "replacement": [peer_text(B)],
                "replayed_tokens": 8,
                "pause_s": 0.25,
            }
        ],
        "moves": [
            {
                "position": 5,
                "left": [peer_text(B)],
                "entered": [peer_text(A)],
                "reason": "leaving",
                "prepared_s": 0.5,
            }
        ],
        "numerics": "exact",
    }
    assert "moved at position 5" in summary(answer)
    assert "4.0 tokens/s" in summary(answer)
    assert "8 tokens replayed" in summary(answer)


def test_status_counts_only_servers_that_answer():
    load = Load(1, 100, 60, 2, 0, 0.0, 5)
    seen = [
        Seen(record=record(3, 6), error="no answer"),
        Seen(record=record(0, 3), rtt_s=0.001, load=load),
    ]
    (model,) = as_dicts(seen)
    assert model["missing"] == [[3, 6]]
    assert [server["blocks"] for server in model["servers"]] == [[0, 3], [3, 6]]
    assert model["servers"][0]["free_tokens"] == 60
    assert model["servers"][1]["error"] == "no answer"
    assert model["servers"][1]["sessions"] is None
