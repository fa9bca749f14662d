"""Options of `shoal serve` about strangers: who may come in, and what one client may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final

import typer

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId, parse_peer
from shoal.base.limits import IDLE_SESSION_S
from shoal.cli.sizes import parse_size
from shoal.server.config import ServerConfig, StreamService
from shoal.server.engine import EngineLimits
from shoal.server.fairness import ROWS_PER_CLIENT, SLOWDOWN_MAX, FairLimits
from shoal.server.quotas import (
    CACHE_SHARE as CACHE_SHARE,
)
from shoal.server.quotas import (
    QUEUES_PER_ADDRESS,
    SESSIONS_PER_CLIENT,
    STREAMS_PER_ADDRESS,
    STREAMS_PER_PEER,
    Quotas,
)
from shoal.server.shares import (
    ADDRESS_SHARE as ADDRESS_SHARE,
)
from shoal.server.training_limits import PASS_BYTES_MAX, ROWS_PER_PASS_MAX, TrainingLimits

PANEL: Final = "Strangers"

UNBOUNDED: Final = 1 << 31

AllowOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PEER",
        rich_help_panel=PANEL,
        help="Let only this peer in (its id, as ready lines print it); repeat for more.",
    ),
]
DenyOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PEER",
        rich_help_panel=PANEL,
        help="Never let this peer in, nor whom it invited; repeat for more.",
    ),
]
ClientSessionsOption = Annotated[
    int,
    typer.Option(
        metavar="N", min=1, rich_help_panel=PANEL, help="Sessions that one client may have here."
    ),
]
CacheShareOption = Annotated[
    float,
    typer.Option(
        metavar="X",
        rich_help_panel=PANEL,
        help="Part of the KV cache that one client may hold; 1 lets it hold all.",
    ),
]
AddressShareOption = Annotated[
    float,
    typer.Option(
        metavar="X",
        rich_help_panel=PANEL,
        help="Part of everything that clients share here (cache, sessions, memory for adapters and "
        "training, places) that those of one address may take together, however many they are; "
        "an IPv6 network of 64 bits counts as one. This machine and local networks don't count. "
        "1: no bound.",
    ),
]
ClientStreamsOption = Annotated[
    int,
    typer.Option(
        metavar="N", min=1, rich_help_panel=PANEL, help="Streams that one peer may have open."
    ),
]
ClientRateOption = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        rich_help_panel=PANEL,
        help="Rows of one client that are computed per second, in bytes; beyond it they wait.",
    ),
]
ClientRowsOption = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        rich_help_panel=PANEL,
        help="Tokens of one client that are computed at once while other clients want some too.",
    ),
]
SlowdownOption = Annotated[
    float,
    typer.Option(
        metavar="X",
        rich_help_panel=PANEL,
        help="How many times as long a client's token may take, on average, because of long "
        "prompts of others. Lower: prompts take longer.",
    ),
]
QueueMemoryOption = Annotated[
    str,
    typer.Option(
        metavar="SIZE", rich_help_panel=PANEL, help="Memory for rows of one client that wait."
    ),
]
LogMemoryOption = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        rich_help_panel=PANEL,
        help="Memory for what was sent on, kept to repair chains; beyond it, repairs start "
        "further up the chain.",
    ),
]
TrainingMemoryOption = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        rich_help_panel=PANEL,
        help="Memory for what training clients come back for: with less, blocks are run again. "
        "0: nobody trains here.",
    ),
]
TrainingRowsOption = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        rich_help_panel=PANEL,
        help="Rows that one training pass may have, and with it the longest sequence: tokens of "
        "others wait for one block of so many rows.",
    ),
]
IdleTimeoutOption = Annotated[
    float,
    typer.Option(
        metavar="S",
        min=1.0,
        rich_help_panel=PANEL,
        help="Seconds after which a session without a new token is closed.",
    ),
]

CLIENT_SESSIONS: Final = SESSIONS_PER_CLIENT
CLIENT_STREAMS: Final = STREAMS_PER_PEER
TRAINING_ROWS: Final = ROWS_PER_PASS_MAX
CLIENT_RATE: Final = "125MB"
CLIENT_ROWS: Final = ROWS_PER_CLIENT
SLOWDOWN: Final = SLOWDOWN_MAX
QUEUE_MEMORY: Final = "256MiB"
LOG_MEMORY: Final = "4GiB"
TRAINING_MEMORY: Final = "2GiB"
IDLE_TIMEOUT: Final = IDLE_SESSION_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Who may come in, and what one peer may take; checked."""

    allow: frozenset[PeerId] | None = None
    deny: frozenset[PeerId] = frozenset()
    quotas: Quotas = field(default_factory=Quotas)
    fair: FairLimits = field(default_factory=FairLimits)
    training: TrainingLimits = field(default_factory=TrainingLimits)
    idle_session_s: float = IDLE_SESSION_S

    def server_config(self, services: dict[str, StreamService]) -> ServerConfig:
        """What the server is opened with."""
        return ServerConfig(
            engine=EngineLimits(fair=self.fair),
            quotas=self.quotas,
            training=self.training,
            idle_session_s=self.idle_session_s,
            services=services,
        )


