"""The `evaluate` section: the held-out text, and what to measure on which models."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from llamaq.config.checks import at_least, at_most, has_data, require
from llamaq.config.components import Component

MOST_THREADS = 1024


@dataclass
class EvaluateConfig:
    """What to measure: held-out loss, agreement, tasks, sensitivity, speed."""

    dataset: Component = MISSING
    """The held-out data, e.g. `torchtune.datasets.chat_dataset`. Keep it out of the training data. `_component_` is a
    torchtune dataset builder, called with the tokenizer. Loss and KL are over its labelled tokens; the gates of
    `export` use its first tokens."""

    batch_size: int = 8
    """Samples in one forward pass. Lower it if memory runs out; results stay the same up to rounding."""

    max_samples: int | None = None
    """Held-out samples for loss, KL and agreement. Unset: all. Fewer are quicker and give wider confidence
    intervals."""

    models: list[str] | None = None
    """Models to measure, e.g. `[bf16, final, final.pte]`. Names: `bf16` (what the run starts from), `ptq` (that,
    rounded to nearest), `control`, `ptq_control`, `qat`, `qat_lora`, `final` (after DPO), `spinquant`. A name with
    `.pte` is the exported file, which is exported if needed. Unset: all models of the run, and as files `bf16.pte` and
    the one that ships."""

    control: bool = True
    """Also train the BF16 control: `qat` and `qat_lora` without quantization. It shows what the data changes and what
    quantization costs, and it doubles the training. Without it the report has no share won back. SpinQuant has no
    control."""

    file_tokens: int = 2048
    """Held-out tokens to read through each .pte, at least 1. A file is read one token per call, so this takes long for
    large models."""

    sensitivity_samples: int = 0
    """Held-out samples for the sensitivity map; 0 for none. The map shows what quantizing each linear costs. It takes
    two passes per linear over these samples."""

    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness, e.g. `[mmlu, gsm8k]`. They run on every model and file of `models`. Needs `pip
    install 'llamaq[eval]'`."""

    tasks_dir: str | None = None
    """Folder of lm-evaluation-harness task files of your own. `tasks` can then name the tasks in these YAML files."""

    task_limit: int | None = None
    """Questions per task, at most. Unset: all. For a quick look, e.g. 200."""

    num_fewshot: int | None = None
    """Examples before each question, 0 or more. Unset: each task's own number."""

    tasks_chat: bool = False
    """Ask in the tokenizer's chat template. For instruction-tuned models."""

    perplexity_text: str | None = None
    """Plain text file to measure perplexity on, by token and word. Form feeds separate its documents. Every model and
    file of `models` is measured."""

    speed: bool = True
    """Measure size, load time, speed and memory of the .pte files. The measurement is on this machine; nothing else
    should run on it meanwhile."""

    speed_prompt_tokens: int = 64
    """Prompt tokens when speed is measured, at least 1. Meta's table uses 64."""

    speed_new_tokens: int = 64
    """Generated tokens when speed is measured, at least 1."""

    threads: int | None = None
    """CPU threads when speed is measured, 1 to 1024. Unset: all CPUs that this process may use."""

    def check(self, name: str) -> None:
        """Check the dataset and the ranges."""
        has_data(f"{name}.dataset", self.dataset)
        at_least(1, self, name, "file_tokens", "speed_prompt_tokens", "speed_new_tokens", "batch_size")
        at_least(1, self, name, "max_samples", "task_limit", "threads")
        at_least(0, self, name, "sensitivity_samples", "num_fewshot")
        at_most(MOST_THREADS, self, name, "threads")
        require(self.models != [], f"{name}.models=[]: names no model; null measures them all")
