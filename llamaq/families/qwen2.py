"""Qwen2 and Qwen2.5: Llama with biases on q, k and v. RoPE turns halves of a head, so q and k keep their row order."""

from llamaq.config.components import Component
from llamaq.families.architecture import Architecture, every_argument
from llamaq.families.config_json import ConfigJson

MODEL_TYPES = ("qwen2",)
NORM_EPS, POSITIONS = 1e-6, 32768  # transformers' defaults


def read(config: ConfigJson) -> Architecture:
    """Return the numbers of a config.json.

    Raises:
        UserError: something in it makes another model.
    """
    config.refuse_if("use_sliding_window", "ExecuTorch's Llama attends to all tokens")
    return config.architecture("qwen2", NORM_EPS, POSITIONS)


def component(a: Architecture) -> Component:
    """Return the `model` section."""
    return {"_component_": "llamaq.model.builders.qwen2", **every_argument(a)}
