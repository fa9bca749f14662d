"""A client: opens sessions along chains of servers and keeps them going.

No torch here: rows of hidden states are bytes. Start with `client.py` (`open_client`);
`session.py` is one session, `repair.py` what happens when a part of its chain is lost.
"""
