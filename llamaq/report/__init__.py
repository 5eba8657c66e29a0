"""The report of a run: the page, its plots, and the model card."""
