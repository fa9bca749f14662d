"""What was said in a chat: turns, files, settings."""

import json

import pytest

from shoal.base.errors import ConfigError
from shoal.cli.transcript import (
    ChatSettings,
    Transcript,
    Turn,
    load_transcript,
    save_transcript,
)

TALK = Transcript(system="Be brief.").answered("Hi", "Hello!").answered("Où?", 'Là – \n"ici"')
SETTINGS = ChatSettings(temperature=0.7, top_p=0.9, top_k=None, seed=None, max_new_tokens=100)


def test_messages_are_in_order():
    assert TALK.messages("And?") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Où?"},
        {"role": "assistant", "content": 'Là – \n"ici"'},
        {"role": "user", "content": "And?"},
    ]
    assert Transcript().messages() == []


def test_undo():
    assert TALK.without_last().turns == (Turn(user="Hi", assistant="Hello!"),)
    with pytest.raises(ConfigError, match="nothing was said"):
        Transcript().without_last()


@pytest.mark.parametrize("transcript", [TALK, Transcript()])
def test_files_bring_everything_back(tmp_path, transcript):
    path = tmp_path / "chat.json"
    save_transcript(TALK, path)
    save_transcript(transcript, path)
    assert load_transcript(path) == transcript
    assert [file.name for file in tmp_path.iterdir()] == ["chat.json"]


def test_other_files_are_not_overwritten(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("It was a dark and stormy night.")
    with pytest.raises(ConfigError, match="is no chat; choose another name"):
        save_transcript(TALK, path)
    assert path.read_text().startswith("It was")
    with pytest.raises(ConfigError, match="can't write"):
        save_transcript(TALK, tmp_path / "nosuch" / "chat.json")


def chat_file(**changes):
    content = {"format": "shoal-chat-1", "system": None, "messages": []}
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "can't read a chat"),
        ("[" * 100_000, "can't read a chat"),
        ("[]", "no chat file"),
        ("{}", '"format": "shoal-chat-1"'),
        (chat_file(format="shoal-chat-2"), "no chat file"),
        (chat_file(system=3), "system must be a text"),
        (chat_file(messages={}), "messages a list"),
        (chat_file(messages=[{"role": "user", "content": "x"}]), "has no answer"),
        (chat_file(messages=[{"role": "assistant", "content": "x"}]), "message 1 must have"),
        (chat_file(messages=[{"role": "user"}, {"role": "assistant"}]), "content of message 1"),
        (chat_file(messages=["x"]), "message 1 must have the role user"),
    ],
)
def test_what_is_no_chat_is_refused(tmp_path, text, said):
    path = tmp_path / "chat.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"chat\.json") as caught:
        load_transcript(path)
    assert said in caught.value.detail


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nosuch\.json"):
        load_transcript(tmp_path / "nosuch.json")


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("temperature=0", "temperature", 0.0),
        (" top-p = 0.5 ", "top_p", 0.5),
        ("top_p=none", "top_p", None),
        ("top_k=40", "top_k", 40),
        ("seed=7", "seed", 7),
        ("seed=off", "seed", None),
        ("max_new_tokens=5", "max_new_tokens", 5),
    ],
)
def test_settings_change_one_by_one(text, name, value):
    changed = SETTINGS.changed(text)
    assert getattr(changed, name) == value
    assert f"{name}={'none' if value is None else value}" in str(changed)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("temprature=1", "did you mean temperature?"),
        ("colour=red", "there are temperature"),
        ("temperature", "write /set temperature=VALUE"),
        ("temperature=", "write /set temperature=VALUE"),
        ("temperature=hot", "must be a number"),
        ("temperature=none", "must be a number"),
        ("temperature=-1", "0 or more"),
        ("temperature=nan", "0 or more"),
        ("top_p=2", "at most 1"),
        ("top_k=0", "1 or more"),
        ("max_new_tokens=0", "1 or more"),
    ],
)
def test_impossible_settings_are_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        SETTINGS.changed(text)
