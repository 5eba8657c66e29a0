"""The run's configuration: one YAML file, overridden by `key=value`, checked before anything is loaded.

The dataclasses below are the whole list of settings, with their defaults. A section with a `_component_` key is
torchtune's way of naming any function or class together with its arguments (model, tokenizer, datasets, optimizers,
schedules, losses); its other keys are that function's own.
"""

import difflib
import json
import math
import sys
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from llamaq.errors import UserError

Component = dict[str, Any]


@dataclass
class SchemeConfig:
    """The numerics of `llamaq.quant.scheme.Scheme`."""

    group_size: int = 32  # weights that share one int4 scale; ExecuTorch takes 32, 64, 128 or 256


@dataclass
class AdapterConfig:
    """LoRA adapters, on all seven linears of every block."""

    rank: int = 16
    alpha: float = 32.0  # output is scaled by alpha / rank


@dataclass
class TrainingConfig:
    """One training stage."""

    dataset: Component = MISSING
    optimizer: Component = MISSING
    lr_scheduler: Component | None = None  # called with (optimizer, num_training_steps=…)
    batch_size: int = 1  # sequences (or preference pairs) in one forward pass of one rank, at the most
    global_batch_size: int = 16  # … in one optimizer step of all ranks together
    epochs: int = 1
    max_steps: int | None = None  # stop here even if the epochs are not over
    clip_grad_norm: float | None = 1.0
    checkpoint_every_n_steps: int = 100  # what a killed run loses at the most
    keep_checkpoints: int = 2
    distill_weight: float = 0.0  # SFT only: share of KL(BF16 model || this one) in the loss, 0 to 1


@dataclass
class DPOConfig(TrainingConfig):
    """The preference stage; `loss` gets (policy_chosen, policy_rejected, reference_chosen, reference_rejected)."""

    loss: Component = MISSING


@dataclass
class CalibrationPart:
    """A dataset to calibrate on, and how many windows of `tokenizer.max_seq_len` tokens to take from it."""

    dataset: Component = MISSING
    num_samples: int = 128


@dataclass
class SpinQuantConfig:
    """Rotations, rounding, and the choice among them. Samples are counted in windows, whatever the machine."""

    calibration: list[CalibrationPart] = MISSING  # several make a mix: chat, code, tool calls, other languages
    num_selection: int = 32  # further windows, shared among the parts, that candidates are judged on
    batch_size: int = 8  # windows in one forward pass
    candidates: list[str] = field(default_factory=lambda: ["none", "r4", "r2_r4", "r1_r2_r4"])
    num_seeds: int = 1  # starts of the learned rotations
    force: str | None = None  # ship this candidate, e.g. r1_r2_r4_seed0, whatever the others do
    objective: str = "noise"  # noise: expected quantization noise; published: the model's loss, by Cayley SGD
    steps: int = 300  # of learning (published: 100)
    lr: float = 2.0e-2  # of learning (published: 1.5)
    rows: int | None = None  # rows of a matrix looked at in a step, drawn anew; unset: all
    refine_steps: int = 0  # then KL with quantization in the loop
    refine_lr: float = 1.0e-3
    rounding: str = "gptq"  # or rtn
    damping: float = 0.01  # of GPTQ's Hessians, a share of their mean diagonal
    correct_mismatch: bool = True  # aim at the float model's outputs from the quantized model's inputs
    polish_steps: int = 0  # then group scales and norm gains by KL, codes frozen
    polish_lr: float = 3.0e-4


@dataclass
class ExportConfig:
    """The .pte, and the gates it has to pass."""

    stage: str = "qat_dpo"  # which ships: qat_dpo; qat_lora, whose backbone other adapters can share; or qat
    max_seq_length: int = 512  # tokens in one call; longer prompts take several. The phone's memory grows with it
    max_context_length: int = 2048  # KV cache length
    prompt: str = "Hello, who are you?"  # answered by the exported file, for the report
    chat: bool = True  # put the prompt into the chat template; false for models of plain text
    max_new_tokens: int = 48
    quantize_kv_cache: bool = False  # int8 per token and head: a quarter of the cache's memory, some loss of quality
    dynamic_shape: bool = True  # prompts in one call; false: one token a call, slower to read, quicker to export
    full_logits: bool = False  # logits of every token of a call: quicker to evaluate, not for phones
    adapters: dict[str, str] = field(default_factory=dict)  # method of the .pte → PEFT folder for the same backbone
    baseline_dtype: str = "bf16"  # of what is exported in full precision to compare with: bf16 or fp32
    gate_tokens: int = 128  # held-out tokens the hand-overs are compared on
    max_relative_error: float = 1e-4  # of a hand-over's logits; for the .pte of the median token's, see pte_gates
    min_top1_agreement: float = 1.0
    max_kl: float = 1e-3  # nats a token, over gate_tokens in one context


