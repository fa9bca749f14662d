"""Words everybody shares: ids, spans, errors, limits. Standard library only, no I/O."""
