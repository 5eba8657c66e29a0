"""Sections with a `_component_`: the function or class of that name is called with the section's other keys.

This is how a torchtune config names its model, tokenizer, datasets, optimizers, schedules and losses.
"""

from typing import Any

from llamaq.errors import UserError

Component = dict[str, Any]

# Names that llamaq's own components had before its folders were laid out anew. Users' YAML files still hold them.
MOVED = {
    "llamaq.train.corpus": "llamaq.data.corpus",
    "llamaq.train.data.text_windows_dataset": "llamaq.data.text.text_windows_dataset",
    "llamaq.train.data.text_preference_dataset": "llamaq.data.text.text_preference_dataset",
}


def current_name(name: str) -> str:
    """Return today's name of a component, which for all but a few old names is the name itself."""
    for old, new in MOVED.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name


def instantiate(component: Component, *args: Any, setting: str, **kwargs: Any) -> Any:
    """Call what `_component_` names, as torchtune's `config.instantiate` does, with errors that name the setting.

    Args:
        component: the section.
        *args: positional arguments, e.g. the tokenizer of a dataset.
        setting: the section's full name in the config, for errors.
        **kwargs: keyword arguments beside the section's own.

    Raises:
        UserError: no such component, a file it does not find, or arguments it does not take.
    """
    from omegaconf import OmegaConf

    from llamaq import torchao_compat  # noqa: F401  (first: torchtune does not import without it)

    # isort: split
    from torchtune import config as torchtune_config
    from torchtune.config._errors import InstantiationError

    name = component.get("_component_")
    if isinstance(name, str):
        component = component | {"_component_": current_name(name)}
    try:
        return torchtune_config.instantiate(OmegaConf.create(component), *args, **kwargs)
    except UserError:
        raise
    except FileNotFoundError as e:
        raise UserError(f"{setting}: {name}: no such file: {e.filename or e}") from e
    except (ImportError, AttributeError, InstantiationError) as e:
        raise UserError(f"{setting}._component_={name}: {e}") from e
    except TypeError as e:
        raise UserError(f"{setting}: {name} was called with wrong arguments: {e}") from e
