"""Rules of planned and simulated routing, one file each, and their contract.

`shoal.plan.policies` lists them by name. The live router of a client without a
dispatcher is `shoal.plan.routing`.
"""
