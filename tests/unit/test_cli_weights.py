"""What people write for models from peers and for sizes, and what they are told."""

from __future__ import annotations

import pytest

from shoal.base.errors import ConfigError, ModelUnknown
from shoal.base.ids import PeerId
from shoal.cli.models import open_given
from shoal.cli.peer_weights import report_text, resolve_model
from shoal.cli.sizes import parse_size, size_text
from shoal.client.weight_fetch import FetchReport
from shoal.model.known import KNOWN_MODELS

ONE, TWO, FILES = "aaaaaa11" + "0" * 24, "aaaaaa22" + "0" * 24, "f" * 32
KNOWN = "smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (ONE, (ONE, None)),
        ("0" * 32, ("0" * 32, None)),  # a full hash may be asked for though nobody serves it yet
        (f"{ONE}.{FILES}", (ONE, FILES)),
        ("aaaaaa1", (ONE, None)),
        (f"aaaaaa2.{FILES}", (TWO, FILES)),
        (KNOWN, (KNOWN_MODELS[KNOWN].model, None)),
    ],
)
def test_what_names_a_model(given: str, found: tuple[str, str | None]) -> None:
    assert resolve_model(given, [ONE, TWO]) == found


def test_an_ambiguous_beginning_names_the_candidates() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_model("aaaaaa", [ONE, TWO])
    assert ONE in caught.value.detail
    assert TWO in caught.value.detail


@pytest.mark.parametrize("given", ["", "aaaaa", "./dir", "model.gguf", "AAAAAA1", ONE + ".files"])
def test_what_names_no_model_lists_what_is_served(given: str) -> None:
    with pytest.raises(ModelUnknown, match=f"serves: {ONE}, {TWO}"):
        resolve_model(given, [ONE, TWO])


def test_a_hash_without_the_flag_says_which_flag() -> None:
    with pytest.raises(ModelUnknown, match="--weights-from-peers"):
        open_given(ONE)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("50GB", 50 * 10**9), ("1.5 MiB", 3 << 19), ("8kb", 8000)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--x") == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "5 apples", "1e9", "1..5MB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="--x"):
        parse_size(text, "--x")


def test_sizes_for_people() -> None:
    assert [size_text(n) for n in (5, 7_149_000, 2e9)] == ["5 bytes", "7.1 MB", "2.0 GB"]


def test_a_report_says_what_came_from_whom_and_who_lied() -> None:
    one, two = PeerId(bytes(32)), PeerId(bytes([255]) * 32)
    text = report_text(
        FetchReport(num_items=3, fetched_bytes={one: 1000, two: 5000}, dropped={one: "lied"})
    )
    assert text == (
        "fetched 3 tensors and files, 6.0 kB (6000 bytes), from 2 peers: "
        "77777777 5.0 kB, aaaaaaaa 1.0 kB\ndropped aaaaaaaa: lied"
    )
