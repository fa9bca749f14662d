"""Options from a TOML file and from the environment: flag > environment > file > default.

A file has a section per command, with the command's flags without their dashes as keys,
and at its top what all commands share:

    join = ["tcp://PEERID@10.0.0.5:4001"]

    [chat]
    temperature = 0.5

    [model.inspect]
    memory = [8.0, 16.0]

The whole file is checked whichever command runs, so that a slip shows at once. Commands
are read through the framework's command tree: a new option is configurable by itself.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import typer

from shoal.base.errors import ConfigError
from shoal.cli.logs import LEVELS

FILE_NAME: Final = "shoal.toml"
FILE_BYTES_MAX: Final = 1 << 20
"""Nobody types more than a megabyte of options; a larger file is some other file."""

SHARED: Final = ("model", "join", "lan", "swarm", "invite", "threads")
"""Options that mean the same in every command: at the top of the file, or as SHOAL_NAME."""

GLOBAL: Final = ("log", "cache")
"""Top keys that are no options: SHOAL_LOG and SHOAL_CACHE."""

ALTERNATIVES: Final = (
    ("swarm", "invite"),
    ("blocks", "num-blocks"),
    ("blocks", "placement"),
    ("prompt", "prompt-file"),
    ("model", "families"),
)
"""Of each, one at a time: a flag on the command line puts the others' defaults aside."""

SECRET: Final = ("invite",)
"""Options that nobody should read over a shoulder."""

_WORDS: Final = {True: "true", False: "false"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """A file that was read and checked."""

    path: Path
    shared: Mapping[str, Any] = field(default_factory=dict)
    """Top keys, `SHARED` and `GLOBAL`."""
    sections: Mapping[tuple[str, ...], Mapping[str, Any]] = field(default_factory=dict)
    """Options by the words of their command."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What an option is, if the command line does not say otherwise."""

    name: str
    value: Any
    source: str
    """`default`, the name of an environment variable, or the file."""


def find_file(given: Path | None, environ: Mapping[str, str], folder: Path) -> Path | None:
    """The config file: `given`, $SHOAL_CONFIG, shoal.toml in `folder`, or the user's own.

    Raises:
        ConfigError: a file that was named is not there.
    """
    named = given or (Path(environ["SHOAL_CONFIG"]) if environ.get("SHOAL_CONFIG") else None)
    if named is not None:
        path = named.expanduser()
        if not path.is_file():
            how = "--config" if given is not None else "SHOAL_CONFIG"
            raise ConfigError(f"{how}: there is no file {path}")
        return path
    return next((path for path in search_path(environ, folder) if path.is_file()), None)


def search_path(environ: Mapping[str, str], folder: Path) -> tuple[Path, ...]:
    """Where a file is looked for if none was named; the first one counts, alone."""
    user = environ.get("XDG_CONFIG_HOME")
    if not user:
        user = str(Path(environ.get("HOME", "~")).expanduser() / ".config")
    return folder / FILE_NAME, Path(user) / "shoal" / FILE_NAME


def load_file(path: Path, context: Any) -> ConfigFile:
    """Read a file and check every key and value against the commands of `context`.

    Raises:
        ConfigError: not readable, not TOML, an unknown key (names the nearest), or a value
            that the option would refuse.
    """
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ConfigError(f"{path}: larger than {FILE_BYTES_MAX} bytes")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"can't read the config file {path}: {error}") from error
    shared: dict[str, Any] = {}
    sections: dict[tuple[str, ...], Mapping[str, Any]] = {}
    commands = configurable(context.command)
    for key, value in content.items():
        if isinstance(value, dict) and key in commands:
            sections.update(_sections(commands[key], value, (key,), path, context))
            continue
        name = key.replace("_", "-")
        if name not in (*SHARED, *GLOBAL):
            known = [*SHARED, *GLOBAL, *(f"[{word}]" for word in commands)]
            raise _unknown(path, f"[{key}]" if isinstance(value, dict) else key, known)
        shared[name] = _checked_shared(context, name, value, path)
    return ConfigFile(path=path, shared=shared, sections=sections)


def _checked_shared(context: Any, name: str, value: Any, path: Path) -> Any:
    if name in GLOBAL:
        if not isinstance(value, str):
            raise ConfigError(f"{path}: {name} is a text, not {value!r}")
        if name == "log" and value.lower() not in LEVELS:
            raise ConfigError(f"{path}: log = {value!r}; use one of {', '.join(LEVELS)}")
        return value
    owners = (options_of(leaf).get(name) for _, leaf in leaves(context.command))
    owner = next(found for found in owners if found is not None)
    return checked(owner, value, f"{path}: {name}", context)


