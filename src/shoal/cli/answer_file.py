"""The file of an answer that is coming: `shoal generate --save` and `--resume`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from shoal.base.errors import ConfigError, ModelError
from shoal.cli.models import OpenModel
from shoal.hf.saved_answer import FILE_BYTES_MAX, SavedAnswer, pack_answer, unpack_answer
from shoal.hf.saved_session import read_file, write_file

SAVE_PERIOD_S: Final = 0.5
"""Between two writings: what came since is computed again, the same tokens."""


class AnswerFile:
    """Keeps a file up to date beside the work; a disk that is slow only makes it rarer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writing: asyncio.Future[None] | None = None
        self._latest: Callable[[], SavedAnswer] | None = None
        self._written_s = 0.0

    async def begin(self, answer: SavedAnswer) -> None:
        """Write it at once: a place that can't be written should be known at the start.

        Raises:
            ConfigError: it can't be written, or something else is there.
        """
        await asyncio.to_thread(_check_ours, self._path)
        self._latest = lambda: answer
        await self.end()

    def grew(self, so_far: Callable[[], SavedAnswer]) -> None:
        """There are more tokens; what `so_far` gives then is written soon.

        Raises:
            ConfigError: the last writing failed.
        """
        self._latest = so_far
        if self._writing is not None and not self._writing.done():
            return
        self._check()
        if asyncio.get_running_loop().time() - self._written_s >= SAVE_PERIOD_S:
            self._start()

    async def end(self) -> None:
        """Write what is not written yet.

        Raises:
            ConfigError: it can't be written.
        """
        if self._writing is not None:
            await asyncio.wait([self._writing])
            self._check()
        if self._latest is not None:
            self._start()
            await self.end()

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        so_far, self._latest = self._latest, None
        if so_far is not None:
            self._written_s = loop.time()
            self._writing = loop.run_in_executor(None, _write, self._path, so_far())

    def _check(self) -> None:
        done, self._writing = self._writing, None
        if done is not None:
            done.result()


@asynccontextmanager
async def keeping(path: Path | None, answer: SavedAnswer) -> AsyncIterator[AnswerFile | None]:
    """A file that follows the answer, also to its end by Ctrl-C or an error; None: no file.

    Raises:
        ConfigError: it can't be written.
    """
    if path is None:
        yield None
        return
    file = AnswerFile(path)
    await file.begin(answer)
    try:
        yield file
    finally:
        await file.end()


def load_answer(path: Path) -> SavedAnswer:
    """The answer in a file of `--save`.

    Raises:
        ConfigError: no such file, or not one of ours; says what is wrong.
    """
    data = read_file(path, FILE_BYTES_MAX)
    try:
        return unpack_answer(data)
    except ConfigError as error:
        raise ConfigError(f"--resume {path}: {error.detail}") from error


def check_model_of(answer: SavedAnswer, model: OpenModel, path: Path) -> None:
    """See that the answer belongs to this model.

    Raises:
        ConfigError: to another one, or its tokens are not of this vocabulary.
    """
    if answer.model != model.name:
        raise ConfigError(
            f"--resume {path}: the answer is of model {answer.model} ({answer.given}), but "
            f"{model.given} is {model.name}: name the model it belongs to"
        )
    vocab_size = int(model.source.config.vocab_size)
    token = max((*_own_ids(answer, vocab_size), *answer.token_ids), default=0)
    if token >= vocab_size:
        raise ConfigError(
            f"--resume {path}: token {token} is outside the model's vocabulary of {vocab_size}"
        )


def _own_ids(answer: SavedAnswer, vocab_size: int) -> tuple[int, ...]:
    """The prompt without the tokens that stand for a learned one: `shoal.hf.tuning_prompted`."""
    count = 0
    if answer.adapter:
        numbered = enumerate(answer.prompt_ids)
        count = next((at for at, token in numbered if token != vocab_size + at), 0)
    return answer.prompt_ids[count:]


def model_of(answer: SavedAnswer, path: Path, *, is_from_peers: bool) -> str:
    """MODEL where the person names none.

    Raises:
        ModelError: it was a file or a directory that is no longer there.
    """
    if is_from_peers:
        return answer.model
    if Path(answer.given).is_absolute() and not Path(answer.given).exists():
        raise ModelError(
            f"--resume {path}: the model was at {answer.given}, which is gone: name it, as in "
            f"shoal generate MODEL --resume {path}"
        )
    return answer.given


def name_of(given: str) -> str:
    """How a model is named in the file: so that another folder's shell finds it too."""
    path = Path(given)
    return str(path.resolve()) if path.exists() else given


def _write(path: Path, answer: SavedAnswer) -> None:
    write_file(path, pack_answer(answer))


def _check_ours(path: Path) -> None:
    """Nothing but another saved answer may be overwritten."""
    if not path.exists():
        return
    try:
        unpack_answer(read_file(path, FILE_BYTES_MAX))
    except ConfigError as error:
        raise ConfigError(f"--save {path}: something else is there; choose another name") from error
