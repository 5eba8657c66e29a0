"""Every setting of a run: what it means (`schema`), how it is read (`load`), and help on it (`help`)."""

from llamaq.config.arguments import parse_arguments
from llamaq.config.chat import ChatConfig
from llamaq.config.components import Component, instantiate
from llamaq.config.deepspeed import DEEPSPEED_SETTINGS, SET_BY_LLAMAQ, DeepSpeedConfig, deepspeed_settings
from llamaq.config.evaluate import EvaluateConfig
from llamaq.config.export import ExportConfig
from llamaq.config.installed import cluster_dir, packaged_configs, recipes_dir
from llamaq.config.load import check_sections, load, resolve, without
from llamaq.config.schema import AdapterConfig, Config, SchemeConfig, WandbConfig
from llamaq.config.spinquant import CalibrationPart, SpinQuantConfig
from llamaq.config.training import DPOConfig, TrainingConfig

__all__ = [
    "DEEPSPEED_SETTINGS",
    "SET_BY_LLAMAQ",
    "AdapterConfig",
    "CalibrationPart",
    "ChatConfig",
    "Component",
    "Config",
    "DPOConfig",
    "DeepSpeedConfig",
    "EvaluateConfig",
    "ExportConfig",
    "SchemeConfig",
    "SpinQuantConfig",
    "TrainingConfig",
    "WandbConfig",
    "check_sections",
    "cluster_dir",
    "deepspeed_settings",
    "instantiate",
    "load",
    "packaged_configs",
    "parse_arguments",
    "recipes_dir",
    "resolve",
    "without",
]
