"""The model: torchtune's decoder with the modules of the scheme, its shape and names, and how two models compare."""

from llamaq import torchao_compat  # noqa: F401  (torchtune does not import without it)