@dataclass
class EvaluateConfig:
    """Held-out text, and how it is read."""

    dataset: Component = MISSING
    batch_size: int = 8
    max_samples: int | None = None
    control: bool = True  # also train the BF16 control: the same stages without quantization (doubles training)
    # bf16, ptq, control, ptq_control, qat, qat_lora, final, spinquant; with .pte the exported file itself. Unset: all
    # there are, and as files what ships and bf16.pte. A file is exported if need be.
    models: list[str] | None = None
    file_tokens: int = 2048  # of the held-out text, read through each .pte
    sensitivity_samples: int = 0  # held-out samples for the map of what quantizing each linear costs; 0: none
    tasks: list[str] = field(default_factory=list)  # of lm-evaluation-harness, e.g. [mmlu, arc_challenge, gsm8k]
    tasks_dir: str | None = None  # folder of task files (YAML) of your own
    task_limit: int | None = None  # questions of a task
    num_fewshot: int | None = None  # unset: the task's own
    perplexity_text: str | None = None  # plain text, documents parted by form feeds: perplexity by token and word
    tasks_chat: bool = False  # ask in Llama 3's chat template
    speed: bool = True  # measure size, speed and memory of the .pte files on this machine
    speed_prompt_tokens: int = 64  # as in Meta's table
    speed_new_tokens: int = 64
    threads: int | None = None  # unset: all CPUs


@dataclass
class DeepSpeedConfig:
    """DeepSpeed, which trains where there is more than one rank; see `engine`."""

    config: str = "zero1"  # zero0 … zero3, zero2_offload, zero3_offload (cluster/deepspeed/), or a JSON file of yours
    settings: dict[str, Any] = field(default_factory=dict)  # over the file's, e.g. {zero_optimization: {stage: 2}}


@dataclass
class WandbConfig:
    """Weights & Biases. Runs are kept offline, in `output_dir/wandb`, where nobody is logged in."""

    project: str = "llamaq"
    entity: str | None = None
    mode: str | None = None  # online, offline or disabled; unset: online if logged in, else offline


