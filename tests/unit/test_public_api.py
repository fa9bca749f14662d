"""Frozen surfaces: the names that `shoal` exports and the fields of every message.

A change here is a promise changed: it needs a news fragment in changes/, and for the
wire also the version rules of docs/protocol.md.
"""

import importlib.util
from pathlib import Path

import msgspec
import pytest

import shoal

ROOT = Path(__file__).resolve().parents[2]

PUBLIC_NAMES = [
    "Address",
    "BlockBackend",
    "PeerId",
    "SessionId",
    "ShoalError",
    "Span",
    "Transport",
    "__version__",
    "parse_address",
]


def protocol_table():
    path = ROOT / "scripts" / "protocol_table.py"
    spec = importlib.util.spec_from_file_location("protocol_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_public_names_are_frozen():
    assert sorted(shoal.__all__) == PUBLIC_NAMES


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_name_resolves(name):
    assert getattr(shoal, name) is not None
    assert name in dir(shoal)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Shard'"):
        _ = shoal.Shard


def test_documented_messages_are_the_real_ones():
    script = protocol_table()
    documented = script.documented(script.DOCUMENT.read_text(encoding="utf-8"))
    assert documented == script.render(), (
        "docs/protocol.md and shoal.wire.messages differ. If the change is meant: check the "
        "version rules in docs/protocol.md, add a news fragment in changes/, then run "
        "scripts/protocol_table.py --write"
    )


def test_message_tags_are_unique():
    tags = [struct.__struct_config__.tag for struct in protocol_table().wire_structs()]
    tags = [tag for tag in tags if tag is not None]
    assert len(tags) == len(set(tags))


def test_messages_are_arrays_that_tolerate_new_fields():
    for struct in protocol_table().wire_structs():
        config = struct.__struct_config__
        assert config.array_like, struct
        assert config.frozen, struct
        assert not config.forbid_unknown_fields, struct


def test_required_fields_come_before_defaults():
    for struct in protocol_table().wire_structs():
        required = [field.required for field in msgspec.structs.fields(struct)]
        assert required == sorted(required, reverse=True), struct
