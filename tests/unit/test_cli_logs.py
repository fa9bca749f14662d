"""Bars on stderr."""

import io

import pytest

from shoal.cli.logs import progress_bar


class Terminal(io.StringIO):
    """What a command writes to a person."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_bytes", [True, False])
def test_a_bar_is_drawn_only_when_there_is_something_to_tell(
    monkeypatch: pytest.MonkeyPatch, is_bytes: bool
) -> None:
    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar(is_bytes=is_bytes):
        pass
    assert not stderr.getvalue()
    with progress_bar(is_bytes=is_bytes) as show:
        show("fetching", 1, 2)
        show("fetching", 2, 2)
    assert "fetching" in stderr.getvalue()
    assert "/?" not in stderr.getvalue()
