"""Measurements: retrieval, answer quality, replays through a server; worlds, and the bundled model's training."""
