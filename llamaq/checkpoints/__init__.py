"""Every checkpoint layout, reader beside writer: Hugging Face, Meta (float and quantized), torchtune, PEFT."""

from llamaq import torchao_compat  # noqa: F401  (torchtune does not import without it)
