"""How close exported files are to what was trained: variants and export options of one real model.

    python tests/benchmarks/agreement_table.py --config reference data_dir=../shared/reference        (6 minutes)
    python tests/benchmarks/agreement_table.py --config tiny output_dir=runs/tiny                     (after make demo)

The model the config starts from is rounded to nearest (PTQ), given random adapters (whose codes are the same), and
rotated at random; each is exported with options and run on held-out tokens. `floor` is the model against itself with
the output of every linear off by a last place: what float32 leaves open, whoever computes.
"""

import sys
import tempfile
from pathlib import Path

import torch

from llamaq import torchao_compat  # noqa: F401
from llamaq.checkpoints.quantized import save_quantized
from llamaq.config import load, parse_arguments
from llamaq.data.datasets import build_dataset
from llamaq.evaluate.scores import agreement
from llamaq.evaluate.stages import numerics
from llamaq.export.exporter import PteOptions, eager_cached_logits, export_pte
from llamaq.export.gates import eager_logits, windows_of
from llamaq.export.pte import Pte, check_constants
from llamaq.model.causal_lm import CausalLM, build_decoder, build_model, meta_decoder
from llamaq.quant.prepare import freeze, prepare
from llamaq.quant.scheme import Scheme
from llamaq.report.page import table
from llamaq.spinquant.rotations import Rotations, Shape, attach_online, rotate
from llamaq.train.sft import start_weights, tokenizer_of

TOKENS, CONTEXT = 256, 8
CASES = [
    ("PTQ", PteOptions(), ""),
    ("adapters", PteOptions(), ""),
    ("adapters", PteOptions(dynamic_shape=False), "one token a call"),
    ("adapters", PteOptions(full_logits=True), "all logits"),
    ("adapters", PteOptions(quantize_kv_cache=True), "int8 KV cache"),
    ("rotated", PteOptions(), ""),
]


def written(c, kind: str, folder: Path) -> CausalLM:
    """The model of a kind, frozen, float32; its checkpoint in `folder`."""
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
    save_quantized(folder, model.decoder, Scheme(), r.contract(), model.head)
    return model


@torch.no_grad()
def main() -> None:
    c = load(*parse_arguments(sys.argv[1:], __doc__ or ""))
    dataset = build_dataset(c.evaluate.dataset, tokenizer_of(c), "evaluate.dataset")
    tokens: list[int] = []
    for i in range(len(dataset)):
        tokens = (tokens + list(dataset[i]["tokens"]))[:TOKENS]
    rows = []
    for kind, options, title in CASES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = written(c, kind, folder / "model")
            export_pte(folder / "model", folder / "model.pte", 128, TOKENS + 1, {}, options)
            constants, pte = check_constants(folder / "model", folder / "model.pte"), Pte(folder / "model.pte")
            contexts = [*windows_of(tokens, 1 if kind == "rotated" else CONTEXT), tokens]
            if options.quantize_kv_cache:
                expected = eager_cached_logits(folder / "model", contexts, options)
            else:
                expected = eager_logits(model, contexts)
            short = agreement(torch.cat(expected[:-1]), torch.cat([pte.logits(w) for w in contexts[:-1]]))
            long = agreement(expected[-1], pte.logits(tokens))
            floor = numerics(model, torch.tensor([tokens]))["float32"]
        rows.append([
            f"{kind}{', ' * bool(title)}{title}", str(constants), f"{short['token_error']:.1e}",
            f"{short['top1']:.3f}", f"{long['relative_error']:.1e}", f"{long['kl']:.1e}", f"{long['top1']:.3f}",
            f"{floor['relative_error']:.1e}", f"{floor['kl']:.1e}",
        ])  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    header = ["file", "tensors bit for bit", "median token's error", "top-1", f"{TOKENS} tokens: error", "KL", "top-1",
              "floor: error", "KL"]  # fmt: skip
    print(table(header, rows))


if __name__ == "__main__":
    main()
