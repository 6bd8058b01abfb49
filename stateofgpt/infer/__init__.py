"""Inference: batched sampling from a model and scoring of token ids. Ids in, ids out: knows no text and no stage."""
