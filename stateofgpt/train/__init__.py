"""Training: loop, optimizers, schedules, scaling laws. Knows no stage and no text."""
