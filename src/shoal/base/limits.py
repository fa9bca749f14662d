"""Every bound of the system: its name, its unit, its reason.

A limit that only one module uses may live beside that module; those that two
sides of the wire must agree on live here.
"""

from __future__ import annotations

from typing import Final

PROTOCOL_VERSION: Final = 1
"""Raised when an old peer could misread a new one; see docs/protocol.md."""

# --- sizes on the wire -------------------------------------------------------

HEADER_BYTES_MAX: Final = 1 << 18
"""256 KiB for one frame's header: a Route with 64 hops and their records fits 4x."""

PAYLOAD_BYTES_MAX: Final = 1 << 26
"""64 MiB for one frame's payload: 2,048 rows of a 16,384-wide model in bf16."""

ENTRIES_PER_FRAME_MAX: Final = 1024
"""Entries in one Rows frame: more sessions than one engine iteration can run."""

STANDBYS_PER_BORDER_MAX: Final = 4
"""Standbys that begin at one block. Each is one more receiver of the same rows: nobody shall
make a server send them to many."""

HOPS_MAX: Final = 128
"""Hops in one route: one block per server on the largest models (126 blocks)."""

CUTS_MAX: Final = 64
"""Truncations that an entry lists one by one; older ones are merged, which only costs a
receiver that is more than 64 truncations behind some recomputation."""

ENTRY_TOKENS_MAX: Final = 4096
"""Positions in one entry (a prefill chunk)."""

SESSION_TOKENS_MAX: Final = 1 << 20
"""Positions in one session: the longest advertised contexts (1M tokens)."""

SESSIONS_KEPT_MAX: Final = 8192
"""Sessions of one client at one server: their ids fill half a header."""

RECORD_BYTES_MAX: Final = 16 << 10
"""16 KiB for one signed record; typical records are 0.5 to 1 kB."""

RECORDS_MAX: Final = 4096
"""Records in one directory answer: several times the largest known volunteer swarm."""

DIGEST_BUCKETS: Final = 64
"""Parts of a directory that are compared one by one: one new record among 1,000 makes two
directories exchange the names of 16."""

DETAIL_CHARS_MAX: Final = 2000
"""Characters of an error's text on the wire."""

MANIFEST_BYTES_MAX: Final = 32 << 20
"""A model's manifest: 120 bytes per tensor, so 280,000 tensors."""

TENSORS_MAX: Final = 1 << 18
"""Tensors of one model: twice those of the largest mixtures, experts stored one by one."""

FILES_MAX: Final = 32
"""Files beside the weights that a peer offers: tokenizers have up to six."""

FILES_BYTES_MAX: Final = 64 << 20
"""All of these files together: twice the largest tokenizers."""

PIECE_BYTES_MAX: Final = 256 << 10
"""Weights travel in pieces of at most this: 0.2 s of a 10 Mbit/s uplink, so that rows of
sessions never wait long behind one."""

# --- flow control ------------------------------------------------------------

WINDOW_BYTES: Final = 4 << 20
"""Bytes a sender may have unacknowledged per session and link: two 512-token chunks of a
2,048-wide bf16 model; below the bandwidth-delay product only above 300 Mbit/s at 100 ms."""

RUN_AHEAD_BYTES: Final = 8 << 20
"""A session whose log is this far ahead of its downstream cursor is not scheduled."""

LOG_BYTES_PER_SESSION_MAX: Final = 1 << 30
"""Log of one session at one hop: 64k tokens of an 8,192-wide bf16 model."""

# --- time --------------------------------------------------------------------

ALIVE_PERIOD_S: Final = 0.5
"""A server with outstanding work says so this often."""

ALIVE_MISSED_MAX: Final = 3
"""Missed Alive messages before a hop is suspected."""

STALL_FACTOR: Final = 4.0
"""An iteration may take this many times its own estimate before it counts as stuck."""

STALL_MIN_S: Final = 2.0
"""No stall verdict before this: garbage collection, swapping and first calls are slow."""

DIAL_TIMEOUT_S: Final = 5.0
"""Deadline to connect, prove identities and say hello."""

CALL_TIMEOUT_S: Final = 5.0
"""Deadline of one control request; transports notice dead paths only after 15 s."""

ORPHAN_GRACE_S: Final = 5.0
"""A session whose owner's control stream is gone is freed after this."""

KEEP_PERIOD_S: Final = 10.0
"""A client lists its sessions to each server this often; what is not listed is freed."""

IDLE_SESSION_S: Final = 3600.0
"""A session without a new row is closed after this."""

GOSSIP_BEAT_S: Final = 1.0
"""A gossip stream never carries nothing for longer: silence is how a death is noticed."""

RECORD_TTL_S: Final = 600.0
"""A signed record is valid this long after its receipt."""
