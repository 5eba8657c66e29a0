"""The report of a run: the facts it states, its page and tables, its plots, and the model card."""
