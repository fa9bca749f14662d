"""The swarm on one page: who serves which blocks, how fast, how full, and what happened.

`events.py` compares two looks at a swarm, `observer.py` looks again and again and keeps what
happened, `app.py` has the page and its JSON. How a look is taken is handed in.
"""
