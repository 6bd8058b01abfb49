"""Measurements: of answers, of likelihood, of diversity, and of models against each other."""