def parse_bounds(
    *,
    allow: Sequence[str] | None,
    deny: Sequence[str] | None,
    client_sessions: int,
    cache_share: float,
    address_share: float,
    client_streams: int,
    client_rate: str,
    client_rows: int,
    slowdown: float,
    queue_memory: str,
    log_memory: str,
    training_memory: str,
    training_rows: int,
    idle_timeout: float,
) -> Bounds:
    """The options, checked.

    Raises:
        ConfigError: no peer id, no size, or a number that makes no sense; names the option.
    """
    if not 0 < cache_share <= 1:
        raise ConfigError(f"--cache-share {cache_share:g}: above 0, at most 1")
    if not 0 < address_share <= 1:
        raise ConfigError(f"--address-share {address_share:g}: above 0, at most 1")
    if not slowdown > 1:
        raise ConfigError(f"--slowdown {slowdown:g}: it must be above 1")
    return Bounds(
        allow=frozenset(_peers(allow, "--allow")) if allow else None,
        deny=frozenset(_peers(deny, "--deny")),
        quotas=Quotas(
            sessions_per_client=client_sessions,
            streams_per_peer=client_streams,
            bytes_per_s_per_client=_size(client_rate, "--client-rate"),
            queue_bytes_per_client=_size(queue_memory, "--queue-memory"),
            log_bytes_max=_size(log_memory, "--log-memory"),
            cache_share=cache_share,
            address_share=address_share,
            streams_per_address=STREAMS_PER_ADDRESS if address_share < 1 else UNBOUNDED,
            queues_per_address=QUEUES_PER_ADDRESS if address_share < 1 else UNBOUNDED,
        ),
        fair=FairLimits(rows_per_client=client_rows, slowdown_max=slowdown),
        training=_training(training_memory, training_rows, address_share),
        idle_session_s=idle_timeout,
    )


def _training(memory: str, rows: int, address_share: float) -> TrainingLimits:
    kept_bytes = parse_size(memory, "--training-memory")
    if kept_bytes < 0:
        raise ConfigError(f"--training-memory {memory}: it must be at least 0")
    return TrainingLimits(
        is_open=kept_bytes > 0,
        rows_per_pass_max=rows,
        address_share=address_share,
        kept_bytes_per_client=kept_bytes // 2,
        kept_bytes_max=kept_bytes,
        pass_bytes_max=min(PASS_BYTES_MAX, kept_bytes),
    )


def _size(text: str, option: str) -> int:
    size = parse_size(text, option)
    if size < 1:
        raise ConfigError(f"{option} {text}: it must be at least 1 byte")
    return size


def _peers(texts: Sequence[str] | None, option: str) -> list[PeerId]:
    peers = []
    for text in texts or ():
        try:
            peers.append(parse_peer(text))
        except ConfigError as error:
            raise ConfigError(f"{option} {text}: {error.detail}") from error
    return peers
