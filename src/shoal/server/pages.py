"""KV cache accounting: pages of a fixed number of tokens from one budget.

A server that goes to other blocks has two caches for a while, and so two budgets: sequences of
the old blocks are *retired* and share what they had, all others share a new one.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from shoal.base.errors import InternalError


class PageLedger:
    """Who holds how many pages. The backend's memory is never asked for more."""

    def __init__(self, cache_tokens: int, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self._held: dict[Hashable, int] = {}
        self._total = {False: cache_tokens // page_tokens, True: 0}
        """Of the budget, and of the retired one."""
        self._used = {False: 0, True: 0}
        """The same."""
        self._retired: set[Hashable] = set()

    @property
    def total(self) -> int:
        """Pages that there are, but for the retired."""
        return self._total[False]

    def total_for(self, key: Hashable) -> int:
        """Pages of the budget that `key` draws on."""
        return self._total[self.is_retired(key)]

    @property
    def free(self) -> int:
        """Pages nobody holds, but for the retired."""
        return self.total - self._used[False]

    @property
    def used(self) -> int:
        """Pages that are held, those of the retired too."""
        return self._used[False] + self._used[True]

    def pages(self, tokens: int) -> int:
        """Pages for a sequence of this length."""
        return -(-tokens // self.page_tokens)

    def lacking(self, key: Hashable, tokens: int) -> int:
        """Pages missing for `key` to hold `tokens`; <= 0 when `hold` would succeed."""
        free = self.total_for(key) - self._used[self.is_retired(key)]
        return self.pages(tokens) - self._held.get(key, 0) - free

    def hold(self, key: Hashable, tokens: int) -> None:
        """Let `key` hold exactly the pages of `tokens`.

        Raises:
            InternalError: there are not enough; ask `lacking` first.
        """
        if self.lacking(key, tokens) > 0:
            raise InternalError(f"{self.lacking(key, tokens)} cache pages overdrawn")
        pages = self.pages(tokens)
        self._used[self.is_retired(key)] += pages - self._held.pop(key, 0)
        if pages:
            self._held[key] = pages

    def held(self, key: Hashable) -> int:
        """Pages that `key` holds."""
        return self._held.get(key, 0)

    def release(self, key: Hashable) -> None:
        """Give all of `key`'s pages back."""
        self._used[self.is_retired(key)] -= self._held.pop(key, 0)

    def holders(self) -> set[Hashable]:
        """Everybody who holds pages (for integrity checks)."""
        return set(self._held)

    # --- a move to other blocks ----------------------------------------------------------

    def retire(self, keys: Iterable[Hashable], cache_tokens: int) -> None:
        """These keep the budget there was; all others share a new one of so many tokens.

        Raises:
            InternalError: others are still retired.
        """
        if self._retired:
            raise InternalError("one move at a time")
        self._retired = set(keys)
        self._total = {False: cache_tokens // self.page_tokens, True: self.total}
        used = sum(self._held.get(key, 0) for key in self._retired)
        self._used = {False: self._used[False] - used, True: used}

    def assign(self, key: Hashable, *, is_retired: bool) -> None:
        """Say which budget `key`, which holds nothing yet, is to draw on, if there are two."""
        if is_retired and self._total[True]:
            self._retired.add(key)
        else:
            self._retired.discard(key)

    def is_retired(self, key: Hashable) -> bool:
        """Which budget `key` draws on."""
        return key in self._retired

    def end_retirement(self) -> None:
        """The old cache is gone.

        Raises:
            InternalError: somebody still holds pages of it.
        """
        if self._used[True]:
            raise InternalError(f"{self._used[True]} pages of the old cache are held")
        self._retired.clear()
        self._total[True] = 0
