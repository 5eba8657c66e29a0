"""llamaq: QAT → LoRA → DPO → integer codes → ExecuTorch, for Llama 3.2 on Arm phones.

The names below are the Python API, for a notebook or a script without a run (docs/python.md). They are imported when
first used, so that `import llamaq` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from llamaq.caches import usable_compiler_cache
from llamaq.quiet import drop_known_messages

if TYPE_CHECKING:
    from llamaq.checkpoints.load import load_checkpoint
    from llamaq.checkpoints.quantized import load_quantized, save_quantized
    from llamaq.config import Config, ExportConfig
    from llamaq.config.load import load as load_config
    from llamaq.errors import UserError
    from llamaq.export.exporter import export_pte
    from llamaq.export.pte import Pte, check_constants
    from llamaq.model.build import build_decoder, build_model, meta_decoder
    from llamaq.model.causal_lm import CausalLM
    from llamaq.model.compare import agreement
    from llamaq.quant.prepare import add_adapters, freeze, prepare
    from llamaq.quant.scheme import Scheme

__version__ = "0.1.0"

# name → where it is defined
_PUBLIC = {
    "CausalLM": "llamaq.model.causal_lm",
    "Config": "llamaq.config",
    "ExportConfig": "llamaq.config",
    "Pte": "llamaq.export.pte",
    "Scheme": "llamaq.quant.scheme",
    "UserError": "llamaq.errors",
    "add_adapters": "llamaq.quant.prepare",
    "agreement": "llamaq.model.compare",
    "build_decoder": "llamaq.model.build",
    "build_model": "llamaq.model.build",
    "check_constants": "llamaq.export.pte",
    "export_pte": "llamaq.export.exporter",
    "freeze": "llamaq.quant.prepare",
    "load_checkpoint": "llamaq.checkpoints.load",
    "load_config": "llamaq.config.load",
    "load_quantized": "llamaq.checkpoints.quantized",
    "meta_decoder": "llamaq.model.build",
    "prepare": "llamaq.quant.prepare",
    "save_quantized": "llamaq.checkpoints.quantized",
}
_NAMED_OTHERWISE = {"load_config": "load"}

__all__ = [
    "CausalLM",
    "Config",
    "ExportConfig",
    "Pte",
    "Scheme",
    "UserError",
    "add_adapters",
    "agreement",
    "build_decoder",
    "build_model",
    "check_constants",
    "export_pte",
    "freeze",
    "load_checkpoint",
    "load_config",
    "load_quantized",
    "meta_decoder",
    "prepare",
    "save_quantized",
]

drop_known_messages()
usable_compiler_cache()


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'llamaq' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), _NAMED_OTHERWISE.get(name, name))


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
