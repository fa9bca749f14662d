"""Who is here: signed records, the directory that collects them, and how they travel.

`directory.py` is the contract; `store.py` holds and checks records and `records.py` says
what one is. `static.py` (by hand or from a file, also the fake of tests and the lab) and
`gossip.py` implement the contract; both pass tests/contracts/test_directory.py.

Gossip decides in `gossiper.py` (liveness, neighbours) and `spreading.py` (records), over
`neighbourhood.py` (state), `neighbours.py` (choices), `digest.py` and `allowance.py`, all
without I/O. `exchange.py` reads a whole directory over a control stream; `lan.py` finds
servers in the local network.
"""
