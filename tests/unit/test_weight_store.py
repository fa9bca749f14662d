"""The store: nothing enters unchecked, nothing in use leaves, processes share it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.base.content import content_hash, files_hash
from shoal.base.errors import ConfigError, ModelCorrupt
from shoal.model.weight_store import WeightStore

A, B, C, D = (bytes([65 + number]) * 1000 for number in range(4))
HASHES = {data: content_hash(data) for data in (A, B, C, D)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "weights"


@pytest.fixture
def store(root: Path) -> WeightStore:
    return WeightStore(root)


def put(store: WeightStore, data: bytes, used_s: float | None = None) -> str:
    """Store `data`, last used at `used_s`."""
    draft = store.begin(HASHES[data], len(data))
    draft.append(data)
    assert draft.finish()
    draft.close()
    if used_s is not None:
        os.utime(store._path(HASHES[data]), (used_s, used_s))
    return HASHES[data]


def held(store: WeightStore) -> set[bytes]:
    return {data for data, name in HASHES.items() if store.has(name, len(data))}


def test_what_is_finished_is_there_and_can_be_read(store: WeightStore) -> None:
    name = put(store, A)
    assert store.has(name, 1000)
    assert not store.has(name, 999)
    assert store.num_bytes(name) == 1000
    assert store.read(name, 990, 100) == A[:10]
    whole = bytearray(1000)
    store.read_into(name, memoryview(whole))
    assert whole == A


def test_an_empty_store_holds_nothing_and_writes_nothing(store: WeightStore, root: Path) -> None:
    assert not store.has(HASHES[A], 1000)
    assert store.read(HASHES[A], 0, 1) is None
    assert store.manifest_text(HASHES[A]) is None
    with pytest.raises(ModelCorrupt, match="fetch the weights again"):
        store.read_into(HASHES[A], memoryview(bytearray(1000)))
    assert not root.exists()


def test_wrong_bytes_never_get_a_name(store: WeightStore) -> None:
    draft = store.begin(HASHES[A], 1000)
    draft.append(B)
    assert not draft.finish()
    draft.restart()
    assert draft.held == 0
    draft.append(A[:999])
    assert not draft.finish()
    assert held(store) == set()
    draft.append(A[999:])
    assert draft.finish()
    draft.close()
    assert held(store) == {A}


def test_what_was_begun_goes_on(store: WeightStore, root: Path) -> None:
    draft = store.begin(HASHES[A], 1000)
    draft.append(A[:300])
    draft.close()
    again = WeightStore(root).begin(HASHES[A], 1000)
    assert again.held == 300
    again.append(memoryview(A)[300:])
    assert again.finish()
    again.close()
    assert held(store) == {A}
    assert not list((root / "partial").iterdir())


def test_a_draft_that_is_too_long_begins_anew(store: WeightStore) -> None:
    draft = store.begin(HASHES[A], 1000)
    draft.append(A + B)
    draft.close()
    again = store.begin(HASHES[A], 1000)
    assert again.held == 0
    again.close()


def test_two_who_fetch_the_same_do_not_disturb_each_other(store: WeightStore, root: Path) -> None:
    first = store.begin(HASHES[A], 1000)
    first.append(A[:300])
    second = WeightStore(root).begin(HASHES[A], 1000)
    assert second.held == 0, "the first one's draft is locked"
    second.append(A)
    assert second.finish()
    second.close()
    first.append(A[300:])
    assert first.finish()
    first.close()
    assert held(store) == {A}
    assert not list((root / "partial").iterdir())


def test_changed_bytes_are_noticed_when_they_are_used(store: WeightStore) -> None:
    path = store._path(put(store, A))
    path.write_bytes(B)
    with pytest.raises(ModelCorrupt, match="start again"):
        store.read_into(HASHES[A], memoryview(bytearray(1000)))
    assert not path.exists()


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "A" * 32, "0" * 31, "0" * 31 + "/"])
def test_only_hashes_name_anything(store: WeightStore, name: str) -> None:
    calls = (store.num_bytes, store.manifest_text, lambda one: store.begin(one, 1),
             lambda one: store.file_folder(one, {}))  # fmt: skip
    for call in calls:
        with pytest.raises(ConfigError, match="no hash"):
            call(name)


def test_links_are_not_followed(store: WeightStore, root: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(A)
    path = store._path(HASHES[A])
    path.parent.mkdir(parents=True)
    path.symlink_to(secret)
    assert not store.has(HASHES[A], 1000)
    assert store.read(HASHES[A], 0, 10) is None
    (root / "partial").mkdir(exist_ok=True)
    (root / "partial" / HASHES[B]).symlink_to(secret)
    with pytest.raises(ConfigError, match="can't write"):
        store.begin(HASHES[B], 1000)
    assert secret.read_bytes() == A


def test_a_store_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="SHOAL_CACHE"):
        WeightStore(tmp_path / "file").begin(HASHES[A], 1000)


# --- room ---------------------------------------------------------------------------------


def test_what_was_not_used_for_longest_goes_first(store: WeightStore) -> None:
    for age, data in ((30, A), (10, B), (20, C)):
        put(store, data, used_s=1_000_000 - age)
    assert store.make_room({HASHES[D]: 1000}, 4000) == 1000
    assert held(store) == {A, B, C}
    assert store.make_room({HASHES[D]: 1000}, 3000) == 1000
    assert held(store) == {B, C}
    assert store.make_room({HASHES[D]: 1000}, 2500) == 1000
    assert held(store) == {B}


def test_what_is_needed_or_in_use_stays(store: WeightStore, root: Path) -> None:
    for age, data in ((30, A), (10, B), (20, C)):
        put(store, data, used_s=1_000_000 - age)
    with WeightStore(root).pinned([HASHES[A]]):
        assert store.make_room({HASHES[C]: 1000, HASHES[D]: 1000}, 3000) == 1000
        assert held(store) == {A, C}
        with pytest.raises(ConfigError, match="--cache-limit"):
            store.make_room({HASHES[C]: 1000, HASHES[D]: 1000}, 2999)
        assert held(store) == {A, C}
    store.make_room({HASHES[C]: 1000, HASHES[D]: 1000}, 2999)
    assert held(store) == {C}


def test_using_something_makes_it_young(store: WeightStore) -> None:
    put(store, A, used_s=1.0)
    put(store, B, used_s=2.0)
    store.read_into(HASHES[A], memoryview(bytearray(1000)))
    store.make_room({HASHES[C]: 1000}, 2000)
    assert held(store) == {A}


def test_drafts_count_and_abandoned_ones_go(store: WeightStore, root: Path) -> None:
    for data in (A, B):
        draft = store.begin(HASHES[data], 1000)
        draft.append(data[:600])
        draft.close()
    assert store.make_room({HASHES[A]: 1000}, 1600) == 400
    assert {path.name for path in (root / "partial").iterdir()} == {HASHES[A], HASHES[B]}
    written = store.begin(HASHES[B], 1000)
    assert store.make_room({HASHES[A]: 1000}, 1599) == 400
    assert (root / "partial" / HASHES[B]).exists(), "somebody writes it"
    written.close()
    store.make_room({HASHES[A]: 1000}, 1599)
    assert {path.name for path in (root / "partial").iterdir()} == {HASHES[A]}


def test_a_pin_ends_with_its_process(store: WeightStore, root: Path) -> None:
    put(store, A, used_s=1.0)
    script = (
        "import os, sys; from pathlib import Path; from shoal.model.weight_store import *\n"
        "context = WeightStore(Path(sys.argv[1])).pinned([sys.argv[2]]); context.__enter__()\n"
        "print('pinned', flush=True); sys.stdin.read(); os._exit(1)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(root), HASHES[A]],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "pinned\n"
    with pytest.raises(ConfigError):
        store.make_room({HASHES[B]: 1000}, 1500)
    child.communicate("")
    assert child.returncode == 1
    store.make_room({HASHES[B]: 1000}, 1500)
    assert held(store) == set()
    assert not list((root / "pins").iterdir())


# --- manifests and files --------------------------------------------------------------------


def test_a_manifest_is_found_by_its_hash_and_not_if_it_was_altered(
    store: WeightStore, root: Path
) -> None:
    store.save_manifest(b"text")
    (path,) = (root / "manifests").iterdir()
    assert store.manifest_text(path.name) == b"text"
    path.write_bytes(b"other")
    assert store.manifest_text(path.name) is None


def test_files_get_their_names_back(store: WeightStore) -> None:
    put(store, A), put(store, B)
    files = {"tokenizer.json": (HASHES[A], 1000), "vocab.txt": (HASHES[B], 1000)}
    name = files_hash((one, size, content) for one, (content, size) in files.items())
    folder = store.file_folder(name, files)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "tokenizer.json": A,
        "vocab.txt": B,
    }
    assert store.file_folder(name, files) == folder
    (folder / "vocab.txt").write_bytes(C)
    store.file_folder(name, files)
    assert (folder / "vocab.txt").read_bytes() == B, "altered files are made anew"
    with pytest.raises(ConfigError, match="no file that belongs"):
        store.file_folder("0" * 32, {"../x": (HASHES[A], 1000)})
    with pytest.raises(ModelCorrupt):
        store.file_folder("0" * 32, {"vocab.txt": (HASHES[C], 1000)})
