"""The person's side of a chat, over a swarm in memory that runs in the background."""

import io
import random
from contextlib import closing

import pytest

from shoal.base.errors import ConfigError
from shoal.base.spans import Span
from shoal.cli.chat_room import ChatRoom
from shoal.cli.chatting import Conversation, template_renderer
from shoal.cli.speakers import ChainSpeaker
from shoal.cli.transcript import ChatSettings, Transcript, load_transcript
from shoal.hf.loop import BackgroundLoop
from shoal.lab.network import SimulatedNetwork
from shoal.lab.swarm import ServerSpec, SimulatedSwarm
from tests.simulation.test_chat import END, TOKENIZER, ToyHead


class Stage:
    """A room with its swarm; `say` gives what came on stdout and stderr."""

    def __init__(self, capsys, background):
        self.capsys = capsys
        rng = random.Random(3)
        specs = [ServerSpec(name="a", span=Span(0, 2)), ServerSpec(name="b", span=Span(2, 4))]
        self.swarm = SimulatedSwarm(specs, SimulatedNetwork(rng), rng, num_blocks=4)
        client = background.start(self._open()).result(10)
        conversation = Conversation(
            ChainSpeaker(client, ToyHead(), "float32"),
            TOKENIZER,
            template_renderer(TOKENIZER, None),
            {END},
        )
        settings = ChatSettings(
            temperature=0.0, top_p=None, top_k=None, seed=None, max_new_tokens=5
        )
        self.room = ChatRoom(background, conversation, Transcript(), settings)

    async def _open(self):
        await self.swarm.__aenter__()
        return await self.swarm.open_client(patience_s=0.5)

    def say(self, line):
        self.room.take(line)
        return self.capsys.readouterr()


@pytest.fixture
def stage(capsys):
    with closing(BackgroundLoop()) as background:
        it = Stage(capsys, background)
        it.background = background
        yield it
        background.start(it.swarm.__aexit__()).result(10)


def test_commands(stage, tmp_path):
    room = stage.room
    assert "/retry" in stage.say("/help").err
    assert "no session yet" in stage.say("/chain").err
    assert stage.say("   ") == ("", "")
    first = stage.say("hello").out
    assert len(first) == 6
    assert "[0,2) -> " in stage.say("/chain").err
    assert stage.say("/retry").out == first
    assert len(room.transcript.turns) == 1
    stage.say("/set max_new_tokens=3")
    said = stage.say("//go on")
    assert len(said.out) == 4
    assert "cut at max_new_tokens=3" in said.err
    assert room.transcript.turns[1].user == "/go on"
    path = tmp_path / "chat.json"
    assert "2 turns written" in stage.say(f"/save {path}").err
    assert load_transcript(path) == room.transcript
    assert "1 turns left" in stage.say("/UNDO").err
    assert "system: be kind" in stage.say("/system be kind").err
    stage.say("/reset")
    assert room.transcript == Transcript(system="be kind")
    assert "no system message" in stage.say("/system none").err
    assert "2 turns from" in stage.say(f"/load {path}").err
    assert load_transcript(path) == room.transcript


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/rest", "did you mean /reset?"),
        ("/xyzzy", "/help lists"),
        ("/undo", "nothing was said"),
        ("/retry", "nothing was said"),
        ("/save", "write /save FILE"),
        ("/load /nosuch.json", "nosuch"),
        ("/set temperature=-3", "0 or more"),
        ("forbidden", "refuses the conversation"),
    ],
)
def test_what_cannot_be_done_says_why(stage, line, said):
    with pytest.raises(ConfigError) as caught:
        stage.say(line)
    assert said in caught.value.detail
    assert stage.room.transcript == Transcript()


def test_a_question_that_failed_can_be_asked_again(stage):
    stage.say("hello")
    with pytest.raises(ConfigError):
        stage.say("forbidden")
    assert len(stage.room.transcript.turns) == 1
    assert "1 turns left" in stage.say("/undo").err
    with pytest.raises(ConfigError):
        stage.say("forbidden")
    with pytest.raises(ConfigError):
        stage.say("/retry")


def talk(stage, monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    stage.room.talk(is_terminal=False)
    return stage.capsys.readouterr()


def test_a_pipe_is_read_to_its_end_or_quit(stage, monkeypatch):
    said = talk(stage, monkeypatch, "one\n\ntwo \\\nlines\n/quit\nnever\n")
    assert len(said.out.splitlines()) == 2
    users = [turn.user for turn in stage.room.transcript.turns]
    assert users == ["one", "two \nlines"]


def test_a_pipe_ends_in_the_middle_of_a_message(stage, monkeypatch):
    talk(stage, monkeypatch, "one\\")
    assert [turn.user for turn in stage.room.transcript.turns] == ["one"]


def test_the_first_failure_ends_a_pipe(stage, monkeypatch):
    with pytest.raises(ConfigError, match="did you mean /reset"):
        talk(stage, monkeypatch, "/rest\nhello\n")
    assert stage.room.transcript == Transcript()


def test_ctrl_c_at_an_answer_stops_it_and_at_two_lines_leaves(stage, monkeypatch):
    lines = iter(["go", "/help", KeyboardInterrupt, "/help", KeyboardInterrupt, KeyboardInterrupt])

    def read(prompt):
        line = next(lines)
        if line is KeyboardInterrupt:
            raise line
        return line

    monkeypatch.setattr("shoal.cli.chat_room._read_pipe", read)
    with pytest.raises(KeyboardInterrupt):
        stage.room.talk(is_terminal=False)
    assert stage.capsys.readouterr().err.count("leaves)") == 2
    assert len(stage.room.transcript.turns) == 1
