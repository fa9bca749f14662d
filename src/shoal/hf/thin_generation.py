"""The tokens of `shoal.hf.generation.generate` from a head server: nothing is computed here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import aclosing

from shoal.base.errors import BadInput, ConfigError
from shoal.base.head import Choosing
from shoal.client.thin_session import ThinSession, Wish
from shoal.hf.generation import Token
from shoal.hf.sampling import Sampler


async def generate_thin(
    session: ThinSession,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampler: Sampler,
    eos_ids: Collection[int] = (),
    past_ids: Sequence[int] = (),
) -> AsyncIterator[Token]:
    """New tokens after `prompt_ids`, as they come; see `generate`.

    Raises:
        BadInput: an empty prompt, or an option that can't be.
        ConfigError: less than one new token.
        SessionTooLong, NoRouteError, PeerError: as `ThinSession.tokens`.
    """
    if not prompt_ids:
        raise BadInput("the prompt has no tokens; give at least one character of text")
    if max_new_tokens < 1:
        raise ConfigError(f"can't generate {max_new_tokens} tokens; ask for at least one")
    clock = asyncio.get_running_loop().time
    session.append(prompt_ids)
    answer_start = session.length
    session.append(past_ids, is_one_by_one=True)
    wish = Wish(
        count=max_new_tokens,
        choosing=choosing_of(sampler),
        answer_start=answer_start,
        end_ids=eos_ids,
    )
    num_given = 0
    async with aclosing(session.tokens(wish)) as tokens:
        async for chosen in tokens:
            num_given += 1
            is_last = num_given == max_new_tokens or chosen.id in eos_ids
            yield Token(id=chosen.id, at_s=clock(), is_last=is_last)


def choosing_of(sampler: Sampler) -> Choosing:
    """The sampler as it travels."""
    return Choosing(
        temperature=sampler.temperature,
        seed=sampler.seed,
        top_k=sampler.top_k,
        top_p=sampler.top_p,
        min_p=sampler.min_p,
    )
