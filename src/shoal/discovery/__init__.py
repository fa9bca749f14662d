"""Who is here: signed records, the directory that collects them, and how they travel.

`directory.py` is the contract; `store.py` holds and checks records and `records.py` says
what one is. `static.py` (by hand or from a file, also the fake of tests and the lab) and
`joined.py` (asks the peers named by `--join`) implement the contract. Both pass
tests/contracts/test_directory.py. Gossip is not here yet.
"""