def _sections(
    command: Any, content: Mapping[str, Any], words: tuple[str, ...], path: Path, context: Any
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    title = f"[{'.'.join(words)}]"
    children = getattr(command, "commands", None)
    if children is not None:
        for key, value in content.items():
            if key in children and not isinstance(value, dict):
                inner = ".".join((*words, key))
                raise ConfigError(f"{path}: [{inner}] is a section, not a value")
            if key not in children:
                nested = [f"[{'.'.join((*words, child))}]" for child in children]
                raise _unknown(path, f"[{'.'.join((*words, key))}]", nested)
            yield from _sections(children[key], value, (*words, key), path, context)
        return
    options = options_of(command)
    section: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("_", "-")
        if name not in options:
            raise _unknown(path, f"{title} {key}", list(options), key)
        section[name] = checked(options[name], value, f"{path}: {title} {key}", context)
    yield words, section


def _unknown(path: Path, what: str, known: Sequence[str], word: str | None = None) -> ConfigError:
    near = difflib.get_close_matches(word or what, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are: {', '.join(known)}"
    return ConfigError(f"{path}: unknown key {what}; {hint}")


def configurable(root: Any) -> dict[str, Any]:
    """The commands of `root` by name, without the one that shows the configuration."""
    return {word: child for word, child in root.commands.items() if word != "config"}


def leaves(root: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands under `root` that are no groups, with the words that call them."""
    if not hasattr(root, "commands"):
        yield words, root
        return
    children = root.commands if words else configurable(root)
    for word, child in children.items():
        yield from leaves(child, (*words, word))


def options_of(command: Any) -> dict[str, Any]:
    """What can be configured of a command: flags without dashes, arguments by name."""
    found = {}
    for parameter in command.params:
        if parameter.is_eager or parameter.name == "help":
            continue
        longest = max(parameter.opts, key=len)
        found[longest.lstrip("-").replace("_", "-")] = parameter
    return found


def checked(parameter: Any, value: Any, where: str, context: Any) -> Any:
    """The value as the option takes it: a list where it may be repeated.

    Raises:
        ConfigError: the option would refuse it.
    """
    if parameter.multiple and not isinstance(value, list):
        value = [value]
    if not parameter.multiple and isinstance(value, list | dict):
        raise ConfigError(f"{where}: one value, not {value!r}")
    try:
        return parameter.process_value(context, value)
    except typer.BadParameter as error:
        raise ConfigError(f"{where} = {value!r}: {error.message}") from error


def resolve(
    words: tuple[str, ...],
    command: Any,
    file: ConfigFile | None,
    environ: Mapping[str, str],
    context: Any,
) -> list[Setting]:
    """Every option of one command, and where its value comes from.

    Raises:
        ConfigError: a variable holds what the option would refuse.
    """
    return [
        _resolve_one(words, name, parameter, file, environ, context)
        for name, parameter in options_of(command).items()
    ]


def _resolve_one(
    words: tuple[str, ...],
    name: str,
    parameter: Any,
    file: ConfigFile | None,
    environ: Mapping[str, str],
    context: Any,
) -> Setting:
    is_shared = name in SHARED
    for key in (variable((*words, name)), *([variable((name,))] if is_shared else [])):
        if environ.get(key):
            text = environ[key]
            value = checked(parameter, text.split() if parameter.multiple else text, key, context)
            return Setting(name=name, value=_plain(value), source=key)
    if file is not None:
        section = file.sections.get(words, {})
        if name in section:
            return Setting(name=name, value=_plain(section[name]), source=str(file.path))
        if is_shared and name in file.shared:
            return Setting(name=name, value=_plain(file.shared[name]), source=str(file.path))
    return Setting(name=name, value=parameter.default, source="default")


def _plain(value: Any) -> Any:
    """As a file would hold it, and as JSON can."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, bool | int | float) else str(value)


def global_settings(file: ConfigFile | None, environ: Mapping[str, str]) -> list[Setting]:
    """What `GLOBAL` names: the log level, and the cache folder (None: the default one)."""
    found = []
    for name, default in zip(GLOBAL, ("warning", None), strict=True):
        setting = Setting(name=name, value=default, source="default")
        if file is not None and name in file.shared:
            setting = Setting(name=name, value=file.shared[name], source=str(file.path))
        key = variable((name,))
        if environ.get(key):
            setting = Setting(name=name, value=environ[key], source=key)
        found.append(setting)
    return found


def variable(words: Iterable[str]) -> str:
    """The environment variable of an option: SHOAL_CHAT_MAX_NEW_TOKENS."""
    return "_".join(("shoal", *words)).replace("-", "_").upper()


def default_map(
    context: Any, file: ConfigFile | None, environ: Mapping[str, str], arguments: Sequence[str]
) -> dict[str, Any]:
    """What the framework takes for options that the command line leaves out, by command.

    Raises:
        ConfigError: a variable of the command that `arguments` call holds nonsense.
    """
    defaults: dict[str, Any] = {}
    for words, command in leaves(context.command):
        if arguments and words[0] not in arguments:
            continue  # nobody asks: its variables may be wrong
        options = options_of(command)
        mine = {
            options[setting.name].name: setting.value
            for setting in resolve(words, command, file, environ, context)
            if setting.source != "default" and not _is_put_aside(setting.name, arguments)
        }
        into = defaults
        for word in words[:-1]:
            into = into.setdefault(word, {})
        into[words[-1]] = mine
    return defaults


def _is_put_aside(name: str, arguments: Sequence[str]) -> bool:
    rivals = {rival for group in ALTERNATIVES if name in group for rival in group} - {name}
    flags = {argument.partition("=")[0] for argument in arguments}
    return any(f"--{rival}" in flags for rival in rivals)


def as_toml(value: Any) -> str:
    """A value as the file would hold it."""
    if isinstance(value, bool):
        return _WORDS[value]
    if isinstance(value, list | tuple):
        return "[" + ", ".join(as_toml(one) for one in value) + "]"
    if isinstance(value, int | float):
        return repr(value)
    # A TOML basic string is a JSON string but for DEL, which no option holds.
    return json.dumps(str(value), ensure_ascii=False)
