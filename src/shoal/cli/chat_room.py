"""The person's side of a chat: lines in, commands, answers out, Ctrl-C."""

from __future__ import annotations

import difflib
import secrets
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shoal.base.errors import ConfigError, SessionTooLong, ShoalError
from shoal.base.ids import short
from shoal.cli.answering import move_text
from shoal.cli.chatting import Conversation, Listener, Reply
from shoal.cli.transcript import (
    ChatSettings,
    Transcript,
    load_transcript,
    save_transcript,
)
from shoal.hf.loop import BackgroundLoop
from shoal.hf.sampling import Sampler

if TYPE_CHECKING:
    from shoal.client.session import Recovery

PROMPT: Final = "> "
CONTINUED: Final = ". "

HELP: Final = """\
/help             this list
/reset            forget everything that was said (the system message stays)
/undo             forget the last message and its answer
/retry            answer the last message again
/system [TEXT]    show or set the system message; /system none removes it
/save FILE        write the chat as JSON
/load FILE        go on with a saved chat
/set [NAME=VALUE] show or change: temperature, top_p, top_k, seed, max_new_tokens
/chain            which servers answer, and what they hold
/quit             leave (or Ctrl-D)
A line that ends with a backslash goes on in the next one. //text says "/text".
Ctrl-C stops an answer."""


