"""A server: sessions, their logs and cursors, scheduling, and the streams of others.

No torch here: a `BlockBackend` is handed in. Start with `server.py`; `session.py` holds
the state of one hop of one session, `engine.py` the loop that runs blocks.
"""
