"""Rules of placement, one file each; `shoal.plan.policies` lists them by name.

They share the contract `shoal.plan.placement.Placer`. `milp`, `bigm` and `flow` need
scipy and are imported only by who plans offline.
"""
