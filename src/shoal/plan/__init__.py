"""Every decision, as pure functions over frozen snapshots. No I/O, no clocks."""
