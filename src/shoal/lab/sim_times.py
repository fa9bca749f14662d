"""How long a request's parts take on a chain, by the cost model; asked often, so remembered."""

from __future__ import annotations

from functools import lru_cache

from shoal.base.spans import Span
from shoal.lab.sim_scenario import with_lengths
from shoal.plan.cost import Chain, Prices, chain_s, entry_after, hop_s, prices
from shoal.plan.spec import Problem

LENGTHS_KEPT = 4096
"""Prices of so many lengths of prompts are kept: replays come at any length."""


class Times:
    """Seconds of prompts, steps and replays of one problem's clients."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._prompt = lru_cache(LENGTHS_KEPT)(self._prompt_prices)
        self._step = lru_cache(None)(self._step_prices)

    def prompt_s(self, client: int, chain: Chain, tokens: int) -> float:
        """From sending a prompt of `tokens` to its answer."""
        return chain_s(self._prompt(client, tokens), chain)

    def step_s(self, client: int, chain: Chain) -> float:
        """One decode step alone."""
        return chain_s(self._step(client), chain)

    def service_s(self, client: int, chain: Chain, tokens_in: int, tokens_out: int) -> float:
        """A whole request that does not wait."""
        prompt_s = self.prompt_s(client, chain, tokens_in)
        return prompt_s + (tokens_out - 1) * self.step_s(client, chain)

    def replay_s(self, client: int, before: Chain, chain: Chain, tokens: int) -> float:
        """Until `tokens` positions are where the chain lacks them.

        Blocks that the same server ran `before` keep theirs; the others are prefilled anew
        from the log of whoever comes before them.
        """
        price = self._prompt(client, tokens)
        total = 0.0
        for index, hop in enumerate(chain):
            held = [old.span for old in before if old.server == hop.server]
            lacking = len(hop.span) - sum(_shared(hop.span, span) for span in held)
            if lacking > 0:
                entry_s = price.arrive[hop.server]
                if index:
                    entry_s = entry_after(price, chain[index - 1].server, hop.server)
                total += hop_s(entry_s, price.block[hop.server], lacking)
        return total

    def _prompt_prices(self, client: int, tokens: int) -> Prices:
        return prices(with_lengths(self._problem, tokens, 1), client, "request")

    def _step_prices(self, client: int) -> Prices:
        return prices(self._problem, client, "token")


def _shared(one: Span, other: Span) -> int:
    return max(0, min(one.end, other.end) - max(one.start, other.start))
