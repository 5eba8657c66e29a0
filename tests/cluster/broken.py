"""Provide a recipe with a bug, which another try would meet again."""

from llamaq.runs.run import Run


def recipe(run: Run) -> None:
    raise KeyError("a bug of rank 0's")