@dataclass
class Config:
    """A whole run, shared by the chain and its single stages."""

    output_dir: str = MISSING
    data_dir: str | None = None  # for use in other settings, as ${data_dir}
    model: Component = MISSING
    checkpoint_dir: str = MISSING  # Hugging Face or Meta folder, or a torchtune checkpoint folder
    tokenizer: Component = MISSING
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    qat: TrainingConfig | None = None
    qat_lora: TrainingConfig | None = None
    qat_dpo: DPOConfig | None = None
    spinquant: SpinQuantConfig | None = None
    export: ExportConfig = field(default_factory=ExportConfig)
    scheme: SchemeConfig = field(default_factory=SchemeConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    corpus: Component | None = None  # writes data files (and perhaps a tokenizer) that the other sections name
    base: TrainingConfig | None = None  # train the BF16 model the chain starts from (tiny only)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    engine: str = "auto"  # auto (DeepSpeed for more than one rank), torch (the whole model on each), deepspeed
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    seed: int = 0
    device: str = "auto"  # auto (a GPU if there is one), cpu, cuda
    dtype: str = "bf16"  # what matmuls are done in: bf16 or fp32; weights, optimizer and scales are always fp32
    compile: bool = False  # torch.compile each block
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third slower

    def training(self, name: str) -> TrainingConfig:
        """The settings of a training stage.

        Raises:
            UserError: the configuration has none.
        """
        return self._section(name)

    @property
    def dpo(self) -> DPOConfig:
        """The settings of the preference stage, likewise."""
        return self._section("qat_dpo")

    @property
    def rotations(self) -> SpinQuantConfig:
        """The settings of SpinQuant, likewise."""
        return self._section("spinquant")

    def _section(self, name: str) -> Any:
        section = getattr(self, name)
        if section is None:
            raise UserError(f"this recipe needs the section '{name}', and the configuration has none")
        return section


# Settings that change speed or memory, not results: they are left out of a stage's identity.
NOT_IDENTITY = frozenset(
    ["batch_size", "checkpoint_every_n_steps", "keep_checkpoints", "device", "compile", "activation_checkpointing"]
)


# Top-level DeepSpeed settings a run may choose; the others llamaq sets itself, or they are not for training.
DEEPSPEED_SETTINGS = (
    "zero_optimization", "communication_data_type", "wall_clock_breakdown", "memory_breakdown", "comms_logger",
    "flops_profiler", "dump_state",
)  # fmt: skip
SET_BY_LLAMAQ = {
    "train_batch_size": "global_batch_size", "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "global_batch_size", "gradient_clipping": "clip_grad_norm",
    "optimizer": "optimizer", "scheduler": "lr_scheduler", "bf16": "dtype", "fp16": "dtype", "torch_autocast": "dtype",
    "amp": "dtype", "activation_checkpointing": "activation_checkpointing",
}  # fmt: skip


def deepspeed_settings(c: "Config") -> dict[str, Any]:
    """DeepSpeed's own settings: the file's, with the run's over them.

    Raises:
        UserError: no such file, not JSON, or a key that is unknown or llamaq's to set.
    """
    name = c.deepspeed.config
    path = cluster_dir() / "deepspeed" / f"{name}.json"
    path = path if path.is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (cluster_dir() / "deepspeed").glob("*.json")))
        raise UserError(f"deepspeed.config={name} is neither a file nor one of {known}")
    try:
        settings = json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"deepspeed.config={path} is not valid JSON: {e}") from e
    settings = OmegaConf.to_container(OmegaConf.merge(settings, c.deepspeed.settings))
    assert isinstance(settings, dict)
    for key in settings:
        if key in SET_BY_LLAMAQ:
            raise UserError(f"deepspeed.settings.{key}: llamaq sets it, from {SET_BY_LLAMAQ[str(key)]}; change that")
        if key not in DEEPSPEED_SETTINGS:
            near = difflib.get_close_matches(str(key), DEEPSPEED_SETTINGS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(DEEPSPEED_SETTINGS)}"
            raise UserError(f"deepspeed.settings.{key}: unknown setting; {hint}")
    return {str(k): v for k, v in settings.items()}


def packaged_configs() -> dict[str, Path]:
    """Name → file of the configs that come with llamaq, e.g. `llama3_2/1B_qat_lora_dpo`."""
    root = recipes_dir() / "configs"
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in sorted(root.rglob("*.yaml"))}


def recipes_dir() -> Path:
    """Where the recipes lie: `llamaq/recipes` when installed, `recipes/` beside the package in a checkout."""
    return _part("recipes")


def cluster_dir() -> Path:
    """Where DeepSpeed's settings and what runs on Ray lie, likewise."""
    return _part("cluster")


def _part(name: str) -> Path:
    package = Path(__file__).resolve().parent.parent
    return package / name if (package / name).is_dir() else package.parent / name


def parse_arguments(argv: list[str], usage: str) -> tuple[str, list[str]]:
    """Split `--config NAME key=value …` into the config's name and the overrides."""
    if any(a in ("-h", "--help") for a in argv):
        print(usage.strip(), "\n\nSettings (defaults in brackets; set them as key=value):\n", _settings(Config), sep="")
        sys.exit(0)
    name, overrides, rest = None, [], list(argv)
    while rest:
        arg = rest.pop(0)
        if arg == "--config":
            if not rest:
                raise UserError("--config needs a name or a file after it")
            name = rest.pop(0)
        elif arg.startswith("--config="):
            name = arg.removeprefix("--config=")
        elif arg.startswith("-"):
            raise UserError(f"unknown option {arg}: settings are given as key=value, without dashes")
        elif "=" not in arg and not arg.startswith("~"):
            raise UserError(f"'{arg}' is neither --config nor key=value")
        else:
            overrides.append(arg)
    if name is None:
        raise UserError(f"--config is required: one of {', '.join(packaged_configs())}, or a YAML file")
    return name, overrides


