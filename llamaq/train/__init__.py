"""Training: objectives, the one loop, the two engines, and the state that a stage resumes from."""

from llamaq import torchao_compat  # noqa: F401  (torchtune does not import without it)