class ChatRoom:
    """Reads until there is no more; keeps what was said."""

    def __init__(
        self,
        background: BackgroundLoop,
        conversation: Conversation,
        transcript: Transcript,
        settings: ChatSettings,
    ) -> None:
        self.transcript = transcript
        self.settings = settings
        self._background = background
        self._conversation = conversation
        self._unanswered: str | None = None
        """A question whose answer failed or was stopped at once: for /retry."""
        self._num_interrupts = 0
        """Ctrl-C since the last line."""
        self._is_over = False
        self._is_midline = False
        """Whether the answer that comes has left the cursor within a line."""
        self._commands: dict[str, Callable[[str], None]] = {
            "help": self._help,
            "reset": self._reset,
            "undo": self._undo,
            "retry": self._retry,
            "system": self._system,
            "save": self._save,
            "load": self._load,
            "set": self._set,
            "chain": self._chain,
            "quit": self._quit,
            "exit": self._quit,
        }

    def greet(self, model: str) -> None:
        """Say hello, and what there is already."""
        note(f"{model}: type a message, or /help")
        if self.transcript.turns:
            note(f"{len(self.transcript.turns)} turns are loaded")

    def talk(self, *, is_terminal: bool) -> None:
        """Until the end of the input, /quit, or a second Ctrl-C.

        Raises:
            KeyboardInterrupt: the second Ctrl-C.
            ShoalError: without a terminal, the first thing that failed.
        """
        read = _terminal_reader() if is_terminal else _read_pipe
        while not self._is_over:
            try:
                line = _read_whole(read)
            except KeyboardInterrupt:
                if self._num_interrupts:
                    raise
                self._num_interrupts += 1
                note("(Ctrl-C again or Ctrl-D leaves)")
                continue
            if line is None:
                return
            self._num_interrupts = 0
            try:
                self.take(line)
            except ShoalError as error:
                if not is_terminal:
                    raise
                note(f"error: {error.detail or type(error).__name__}")

    def take(self, line: str) -> None:
        """One line: a message or a command.

        Raises:
            ConfigError: a command that can't be done; says why.
            ShoalError: the answer failed; the transcript is as before.
        """
        text = line.strip()
        if not text:
            return
        if not text.startswith("/") or text.startswith("//"):
            self._respond(self.transcript, text.removeprefix("/") if text[0] == "/" else line)
            return
        name, _, rest = text[1:].partition(" ")
        command = self._commands.get(name.lower())
        if command is None:
            near = difflib.get_close_matches(name.lower(), self._commands, n=1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists the commands"
            raise ConfigError(f"no command /{name}; {hint}")
        command(rest.strip())

    # --- answers -----------------------------------------------------------------------

    def _respond(self, before: Transcript, question: str) -> None:
        """Ask after what `before` holds, and keep the answer."""
        self._unanswered = question
        seed = self.settings.seed
        sampler = Sampler(
            temperature=self.settings.temperature,
            seed=secrets.randbits(63) if seed is None else seed,
            top_k=self.settings.top_k,
            top_p=self.settings.top_p,
        )
        try:
            reply = self._wait(before.messages(question), sampler)
        except BaseException:
            if self._is_midline:
                _print_piece("\n")
            raise
        _print_piece("\n")
        if reply.is_stopped and not reply.text:
            note("stopped before the first word; /retry asks again")
            return
        self._unanswered = None
        self.transcript = before.answered(question, reply.text)
        self._tell(reply)

    def _wait(self, messages: list[dict[str, str]], sampler: Sampler) -> Reply:
        self._is_midline = False
        listener = Listener(text=self._show, repaired=self._show_repair)
        answer = self._background.start(
            self._conversation.answer(messages, sampler, self.settings.max_new_tokens, listener)
        )
        try:
            try:
                return answer.result()
            except KeyboardInterrupt:
                self._num_interrupts += 1
                self._background.call_soon(self._conversation.stop)
                return answer.result()
        except SessionTooLong as error:
            raise SessionTooLong(
                f"{error.detail}; the conversation is too long: /undo, or /reset"
            ) from error

    def _show(self, text: str) -> None:
        self._is_midline = not text.endswith("\n")
        _print_piece(text)

    def _show_repair(self, recovery: Recovery) -> None:
        self.break_line()
        _tell_repair(recovery)

    def break_line(self) -> None:
        """A remark amid the answer begins a line, where a person sees both."""
        if self._is_midline and sys.stdout.isatty():
            note("")
            self._is_midline = False

    def _tell(self, reply: Reply) -> None:
        ending = ", stopped" if reply.is_stopped else ""
        if reply.is_cut:
            ending = f", cut at max_new_tokens={self.settings.max_new_tokens}"
        note(
            f"[{reply.num_tokens} tokens{ending}; first after "
            f"{reply.speed.time_to_first_token_s:.2f} s, then {reply.speed.tokens_per_s:.1f} "
            f"tokens/s; {reply.prompt_tokens} before them, {reply.kept_tokens} already there]"
        )

    # --- commands ----------------------------------------------------------------------

    def _help(self, rest: str) -> None:
        note(HELP)

    def _reset(self, rest: str) -> None:
        self.transcript = replace(self.transcript, turns=())
        self._unanswered = None
        note("forgotten")

    def _undo(self, rest: str) -> None:
        if self._unanswered is None:
            self.transcript = self.transcript.without_last()
        self._unanswered = None
        note(f"{len(self.transcript.turns)} turns left")

    def _retry(self, rest: str) -> None:
        if self._unanswered is not None:
            self._respond(self.transcript, self._unanswered)
            return
        before = self.transcript.without_last()
        if not self.settings.temperature or self.settings.seed is not None:
            note("the same answer is likely: /set temperature=0.7 or /set seed=none changes that")
        self._respond(before, self.transcript.turns[-1].user)

    def _system(self, rest: str) -> None:
        if rest:
            text = None if rest.lower() == "none" else rest
            self.transcript = replace(self.transcript, system=text)
        shown = self.transcript.system
        note("no system message of ours" if shown is None else f"system: {shown}")

    def _save(self, rest: str) -> None:
        path = _path(rest, "save")
        save_transcript(self.transcript, path)
        note(f"{len(self.transcript.turns)} turns written to {path}")

    def _load(self, rest: str) -> None:
        path = _path(rest, "load")
        self.transcript = load_transcript(path)
        self._unanswered = None
        note(f"{len(self.transcript.turns)} turns from {path}")

    def _set(self, rest: str) -> None:
        if rest:
            self.settings = self.settings.changed(rest)
        note(str(self.settings))

    def _chain(self, rest: str) -> None:
        session = self._conversation.session
        if session is None:
            note("no session yet: say something first")
            return
        chain = " -> ".join(f"{short(stage.peer)} {stage.span}" for stage in session.chain)
        note(f"{chain}; {session.length} positions, numerics {session.numerics}")
        for recovery in session.recoveries:
            _tell_repair(recovery)
        for move in session.moves:
            note(move_text(move))

    def _quit(self, rest: str) -> None:
        self._is_over = True


def note(text: str) -> None:
    """Something that is no answer: on stderr."""
    print(text, file=sys.stderr, flush=True)


def _path(rest: str, command: str) -> Path:
    if not rest:
        raise ConfigError(f"write /{command} FILE")
    return Path(rest).expanduser()


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _tell_repair(recovery: Recovery) -> None:
    lost = ", ".join(short(peer) for peer in recovery.lost)
    found = ", ".join(short(peer) for peer in recovery.replacement)
    note(
        f"[repaired at position {recovery.position}: {lost or 'a link'} replaced"
        f"{f' by {found}' if found else ''}, {recovery.replayed_tokens} tokens replayed, "
        f"{recovery.pause_s:.2f} s]"
    )


def _terminal_reader() -> Callable[[str], str | None]:
    try:
        import readline  # noqa: F401 - gives input() editing and the lines before
    except ImportError:
        pass  # a Python without it: plain lines

    def read(prompt: str) -> str | None:
        if not sys.stdout.isatty():
            # Answers go elsewhere: the prompt must not go there too.
            print(prompt, end="", file=sys.stderr, flush=True)
            prompt = ""
        try:
            return input(prompt)
        except EOFError:
            note("")
            return None

    return read


def _read_pipe(prompt: str) -> str | None:
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _read_whole(read: Callable[[str], str | None]) -> str | None:
    """A line with those that continue it; None at the end of the input."""
    line = read(PROMPT)
    while line is not None and line.endswith("\\"):
        more = read(CONTINUED)
        if more is None:
            return line[:-1]
        line = f"{line[:-1]}\n{more}"
    return line
