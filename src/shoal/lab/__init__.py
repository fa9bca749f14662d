"""The lab: the real client, server and plan code on virtual time and a simulated network.

`clock.py` makes time jump, `network.py` decides what happens to frames, `toy_blocks.py`
stands in for a model in a way that proves what every hop held. `swarm.py` puts a whole
swarm together; `chaos.py` lets random schedules of faults loose on it.
"""
