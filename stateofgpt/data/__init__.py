"""What the stages learn from: raw text, shards, batches, demonstrations, comparisons, feedback. Knows no model."""
