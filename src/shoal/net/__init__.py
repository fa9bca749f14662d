"""Authenticated streams of frames between peers.

`transport.py` is the contract; `tcp.py` (TLS 1.3) and `memory.py` (tests, lab)
implement it; `channel.py` adds the hello and typed messages; `identity.py` holds keys,
signatures and membership certificates.
"""
