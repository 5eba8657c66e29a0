"""Data: tokenizers, datasets and their checks, batches, windows of text, and a synthetic corpus."""

from llamaq import torchao_compat  # noqa: F401  (torchtune does not import without it)
