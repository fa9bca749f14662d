"""KV cache accounting: pages of a fixed number of tokens from one budget."""

from __future__ import annotations

from collections.abc import Hashable

from shoal.base.errors import InternalError


class PageLedger:
    """Who holds how many pages. The backend's memory is never asked for more."""

    def __init__(self, cache_tokens: int, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.total = cache_tokens // page_tokens
        self._held: dict[Hashable, int] = {}
        self._used = 0

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return self.total - self._used

    def pages(self, tokens: int) -> int:
        """Pages for a sequence of this length."""
        return -(-tokens // self.page_tokens)

    def lacking(self, key: Hashable, tokens: int) -> int:
        """Pages missing for `key` to hold `tokens`; <= 0 when `hold` would succeed."""
        return self.pages(tokens) - self._held.get(key, 0) - self.free

    def hold(self, key: Hashable, tokens: int) -> None:
        """Let `key` hold exactly the pages of `tokens`.

        Raises:
            InternalError: there are not enough; ask `lacking` first.
        """
        if self.lacking(key, tokens) > 0:
            raise InternalError(f"{self.lacking(key, tokens)} cache pages overdrawn")
        pages = self.pages(tokens)
        self._used += pages - self._held.pop(key, 0)
        if pages:
            self._held[key] = pages

    def held(self, key: Hashable) -> int:
        """Pages that `key` holds."""
        return self._held.get(key, 0)

    def release(self, key: Hashable) -> None:
        """Give all of `key`'s pages back."""
        self._used -= self._held.pop(key, 0)

    def holders(self) -> set[Hashable]:
        """Everybody who holds pages (for integrity checks)."""
        return set(self._held)
