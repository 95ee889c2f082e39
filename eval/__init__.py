"""Measurements: retrieval, answer quality and replays through a running server; worlds, and the bundled model's training."""
