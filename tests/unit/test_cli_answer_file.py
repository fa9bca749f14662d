"""The file that follows an answer: when it is written, what it may replace, what it refuses."""

import asyncio
import os
from types import SimpleNamespace

import pytest

from shoal.base.errors import ConfigError, ModelError
from shoal.cli import answer_file
from shoal.cli.answer_file import check_model_of, keeping, load_answer, model_of, name_of
from shoal.cli.models import OpenModel
from shoal.hf.saved_answer import pack_answer
from tests.unit.test_hf_saved_answer import saved_answer


def grown(count):
    return saved_answer(token_ids=tuple(range(count)), max_new_tokens=99)


def follow(path, counts, *, fails_with=None):
    async def work():
        async with keeping(path, grown(0)) as file:
            seen = [len(load_answer(path).token_ids)]
            for count in counts:
                file.grew(lambda count=count: grown(count))
                if file._writing is not None:
                    await asyncio.wait([file._writing])
                seen.append(len(load_answer(path).token_ids))
            if fails_with is not None:
                raise fails_with
            return seen

    return asyncio.run(work())


@pytest.mark.parametrize(("period_s", "seen"), [(0.0, [0, 1, 2, 3, 4]), (3600.0, [0, 0, 0, 0, 0])])
def test_it_is_there_at_once_follows_and_is_whole_at_the_end(tmp_path, monkeypatch, period_s, seen):
    monkeypatch.setattr(answer_file, "SAVE_PERIOD_S", period_s)
    path = tmp_path / "answer"
    assert follow(path, [1, 2, 3, 4]) == seen
    assert load_answer(path) == grown(4)
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["answer"]


def test_what_came_before_a_failure_is_in_it(tmp_path):
    path = tmp_path / "answer"
    with pytest.raises(KeyboardInterrupt):
        follow(path, [1, 2], fails_with=KeyboardInterrupt())
    assert load_answer(path) == grown(2)


def test_an_older_answer_is_replaced_and_nothing_else(tmp_path):
    path = tmp_path / "answer"
    path.write_bytes(pack_answer(grown(9)))
    follow(path, [])
    assert load_answer(path) == grown(0)
    path.write_text("my only copy")
    with pytest.raises(ConfigError, match="something else is there"):
        follow(path, [])
    assert path.read_text() == "my only copy"


def test_a_place_that_cant_be_written_is_known_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match="can't write"):
        follow(tmp_path / "nosuch" / "answer", [])


def test_a_disk_that_is_full_ends_it_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(answer_file, "SAVE_PERIOD_S", 0.0)
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "answer"

    async def work():
        async with keeping(path, grown(0)) as file:
            folder.rename(tmp_path / "elsewhere")
            for count in (1, 2):
                file.grew(lambda count=count: grown(count))
                await asyncio.wait([file._writing])

    with pytest.raises(ConfigError, match="can't write"):
        asyncio.run(work())


def test_without_a_path_there_is_no_file():
    async def work():
        async with keeping(None, grown(0)) as file:
            return file

    assert asyncio.run(work()) is None


def test_a_file_that_is_none_of_ours_is_named(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("once upon a time")
    with pytest.raises(ConfigError, match=r"--resume .*notes\.txt: this is no saved session"):
        load_answer(path)
    with pytest.raises(ConfigError, match="can't read"):
        load_answer(tmp_path / "nosuch")


def opened(name="ab" * 16, vocab_size=100):
    source = SimpleNamespace(config=SimpleNamespace(vocab_size=vocab_size))
    return OpenModel(given="./m", source=source, name=name, num_blocks=7, hidden_size=4)


def test_an_answer_of_another_model_is_refused(tmp_path):
    check_model_of(grown(3), opened(), tmp_path)
    with pytest.raises(ConfigError, match=r"abab.*/models/tiny.*\./m is cdcd"):
        check_model_of(grown(3), opened("cd" * 16), tmp_path)
    with pytest.raises(ConfigError, match="token 7 is outside the model's vocabulary of 7"):
        check_model_of(grown(3), opened(vocab_size=7), tmp_path)


def test_the_model_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert name_of("model") == str(tmp_path / "model")
    assert name_of("smollm2-135m-instruct") == "smollm2-135m-instruct"
    answer = saved_answer(given=name_of("model"))
    assert model_of(answer, tmp_path, is_from_peers=False) == answer.given
    assert model_of(answer, tmp_path, is_from_peers=True) == answer.model
    (tmp_path / "model").rmdir()
    with pytest.raises(ModelError, match=r"which is gone.*shoal generate MODEL --resume"):
        model_of(answer, tmp_path, is_from_peers=False)
