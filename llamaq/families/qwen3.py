"""Qwen3: Llama with norms on the queries and keys of each head, whose width config.json names; no biases."""

from llamaq.config.components import Component
from llamaq.families.architecture import Architecture, every_argument
from llamaq.families.config_json import ConfigJson

MODEL_TYPES = ("qwen3",)
NORM_EPS, POSITIONS, HEAD_DIM = 1e-6, 32768, 128  # transformers' defaults


def read(config: ConfigJson) -> Architecture:
    """Return the numbers of a config.json.

    Raises:
        UserError: something in it makes another model.
    """
    config.refuse_if("use_sliding_window", "ExecuTorch's Llama attends to all tokens")
    config.refuse_if("attention_bias", "Qwen3 is supported without biases")
    return config.architecture("qwen3", NORM_EPS, POSITIONS, HEAD_DIM)


def component(a: Architecture) -> Component:
    """Return the `model` section."""
    return {"_component_": "llamaq.model.builders.qwen3", **every_argument(a)}
