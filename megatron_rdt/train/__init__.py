"""The training loop, and everything it needs except the engine: data, records, checkpoints, signals."""
