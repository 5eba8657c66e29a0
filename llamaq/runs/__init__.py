"""A run: its folder and stages, its ranks, the files it writes, what it logs, and how a recipe starts."""
