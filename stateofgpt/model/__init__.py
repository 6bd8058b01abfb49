"""The model: architecture, heads and checkpoints. Knows no optimizer, no stage and no text."""
