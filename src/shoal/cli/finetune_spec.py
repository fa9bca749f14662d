"""A training run as its checkpoint remembers it: what to learn from what, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from shoal.base.errors import ConfigError
from shoal.hf.tuning_build import Method
from shoal.hf.tuning_examples import Prepared, label_names, prepare, split
from shoal.hf.tuning_lines import Line, read_lines
from shoal.hf.tuning_settings import TuningSettings
from shoal.server.training_limits import ROWS_PER_PASS_MAX

LENGTH_MAX_LIMIT: Final = 65_536
"""Tokens of one example in this process; what servers run is `Examples.check_lengths`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataChoice:
    """Which examples to learn, and which to keep back."""

    path: Path
    eval_path: Path | None
    eval_share: float
    length_max: int
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.eval_share < 1:
            raise ConfigError(f"--eval-share {self.eval_share:g}: from 0 to less than 1")
        if not 2 <= self.length_max <= LENGTH_MAX_LIMIT:
            raise ConfigError(f"--max-length {self.length_max}: from 2 to {LENGTH_MAX_LIMIT}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """The examples of a run, in tokens."""

    learned: Prepared
    kept_back: Prepared | None
    label_names: tuple[str, ...]
    """Empty for texts."""
    is_chat: bool = False
    """Whether they go through the chat template, as with `shoal chat`, not `generate`."""

    def fingerprint(self) -> str:
        """Changes when the examples to learn do."""
        return self.learned.fingerprint()

    def check_lengths(self, method: Method) -> None:
        """See that servers can run every example in one pass, the prompt before it included.

        Raises:
            ConfigError: some are too long.
        """
        all_of_them = self.learned.examples + (
            () if self.kept_back is None else self.kept_back.examples
        )
        longest = max(len(one.ids) for one in all_of_them)
        prompt = 0 if method.name == "lora" else method.prompt_tokens
        if longest + prompt > ROWS_PER_PASS_MAX:
            raise ConfigError(
                f"an example of {longest} tokens after a prompt of {prompt}: servers run at most "
                f"{ROWS_PER_PASS_MAX} in one pass: cut examples with --max-length "
                f"{max(2, ROWS_PER_PASS_MAX - prompt)}, or learn without servers (--local)"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A new run, as the command line asks for it."""

    given: str
    """MODEL."""
    out: Path
    data: DataChoice
    method: Method
    settings: TuningSettings
    epochs: float | None
    """Decides how many steps there are; None: the settings do."""
    start: Path | None = None
    """An adapter to begin at; the method is its own then."""
    has_rate: bool = True
    """Whether the settings' learning rate was asked for: else it is the method's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """All that a run depends on, besides servers."""

    model: str
    """The model's hash."""
    given: str
    """How the person named it."""
    data: DataChoice
    method: Method
    settings: TuningSettings
    fingerprint: str
    """Of the examples."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        value = asdict(self)
        value["data"]["path"] = str(self.data.path)
        value["data"]["eval_path"] = (
            None if self.data.eval_path is None else str(self.data.eval_path)
        )
        value["method"]["targets"] = list(self.method.targets)
        return value

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], path: Path) -> RunSpec:
        """The reverse; `path` is the file it comes from.

        Raises:
            ConfigError: it is none.
        """
        try:
            data = dict(value["data"])
            data["path"] = Path(data["path"])
            data["eval_path"] = None if data["eval_path"] is None else Path(data["eval_path"])
            method = dict(value["method"])
            method["targets"] = tuple(method["targets"])
            return cls(
                model=str(value["model"]),
                given=str(value["given"]),
                data=DataChoice(**data),
                method=Method(**method),
                settings=TuningSettings(**value["settings"]),
                fingerprint=str(value["fingerprint"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} does not say what was trained: {error}") from error


def read_examples(choice: DataChoice, method: Method, tokenizer: Any) -> Examples:
    """Read, split and tokenise.

    Raises:
        ConfigError: a file or a line that can't be used; names it.
    """
    lines = read_lines(choice.path)
    _check_kind(lines, method, choice.path)
    if choice.eval_path is not None:
        back = tuple(read_lines(choice.eval_path))
        _check_kind(back, method, choice.eval_path)
        learned = tuple(lines)
    else:
        learned, back = split(lines, share=choice.eval_share, seed=choice.seed)
    names = label_names(learned) if method.name == "classifier" else ()
    made = _prepared(learned, choice.path, choice, tokenizer, names)
    kept_back = None
    if back:
        kept_back = _prepared(back, choice.eval_path or choice.path, choice, tokenizer, names)
    is_chat = lines[0].kind == "chat"
    return Examples(learned=made, kept_back=kept_back, label_names=names, is_chat=is_chat)


def _prepared(
    lines: tuple[Line, ...], path: Path, choice: DataChoice, tokenizer: Any, names: tuple[str, ...]
) -> Prepared:
    try:
        return prepare(lines, tokenizer, length_max=choice.length_max, label_names=names)
    except ConfigError as error:
        raise ConfigError(f"{path}, {error.detail}") from error


def _check_kind(lines: Any, method: Method, path: Path) -> None:
    has_labels = lines[0].kind == "label"
    if has_labels and method.name != "classifier":
        raise ConfigError(f"{path} has labels: learn them with --method classifier")
    if not has_labels and method.name == "classifier":
        raise ConfigError(f'{path} has no labels: a classifier needs {{"text", "label"}} lines')