def load(name: str, overrides: list[str] | None = None) -> Config:
    """Read a packaged config or a YAML file, apply `key=value` overrides and check every key and type.

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest known one), a wrong type, a setting missing.
    """
    path = packaged_configs().get(name, Path(name))
    if not path.is_file():
        near = difflib.get_close_matches(name, packaged_configs(), n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; packaged configs: {', '.join(packaged_configs())}"
        raise UserError(f"config '{name}' is neither a packaged config nor a file{hint}")
    try:
        raw = OmegaConf.load(path)
    except Exception as e:  # PyYAML raises many kinds; all of them name the line
        raise UserError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(raw, DictConfig):
        raise UserError(f"{path} holds no settings")
    for item in overrides or []:
        _override(raw, item)
    return resolve(raw, str(path))


def resolve(raw: DictConfig, source: str = "config") -> Config:
    """Check a raw config against the dataclasses above and resolve its `${…}` references."""
    _check_keys(raw, Config, "", source)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), raw))
    except OmegaConfBaseException as e:
        key = getattr(e, "full_key", None) or ""
        if isinstance(e, MissingMandatoryValue):
            raise UserError(f"{source}: setting '{key}' is required and has no value") from e
        raise UserError(f"{source}: {key}: {str(e).splitlines()[0]}") from e
    assert isinstance(config, Config)
    _check_values(config)
    return config


def _override(raw: DictConfig, item: str) -> None:
    if item.startswith("~"):
        parent, _, key = item[1:].rpartition(".")
        node = OmegaConf.select(raw, parent) if parent else raw
        if node is None or key not in node:
            raise UserError(f"~{item[1:]}: there is no such setting to delete")
        del node[key]
        return
    try:
        _own_what_is_referred_to(raw, item.split("=", 1)[0])
        raw.merge_with_dotlist([item])
    except Exception as e:
        raise UserError(f"cannot apply '{item}': {str(e).splitlines()[0]}") from e


def _own_what_is_referred_to(raw: DictConfig, key: str) -> None:
    """Copy sections on the way to `key` that are references (`dataset: ${qat.dataset}`): then a part can change."""
    path = key.split(".")
    for i in range(1, len(path)):
        prefix, parent = ".".join(path[:i]), OmegaConf.select(raw, ".".join(path[: i - 1])) if i > 1 else raw
        node = parent._get_node(path[i - 1]) if isinstance(parent, DictConfig) else None
        if node is not None and node._is_interpolation():
            section = OmegaConf.to_container(OmegaConf.select(raw, prefix), resolve=False)
            OmegaConf.update(raw, prefix, section, force_add=True)


def _check_keys(node: DictConfig, schema: Any, prefix: str, source: str) -> None:
    known = {f.name: f for f in fields(schema)}
    for key in node:
        full = f"{prefix}{key}"
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known here: {', '.join(known)}"
            raise UserError(f"{source}: unknown setting '{full}'{hint}")
        section = next((t for t in _section_types(known[str(key)].type) if is_dataclass(t)), None)
        child = node._get_node(key)
        if section is not None and isinstance(child, DictConfig) and not child._is_interpolation():
            if child._is_none():
                continue
            _check_keys(child, section, f"{full}.", source)


