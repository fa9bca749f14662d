"""Logs, cursors and data links: how rows get from one hop to the next, exactly once.

`log.py`, `outbound.py` and `inbound.py` are pure state machines (model-checked in
tests/unit/test_link_model.py); `sender.py` and `receiver.py` drive them over streams.
Servers and clients both stand on this package and don't know each other.
"""
