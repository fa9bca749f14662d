"""An OpenAI-compatible HTTP server before a swarm, and its chat page.

Start at `app.py` (what answers where) and `engine.py` (how many answers come at once).
Requests are checked in `bodies.py` and `requests.py` before anything is computed; how many
may run is in `keys.py` and `line.py`; sessions of finished answers are in `kept.py`.
"""
