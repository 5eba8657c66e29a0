"""Building, feeding and training the model with torchtune's parts."""

from llamaq import torchao_compat  # noqa: F401  (torchtune does not import without it)
