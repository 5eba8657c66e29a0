"""The `export` section: what the .pte file can do, and how closely it has to match the model that was trained."""

from dataclasses import dataclass, field

from llamaq.config.checks import at_least, fraction, one_of, require


@dataclass
class ExportConfig:
    """The .pte file, and the gates it has to pass."""

    stage: str = "qat_dpo"
    """The training stage whose model ships: `qat`, `qat_lora` or `qat_dpo`. `qat` has no adapters. `qat_lora` leaves
    the backbone of `qat` as it is, so other adapters can share it (see `export.adapters`). SpinQuant ignores this."""

    max_seq_length: int = 512
    """Tokens the .pte takes in one call, at least 1. Longer prompts take several calls, which ExecuTorch's runner makes
    by itself. Memory on the phone grows with it (docs/memory.md)."""

    max_context_length: int = 2048
    """Tokens of prompt and answer that fit into the KV cache. At least `max_seq_length`, at most the model's own. The
    cache is allocated in full when the model is loaded."""

    quantize_kv_cache: bool = False
    """Store the KV cache as int8, per token and head. It takes a quarter of the memory and loses some quality; the
    report says how much."""

    dynamic_shape: bool = True
    """Let a call have any number of tokens up to `max_seq_length`. `false`: one token per call; prompts are read more
    slowly, and the export takes half the time."""

    full_logits: bool = False
    """Return the logits of every token of a call, not just the last. Such a file is faster to evaluate and needs more
    memory: not for phones."""

    adapters: dict[str, str] = field(default_factory=dict)
    """More adapters on the same backbone: method name → PEFT folder. Each becomes a method of the .pte beside
    `forward`; the backbone is stored once. Example: `export.adapters.sql=runs/1B_sql/convert/adapter`. The adapters
    need the rank of the exported ones and must have been trained on the very backbone that is exported
    (docs/export.md)."""

    trust_adapters: bool = False
    """Take adapters of `export.adapters` that do not say which backbone they were trained on (`backbone.json`, which
    llamaq writes beside its own). On another backbone they compute something that nobody has trained."""

    baseline_dtype: str = "bf16"
    """Dtype of the full-precision .pte: `bf16` or `fp32`. The .pte that ships is compared with it. On x86 CPUs,
    ExecuTorch computes bf16 on one thread; `fp32` is the fairer comparison of speed there."""

    prompt: str = "Hello, who are you?"
    """A prompt that the exported file answers. The answer is in the report."""

    chat: bool = True
    """Put the prompt into the tokenizer's chat template. `false` for models of plain text."""

    max_new_tokens: int = 48
    """Tokens of the answer to `prompt`, at most; 0 or more. Prompt and answer have to fit into
    `max_context_length`."""

    gate_tokens: int = 128
    """Held-out tokens on which the gates are measured, at least 1. They are the first of `evaluate.dataset`, up to
    `max_context_length`."""

    max_relative_error: float = 1e-4
    """Gate: largest relative error of the logits, ‖difference‖ / ‖reference‖, 0 or more. For the .pte it is that of the
    median token, for the steps before it that of all tokens together (docs/numerics.md, The gates). Another value runs
    `convert` and `export` again."""

    min_top1_agreement: float = 1.0
    """Gate: smallest share of equal top-1 tokens, 0 to 1. A token is equal if the most likely next token is the same
    before and after the step."""

    max_kl: float = 1e-3
    """Gate: largest KL of the .pte from the trained model, in nats per token, 0 or more. It is measured on
    `gate_tokens` as one context, so that it also tests the KV cache."""

    noise_factor: float = 3.0
    """Gate: a .pte beyond a limit above passes if it is no further from the trained model than this many times what one
    float32 ulp in every linear's output does to that model, 0 or more. In deep models rounding alone exceeds the limits
    (docs/numerics.md, The gates). 0: only the limits count."""

    def check(self, name: str) -> None:
        """Check names, lengths, gates and the names of methods."""
        one_of(f"{name}.stage", self.stage, "qat", "qat_lora", "qat_dpo")
        one_of(f"{name}.baseline_dtype", self.baseline_dtype, "bf16", "fp32")
        at_least(1, self, name, "max_seq_length", "gate_tokens")
        at_least(0, self, name, "max_new_tokens")
        for method in self.adapters:
            require(
                method.isidentifier() and method != "forward" and not method.startswith(("get_", "use_")),
                f"{name}.adapters.{method}: a method's name is letters, digits and _, and not one the file has anyway",
            )
        require(
            self.max_context_length >= self.max_seq_length,
            f"{name}.max_context_length={self.max_context_length} is below {name}.max_seq_length={self.max_seq_length}",
        )
        require(
            self.room_for_prompt > 0,
            f"{name}.max_new_tokens={self.max_new_tokens} leaves no room for a prompt in {name}.max_context_length="
            f"{self.max_context_length}; lower it to {max(0, self.max_context_length - 2)} or less",
        )
        fraction(f"{name}.min_top1_agreement", self.min_top1_agreement)
        for key in ("max_relative_error", "max_kl", "noise_factor"):  # infinity turns a gate off
            require(getattr(self, key) >= 0, f"{name}.{key}={getattr(self, key)}: must be 0 or more")

    @property
    def room_for_prompt(self) -> int:
        """Return the most tokens that `prompt` can have."""
        return self.max_context_length - self.max_new_tokens - 1
