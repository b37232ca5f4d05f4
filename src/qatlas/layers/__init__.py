"""Floor 3: where numbers meet weights."""