def _section_types(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", None) or (annotation,)


def _check_values(c: Config) -> None:
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    need(c.dtype in ("bf16", "fp32"), f"dtype={c.dtype}: choose bf16 or fp32")
    need(c.device in ("auto", "cpu") or c.device.startswith("cuda"), f"device={c.device}: choose auto, cpu or cuda")
    sizes = (32, 64, 128, 256)
    need(c.scheme.group_size in sizes, f"scheme.group_size={c.scheme.group_size}: ExecuTorch takes {sizes}")
    need(c.adapters.rank >= 2, f"adapters.rank={c.adapters.rank}: ExecuTorch's loader needs 2 or more")
    need(
        c.adapters.alpha > 0 and math.frexp(c.adapters.alpha / c.adapters.rank)[0] == 0.5,
        f"adapters.alpha={c.adapters.alpha}, adapters.rank={c.adapters.rank}: ExecuTorch fixes alpha / rank at 2, and "
        "only another power of two can be folded into bf16 weights exactly; choose alpha = 2 · rank",
    )
    need(c.engine in ("auto", "torch", "deepspeed"), f"engine={c.engine}: choose auto, torch or deepspeed")
    deepspeed_settings(c)
    modes = (None, "online", "offline", "disabled")
    need(c.wandb.mode in modes, f"wandb.mode={c.wandb.mode}: choose online, offline or disabled")
    need(
        c.export.stage in ("qat", "qat_lora", "qat_dpo"),
        f"export.stage={c.export.stage}: choose qat, qat_lora or qat_dpo",
    )
    need(
        c.export.baseline_dtype in ("bf16", "fp32"),
        f"export.baseline_dtype={c.export.baseline_dtype}: choose bf16 or fp32",
    )
    for name in c.export.adapters:
        need(
            name.isidentifier() and name != "forward" and not name.startswith(("get_", "use_")),
            f"export.adapters.{name}: a method's name is letters, digits and _, and not one the file has anyway",
        )
    for key in ("file_tokens", "speed_prompt_tokens", "speed_new_tokens"):
        need(getattr(c.evaluate, key) >= 1, f"evaluate.{key}={getattr(c.evaluate, key)}: must be at least 1")
    need(
        c.export.max_context_length >= c.export.max_seq_length,
        f"export.max_context_length={c.export.max_context_length} is below "
        f"export.max_seq_length={c.export.max_seq_length}",
    )
    for word in ("int8", "8da4w"):
        need(
            word not in str(Path(c.output_dir).absolute()),
            f"output_dir={c.output_dir}: its full path contains '{word}', which makes ExecuTorch 1.4.1's loader take "
            "a dead branch; choose another folder",
        )
    for name in ("base", "qat", "qat_lora", "qat_dpo"):
        t = getattr(c, name)
        if t is None:
            continue
        for key in ("batch_size", "global_batch_size", "epochs", "checkpoint_every_n_steps", "keep_checkpoints"):
            need(getattr(t, key) >= 1, f"{name}.{key}={getattr(t, key)}: must be at least 1")
        need(t.max_steps is None or t.max_steps >= 1, f"{name}.max_steps={t.max_steps}: must be at least 1")
        need(0 <= t.distill_weight <= 1, f"{name}.distill_weight={t.distill_weight}: must be between 0 and 1")
        need(
            t.global_batch_size % t.batch_size == 0,
            f"{name}.global_batch_size={t.global_batch_size} is not a multiple of {name}.batch_size={t.batch_size}",
        )
        for key in ("dataset", "optimizer", "lr_scheduler"):
            _need_component(getattr(t, key), f"{name}.{key}")
    for key in ("model", "tokenizer", "corpus"):
        _need_component(getattr(c, key), key)
    _need_component(c.evaluate.dataset, "evaluate.dataset")
    if c.qat_dpo is not None:
        _need_component(c.qat_dpo.loss, "qat_dpo.loss")
    if c.spinquant is not None:
        _check_spinquant(c.spinquant, need)


def _check_spinquant(s: SpinQuantConfig, need: Any) -> None:
    known = ("none", "r4", "r2_r4", "r1_r2_r4")
    need(len(s.calibration) > 0, "spinquant.calibration names no dataset")
    for i, part in enumerate(s.calibration):
        _need_component(part.dataset, f"spinquant.calibration[{i}].dataset")
        need(part.num_samples >= 1, f"spinquant.calibration[{i}].num_samples={part.num_samples}: must be at least 1")
    for name in s.candidates:
        need(name in known, f"spinquant.candidates: '{name}' is none of {', '.join(known)}")
    need(
        "none" in s.candidates or s.force is not None,
        "spinquant.candidates has no 'none': a rotation is held against not rotating; add it, or set spinquant.force",
    )
    for key in ("num_selection", "batch_size", "num_seeds", "steps"):
        need(getattr(s, key) >= 1, f"spinquant.{key}={getattr(s, key)}: must be at least 1")
    for key in ("refine_steps", "polish_steps"):
        need(getattr(s, key) >= 0, f"spinquant.{key}={getattr(s, key)}: must not be negative")
    need(s.objective in ("noise", "published"), f"spinquant.objective={s.objective}: choose noise or published")
    need(s.rounding in ("gptq", "rtn"), f"spinquant.rounding={s.rounding}: choose gptq or rtn")
    need(s.lr > 0 and s.damping > 0, "spinquant.lr and spinquant.damping must be positive")


def _need_component(section: Component | None, name: str) -> None:
    if section is not None and not isinstance(section.get("_component_"), str):
        raise UserError(f"{name} has no _component_: name the function or class to use, e.g. torch.optim.AdamW")


def _settings(schema: Any, prefix: str = "  ") -> str:
    lines = []
    defaults = schema()
    for f in fields(schema):
        section = next((t for t in _section_types(f.type) if is_dataclass(t)), None)
        if section is not None and not str(f.type).startswith("list"):
            lines += [f"{prefix}{f.name}.", _settings(section, prefix + "  ")]
        else:
            value = getattr(defaults, f.name)
            lines.append(f"{prefix}{f.name} [{'required' if value == MISSING else value}]")
    return "\n".join(lines)
