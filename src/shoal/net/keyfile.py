"""Ed25519 keys in files: PEM (PKCS8), readable by their owner only."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from shoal.base.errors import ConfigError

_PEM_START = b"-----BEGIN "

KEY_FILE_BYTES_MAX = 64 << 10
"""A key file is a few hundred bytes; anything above this is some other file."""


def read_key(path: Path) -> tuple[str, Ed25519PrivateKey]:
    """The text before the PEM block (a swarm's name, or empty) and the key.

    Raises:
        ConfigError: no such file, no Ed25519 key, or readable by others.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(KEY_FILE_BYTES_MAX + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"no key file at {path}") from error
    except OSError as error:
        raise ConfigError(f"can't read the key file {path}: {error.strerror}") from error
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(
            f"the key file {path} is open to other users (mode {mode:o}); run: chmod 600 {path}"
        )
    return _parse(path, content)


def _parse(path: Path, content: bytes) -> tuple[str, Ed25519PrivateKey]:
    preamble, start, rest = content.partition(_PEM_START)
    try:
        text = preamble.decode("utf-8").strip()
        key = load_pem_private_key(start + rest, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} holds no private key in PEM form; name another file or delete it "
            "(a new key is a new identity)"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} holds a key of another kind; expected Ed25519")
    return text, key


def create_key_file(path: Path, key: Ed25519PrivateKey, preamble: str = "") -> bool:
    """Write `key` to `path` unless the file exists; returns whether it was written.

    The file appears whole or not at all, with mode 0600.

    Raises:
        ConfigError: the directory can't be written.
    """
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    content = (f"{preamble}\n".encode() if preamble else b"") + pem
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(f"can't write the key file {path}: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)  # unlike a rename, never replaces a key that is there
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigError(f"can't write the key file {path}: {error.strerror}") from error
    finally:
        draft.unlink()
    return True
