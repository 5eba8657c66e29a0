"""The config of a run: one YAML file, overridden by `key=value`, checked before anything is loaded.

`Config` below is the whole of it, section by section; larger sections have a file each beside this one. The text under
a field says what the setting does. `tune run RECIPE --help` and docs/settings.md are made from these texts.

A section with a `_component_` key is torchtune's way of naming any function or class together with its arguments
(model, tokenizer, datasets, optimizers, schedules, losses); its other keys are that function's own.
"""

import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from llamaq.config.chat import ChatConfig
from llamaq.config.checks import has_component, is_component, not_negative, one_of, positive, require
from llamaq.config.components import Component
from llamaq.config.deepspeed import DeepSpeedConfig
from llamaq.config.evaluate import EvaluateConfig
from llamaq.config.export import ExportConfig
from llamaq.config.spinquant import SpinQuantConfig
from llamaq.config.training import DPOConfig, TrainingConfig
from llamaq.errors import UserError

GROUP_SIZES = (32, 64, 128, 256)
LARGEST_SEED = 2**32 - 1  # NumPy's, which lm-evaluation-harness seeds too


@dataclass
class SchemeConfig:
    """The numerics of `llamaq.quant.scheme`: int4 weights in groups, int8 activations, int8 embedding and head."""

    group_size: int = 32
    """Weights that share one int4 scale: 32, 64, 128 or 256. It has to divide the input width of every linear. Meta
    uses 32. Larger groups save memory (32: half a bit per weight for scales) and lose quality."""

    def check(self, name: str) -> None:
        """Check that ExecuTorch has kernels for the group size."""
        require(self.group_size in GROUP_SIZES, f"{name}.group_size={self.group_size}: ExecuTorch takes {GROUP_SIZES}")


@dataclass
class AdapterConfig:
    """The LoRA adapters of `qat_lora` and `qat_dpo`, on all seven linears of every block; never merged."""

    rank: int = 16
    """Rank of the adapters, at least 2. Meta uses 16. A higher rank can learn more; file, memory and time per token
    grow with it."""

    alpha: float = 32.0
    """The adapters' output is scaled by alpha / rank. Set alpha to 2 · rank, because ExecuTorch always scales by 2.
    Another scale is folded into the adapters. That is exact only if alpha / rank is a power of two, so other values
    are refused."""

    def check(self, name: str) -> None:
        """Check what ExecuTorch's loader needs."""
        require(self.rank >= 2, f"{name}.rank={self.rank}: ExecuTorch's loader needs 2 or more")
        require(
            self.alpha > 0 and math.frexp(self.alpha / self.rank)[0] == 0.5,
            f"{name}.alpha={self.alpha}, {name}.rank={self.rank}: ExecuTorch fixes alpha / rank at 2, and "
            "only another power of two can be folded into bf16 weights exactly; choose alpha = 2 · rank",
        )


@dataclass
class WandbConfig:
    """Tracking with Weights & Biases: one W&B run per stage, grouped by output folder."""

    project: str = "llamaq"
    """The W&B project."""

    entity: str | None = None
    """The W&B user or team. Unset: your default entity."""

    mode: str | None = None
    """`online`, `offline` or `disabled`. Unset: `WANDB_MODE`, else online if logged in, else offline. Offline runs are
    kept in `output_dir/wandb`, and `wandb sync` sends them later."""

    def check(self, name: str) -> None:
        """Check the mode, and the names as W&B does."""
        if self.mode is not None:
            one_of(f"{name}.mode", self.mode, "online", "offline", "disabled")
        length = len(self.project)
        require(1 <= length <= 128, f"{name}.project has {length} characters; W&B takes 1 to 128")
        taken = not re.search(r"[/\\#?%:]", self.project)
        require(taken, f"{name}.project={self.project}: W&B takes no / \\ # ? % or : in it; choose another name")
        taken = self.entity is None or re.fullmatch(r"[\w.-]+", self.entity)
        require(bool(taken), f"{name}.entity={self.entity}: W&B takes letters, digits, _, - and . in it")


