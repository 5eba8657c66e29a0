"""Compare exported files with what was trained: kinds of one real model, with several export options.

    python tests/benchmarks/agreement_table.py --config reference data_dir=../shared/reference        (6 minutes)
    python tests/benchmarks/agreement_table.py --config tiny output_dir=runs/tiny                     (after make demo)

The model that the config starts from is rounded to nearest (PTQ), given random adapters (its codes stay the same), or
rotated at random. Each is exported and run on held-out tokens. `floor` compares the model with itself after every
linear's output is perturbed by one float32 ulp; no export can be expected to be closer.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from llamaq import torchao_compat  # noqa: F401
from llamaq.checkpoints.load import start_weights
from llamaq.checkpoints.quantized import save_quantized
from llamaq.config import Config, ExportConfig, load, parse_arguments
from llamaq.data.datasets import build_dataset
from llamaq.data.tokenizer import tokenizer_of
from llamaq.evaluate.files import numerics
from llamaq.export.exporter import eager_cached_logits, export_pte
from llamaq.export.gates import eager_logits, windows_of
from llamaq.export.pte import Pte, check_constants
from llamaq.model.build import build_decoder, build_model, meta_decoder
from llamaq.model.causal_lm import CausalLM
from llamaq.model.compare import agreement
from llamaq.model.online import attach_online
from llamaq.model.shape import Shape
from llamaq.quant.prepare import freeze, prepare
from llamaq.quant.scheme import Scheme
from llamaq.report.tables import table
from llamaq.spinquant.rotations import Rotations, rotate

TOKENS, CONTEXT = 256, 8  # in the long context, and in each of the short ones
OPTIONS = ExportConfig(max_seq_length=128, max_context_length=TOKENS + 1)
CASES = [
    ("PTQ", OPTIONS, ""),
    ("adapters", OPTIONS, ""),
    ("adapters", replace(OPTIONS, dynamic_shape=False), "one token a call"),
    ("adapters", replace(OPTIONS, full_logits=True), "all logits"),
    ("adapters", replace(OPTIONS, quantize_kv_cache=True), "int8 KV cache"),
    ("rotated", OPTIONS, ""),
]
HEADER = [
    "file",
    "tensors bit for bit",
    "median token's error",
    "top-1",
    f"{TOKENS} tokens: error",
    "KL",
    "top-1",
    "floor: error",
    "KL",
]


def save_model(c: Config, kind: str, folder: Path) -> CausalLM:
    """Write the checkpoint of a kind of the model into `folder`, and return the model, frozen, in float32."""
    torch.manual_seed(0)
    weights, shape = start_weights(c), Shape.of(meta_decoder(c.model))
    if kind != "rotated":
        model = build_model(c.model, weights, Scheme(), (16, 32.0) if kind == "adapters" else None, frozen=True)
        for name, p in model.decoder.named_parameters():
            if name.endswith("adapter.b"):
                torch.nn.init.normal_(p, std=0.01)
        save_quantized(folder, model.decoder, Scheme())
        return model.eval()
    r = Rotations.random(shape, {"r1", "r2", "r4"}, 0)
    decoder = prepare(build_decoder(c.model, rotate(weights, shape, r)), Scheme())
    attach_online(decoder, r.r4)
    freeze(decoder)
    model = CausalLM(decoder).eval()  # pyright: ignore[reportArgumentType]
    save_quantized(folder, model.decoder, Scheme(), r.contract())
    return model


def compare(c: Config, kind: str, options: ExportConfig, title: str, tokens: list[int]) -> list[str]:
    """Export one case and return its row of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_model(c, kind, folder / "model")
        export_pte(folder / "model", folder / "model.pte", options)
        constants, pte = check_constants(folder / "model", folder / "model.pte"), Pte(folder / "model.pte")
        contexts = [*windows_of(tokens, 1 if kind == "rotated" else CONTEXT), tokens]
        if options.quantize_kv_cache:
            expected = eager_cached_logits(folder / "model", contexts, options)
        else:
            expected = eager_logits(model, contexts)
        short = agreement(torch.cat(expected[:-1]), torch.cat([pte.logits(w) for w in contexts[:-1]]))
        long = agreement(expected[-1], pte.logits(tokens))
        floor = numerics(model, torch.tensor([tokens]))["float32"]
    return [
        f"{kind}, {title}" if title else kind,
        str(constants),
        f"{short['token_error']:.1e}",
        f"{short['top1']:.3f}",
        f"{long['relative_error']:.1e}",
        f"{long['kl']:.1e}",
        f"{long['top1']:.3f}",
        f"{floor['relative_error']:.1e}",
        f"{floor['kl']:.1e}",
    ]


@torch.no_grad()
def main() -> None:
    """Print the table."""
    c = load(*parse_arguments(sys.argv[1:], __doc__ or ""))
    dataset = build_dataset(c.evaluate.dataset, tokenizer_of(c), "evaluate.dataset")
    tokens: list[int] = []
    for i in range(len(dataset)):
        tokens = (tokens + list(dataset[i]["tokens"]))[:TOKENS]
    rows = []
    for kind, options, title in CASES:
        rows.append(compare(c, kind, options, title, tokens))
        print(rows[-1], file=sys.stderr, flush=True)
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
