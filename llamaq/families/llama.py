"""Llama 3.x of any size, and what has its form: SmolLM2, fine-tunes, Mistral without a sliding window."""

from llamaq.config.components import Component
from llamaq.errors import UserError
from llamaq.families.architecture import DEFAULT, Architecture, every_argument, sizes, whole
from llamaq.families.config_json import ConfigJson

MODEL_TYPES = ("llama", "mistral")
NORM_EPS, POSITIONS = 1e-6, {"llama": 2048, "mistral": 4096 * 32}  # transformers' defaults
# what torchtune's llama3_2 builder fixes of Llama 3's scaling; its scale_factor is free
FIXED = {"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def read(config: ConfigJson) -> Architecture:
    """Return the numbers of a config.json.

    Raises:
        UserError: something in it makes another model.
    """
    config.refuse_if("attention_bias", "only Qwen2.5's biases on q, k and v are supported")
    config.refuse_if("mlp_bias", "only Qwen2.5's biases on q, k and v are supported")
    if config.model_type == "mistral" and config.values.get("sliding_window", 4096) is not None:
        raise UserError(
            f"{config.path}: mistral with sliding_window={config.values.get('sliding_window', '4096 (the default)')}: "
            "ExecuTorch's Llama attends to all tokens; only a Mistral with sliding_window null is supported"
        )
    return config.architecture("llama", NORM_EPS, POSITIONS[config.model_type])


def component(a: Architecture) -> Component:
    """Return the `model` section: torchtune's builder of Llama 3.2 wherever it can say it."""
    scaling = {k: v for k, v in a.rope_scaling.items() if k != "factor"}
    if a.head_dim * a.num_heads != a.embed_dim or scaling not in (DEFAULT, FIXED):
        return {"_component_": "llamaq.model.builders.llama", **every_argument(a)}
    found = {"_component_": "torchtune.models.llama3_2.llama3_2", **sizes(a)}
    found["scale_factor"] = whole(a.rope_scaling.get("factor", 1))
    if a.norm_eps != 1e-5:
        found["norm_eps"] = a.norm_eps
    if not a.tie_word_embeddings:
        found["tie_word_embeddings"] = False
    return found