@dataclass
class Config:
    """The whole run. One config serves the chain and each of its stages."""

    output_dir: str = MISSING
    """Folder of the run. Each stage writes a folder in it. The same command with the same folder resumes the run. The
    folder belongs to one model. Its full path must not contain `int8` or `8da4w`."""

    data_dir: str | None = None
    """Folder to use in other settings, as `${data_dir}/train.jsonl`. llamaq itself does not read it."""

    checkpoint_dir: str = MISSING
    """Folder of the BF16 checkpoint the run starts from. Hugging Face (`config.json`, `*.safetensors`), Meta
    (`params.json`, `consolidated.00.pth`) or torchtune. Start from your fine-tuned checkpoint if you have one."""

    model: Component = field(default_factory=dict)
    """The model. Leave it out: `checkpoint_dir` says what it is (Llama 3.x, SmolLM2 and others of their form, Qwen2.5,
    Qwen3). `model.max_seq_len=4096` alone keeps fewer positions than the checkpoint has. With `_component_`, a function
    that returns a torchtune `TransformerDecoder`, e.g. `torchtune.models.llama3_2.llama3_2_1b`, or
    `torchtune.models.llama3_2.llama3_2` with `num_layers`, `embed_dim` and so on, the section says all of it. That is
    needed for torchtune's own checkpoints and with `base`. A number that contradicts the checkpoint is an error."""

    tokenizer: Component = field(default_factory=dict)
    """The tokenizer. Leave out `_component_` and `path`: it is `tokenizer.json` or Meta's `tokenizer.model` in
    `checkpoint_dir`. `max_seq_len` is the most tokens of a training sample and the length of calibration windows; unset
    it is 2048, or the model's positions if they are fewer. A tokenizer from elsewhere is
    `llamaq.data.hf_tokenizer.hf_tokenizer`, whose `path` is a `tokenizer.json`, or
    `torchtune.models.llama3.llama3_tokenizer`, whose `path` is Meta's `tokenizer.model`. docs/data.md has the other
    keys (Tokenizers)."""

    corpus: Component | None = None
    """A function that makes the data first, e.g. `llamaq.data.corpus.tiny_chat`. It writes data files (and perhaps a
    tokenizer) into `output_dir/corpus`, which other settings name. Unset: the data exists already."""

    base: TrainingConfig | None = None
    """Trains the BF16 model the run starts from, from random weights. Only for small models, as in the `tiny` config;
    leave it out to start from a checkpoint."""

    qat: TrainingConfig | None = None
    """Stage 1, QAT: fine-tunes the whole model with all weights and activations fake-quantized."""

    qat_lora: TrainingConfig | None = None
    """Stage 2, LoRA: trains adapters on the frozen, quantized backbone of stage 1."""

    qat_dpo: DPOConfig | None = None
    """Stage 3, DPO: trains backbone and adapters on preference pairs, against the model of stage 2."""

    spinquant: SpinQuantConfig | None = None
    """SpinQuant, instead of training: learns rotations, merges them into the weights and rounds the weights by GPTQ."""

    scheme: SchemeConfig = field(default_factory=SchemeConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    seed: int = 0
    """Seed of sample order, initial adapters and rotations, 0 to 4294967295. A run with the same seed can be
    repeated."""

    device: str = "auto"
    """Where to compute: `auto`, `cpu` or `cuda`. `auto` takes a GPU if there is one; under torchrun each rank takes its
    own."""

    dtype: str = "bf16"
    """Dtype of matrix products in training: `bf16` or `fp32`. Weights, gradients, optimizer state and quantization
    scales are float32 either way. Use `fp32` on CPUs without bf16 instructions, where bf16 is slow."""

    compile: bool = False
    """Compile each transformer block with `torch.compile`. Steps are faster after about a minute of compiling. Weights
    are quantized bit for bit as without it; float32 sums have another order."""

    activation_checkpointing: bool = False
    """Recompute the blocks in the backward pass to save memory. Steps take a third longer."""

    engine: str = "auto"
    """What trains: `auto`, `torch` or `deepspeed`. `auto` is plain PyTorch in one process, and DeepSpeed under torchrun
    with more than one process and on Ray. `torch` keeps the whole model and optimizer on every rank."""

    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    def section(self, name: str) -> Any:
        """Return a section that a config may leave out, for a recipe that needs it.

        Raises:
            UserError: the config has no such section.
        """
        section = getattr(self, name)
        if section is None:
            raise UserError(f"this recipe needs the section '{name}', and the configuration has none")
        return section

    def check(self) -> None:
        """Check every setting that can be checked without opening a file of the user's.

        Raises:
            UserError: naming the setting, its value and what it can be.
        """
        one_of("dtype", self.dtype, "bf16", "fp32")
        one_of("engine", self.engine, "auto", "torch", "deepspeed")
        known_device = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device)
        require(known_device is not None, f"device={self.device}: choose auto, cpu or cuda")
        require(0 <= self.seed <= LARGEST_SEED, f"seed={self.seed}: must be between 0 and {LARGEST_SEED}")
        for name in ("output_dir", "checkpoint_dir"):
            require(getattr(self, name) != "", f"{name} is empty: name a folder")
        for word in ("int8", "8da4w"):
            require(
                word not in str(Path(self.output_dir).absolute()),
                f"output_dir={self.output_dir}: its full path contains '{word}', which makes ExecuTorch 1.4.1's "
                "loader take a dead branch; choose another folder",
            )
        for name in ("model", "tokenizer"):
            is_component(name, getattr(self, name))
        has_component("corpus", self.corpus)
        for f in fields(self):
            section: Any = getattr(self, f.name)
            if is_dataclass(section):
                section.check(f.name)  # pyright: ignore[reportAttributeAccessIssue]
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Check the sizes in component sections, and those that have to fit together."""
        for key, value in self.model.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                (not_negative if "dropout" in key else positive)(f"model.{key}", value)
        length = self.tokenizer.get("max_seq_len")
        has_length = length is None or (type(length) is int and length >= 2)
        require(has_length, f"tokenizer.max_seq_len={length}: must be at least 2, since a token predicts the next one")
        for key, value in (self.corpus or {}).items():
            if key.startswith("num_"):
                positive(f"corpus.{key}", value)
        e, room = self.evaluate, self.export.max_context_length
        require(
            not e.speed or e.speed_prompt_tokens + e.speed_new_tokens <= room,
            f"evaluate.speed_prompt_tokens={e.speed_prompt_tokens} and evaluate.speed_new_tokens={e.speed_new_tokens} "
            f"do not fit into export.max_context_length={room}; lower them, or set evaluate.speed=false",
        )
