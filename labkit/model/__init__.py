"""Models: configuration, layers, and reading checkpoints."""
