"""What weights are named by: the hash of their bytes.

A tensor or a file is named by its content hash, a model by the hash of its manifest. Both are
BLAKE2b-128 with a personalisation of their own, so that one never passes for the other. They
are shown as 32 hex characters and travel as 16 bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Final

from shoal.base.errors import ConfigError

CONTENT_BYTES: Final = 16
"""128 bits: nobody finds other bytes for a given hash."""

SIDE_FILES: Final = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.gguf",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
"""Names of files that may belong to a model beside its weights; no other is offered or taken.
`tokenizer.gguf` is the metadata of a GGUF file without its tensors."""

_HEX_CHARS: Final = 2 * CONTENT_BYTES


def content_digest() -> Any:
    """A running hash (as of hashlib) over a tensor's stored bytes, or a file's."""
    return hashlib.blake2b(digest_size=CONTENT_BYTES, person=b"shoal-tensor")


def content_hash(data: bytes | memoryview) -> str:
    """The content hash of a tensor or a file in one piece: 32 hex characters."""
    digest = content_digest()
    digest.update(data)
    return str(digest.hexdigest())


def manifest_hash(text: bytes) -> str:
    """A model's name: the hash of its manifest's text, 32 hex characters."""
    return hashlib.blake2b(text, digest_size=CONTENT_BYTES, person=b"shoal-model").hexdigest()


def is_hash(text: str) -> bool:
    """Whether `text` is a hash as we write it: 32 lower-case hex characters."""
    return len(text) == _HEX_CHARS and set(text) <= set("0123456789abcdef")


def hash_bytes(text: str) -> bytes:
    """The 16 bytes of a hash.

    Raises:
        ConfigError: not 32 lower-case hex characters.
    """
    if not is_hash(text):
        raise ConfigError(f"not a hash: {text!r} (expected {_HEX_CHARS} hex characters)")
    return bytes.fromhex(text)


def files_hash(files: Iterable[tuple[str, int, str]]) -> str:
    """What a set of files is named by; each is (name, bytes, content hash in hex)."""
    rows = sorted([name, num_bytes, content] for name, num_bytes, content in files)
    text = json.dumps(["shoal-files-1", rows], separators=(",", ":")).encode()
    return hashlib.blake2b(text, digest_size=CONTENT_BYTES, person=b"shoal-files").hexdigest()
