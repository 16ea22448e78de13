"""Random checkpoints of the real architectures at any scale, for tests and trials."""
