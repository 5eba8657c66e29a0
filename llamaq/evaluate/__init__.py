"""Evaluation: scores on held-out text, sensitivity of each linear, lm-evaluation-harness, and exported files."""
