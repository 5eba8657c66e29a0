"""The table of SpinQuant: what rotations and rounding are worth, side by side on one model, several seeds.

    python tests/benchmarks/spinquant_table.py --config reference_spinquant data_dir=../shared/reference
    python tests/benchmarks/spinquant_table.py --config tiny_spinquant output_dir=runs/tiny_spinquant   (after a run)

Held-out KL from the BF16 model, in nats a token, of every combination; learning is timed in the same process. The
published objective gets its published settings: 100 steps of 8 windows, Cayley SGD from lr 1.5, its own GPTQ. Intervals
are 95 %: over seeds (t), and paired over held-out windows for the comparisons.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamaq import torchao_compat  # noqa: F401
from llamaq.checkpoints.load import start_weights
from llamaq.config import Config, load
from llamaq.data.datasets import build_dataset
from llamaq.data.tokenizer import tokenizer_of
from llamaq.model.build import build_decoder, build_model, scheme_of
from llamaq.model.causal_lm import CausalLM
from llamaq.model.online import attach_online
from llamaq.model.shape import shape_of
from llamaq.quant.prepare import freeze, prepare
from llamaq.spinquant.calibrate import collect
from llamaq.spinquant.candidates import judge
from llamaq.spinquant.end_to_end import EndToEnd, learn_as_published
from llamaq.spinquant.expected_noise import ExpectedNoise, learn_by_noise
from llamaq.spinquant.gptq import Rounding, round_layers
from llamaq.spinquant.loops import bar
from llamaq.spinquant.rotations import Rotations, fuse_norms, rotate
from llamaq.spinquant.windows import windows

CPU = torch.device("cpu")
T_95 = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's t, by number of seeds


def heldout(c: Config, count: int) -> Tensor:
    """Return windows [n, s] of the evaluation text."""
    tokenizer = tokenizer_of(c)
    dataset = build_dataset(c.evaluate.dataset, tokenizer, "evaluate.dataset")
    stream = [t for i in range(len(dataset)) for t in dataset[i]["tokens"]]
    n = min(count, len(stream) // tokenizer.max_seq_len)
    return torch.tensor(stream[: n * tokenizer.max_seq_len]).view(n, -1)


class Bench:
    """One model with its text, and what has been measured on it so far."""

    def __init__(self, c: Config, num_windows: int):
        self.model, self.scheme, self.weights = c.model, scheme_of(c), start_weights(c)
        self.bf16 = build_model(c.model, self.weights, None).eval()
        self.shape, self.text, self.unseen = shape_of(c.model), windows(c)[0], heldout(c, num_windows)
        self.batches = list(self.text.split(8))
        self.kl: dict[str, list[Tensor]] = {}  # by rotation and rounding: for each seed, by held-out window
        self.seconds: dict[str, list[float]] = {}  # of learning
        began = time.monotonic()
        self.fused = fuse_norms(self.weights, self.shape)
        decoder: Any = build_decoder(c.model, self.fused).eval().requires_grad_(False)
        self.statistics = collect(decoder, self.shape, self.batches, 0)
        self.collecting = time.monotonic() - began

    @torch.no_grad()
    def measure(self, name: str, r: Rotations, how: Rounding | None) -> None:
        """Merge rotations, round (None: to nearest, without calibration) and note the KL on the held-out windows."""
        rotated = rotate(self.weights, self.shape, r)
        student: Any = prepare(build_decoder(self.model, rotated), self.scheme)
        exact = build_decoder(self.model, rotated)
        for decoder in (student, exact):
            attach_online(decoder.eval().requires_grad_(False), r.r4)
        if how is not None:
            round_layers(student, self.batches, self.scheme.linear, how, exact, progress=bar(name, "layer"))
        freeze(student)
        kl = judge(CausalLM(student), self.bf16, self.unseen, 8, CPU, bar(f"{name}: judge", "batch"))
        self.kl.setdefault(name, []).append(kl)
        print(f"{name}: {kl.mean():.3e}", flush=True)

    def measure_both(self, name: str, r: Rotations) -> None:
        """Measure rotations with the published rounding and with ours."""
        self.measure(f"{name}, plain GPTQ", r, Rounding.published())
        self.measure(f"{name}, our GPTQ", r, Rounding())

    def rotations_by_noise(self, start: Rotations, seed: int, steps: int) -> Rotations:
        """Learn by the default objective."""
        began, name = time.monotonic(), f"noise, {steps} steps"
        objective = ExpectedNoise(self.fused, self.shape, self.statistics, self.scheme, None, seed, CPU)
        learned = learn_by_noise(objective, start, steps, 2e-2, bar(name, "step"))
        self.seconds.setdefault(name, []).append(time.monotonic() - began + self.collecting)
        return learned.rotations

    def published_rotations(self, start: Rotations, seed: int, steps: int) -> Rotations:
        """Learn by the published objective, on all windows in an order of the seed's."""
        began = time.monotonic()
        untied = self.weights | {"output.weight": self.weights["tok_embeddings.weight"]}
        model = EndToEnd(build_decoder(self.model, untied).eval(), untied, self.shape, start.r4, None)
        # 800 windows as published where there are as many
        order = torch.randperm(len(self.text), generator=torch.Generator().manual_seed(seed))
        batches = list(self.text[order].split(8))
        learned = learn_as_published(model, start, batches, steps, 1.5, bar("published", "step"))
        model.close()
        self.seconds.setdefault("published", []).append(time.monotonic() - began)
        return learned.rotations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="reference_spinquant")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=160, help="held-out windows")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 300], help="of the default objective")
    parser.add_argument("--published-steps", type=int, default=100)
    parser.add_argument("--json", type=Path)
    arguments, settings = parser.parse_known_args()
    bench = Bench(load(arguments.config, settings), arguments.windows)
    bench.measure("none, PTQ", Rotations(), None)
    bench.measure_both("none", Rotations())
    bench.measure("R4, our GPTQ", Rotations.random(bench.shape, {"r4"}, 0), Rounding())
    for seed in range(arguments.seeds):
        start = Rotations.random(bench.shape, {"r1", "r2", "r4"}, seed)
        bench.measure("random, plain GPTQ", start, Rounding.published())
        for steps in arguments.steps:
            bench.measure_both(f"noise, {steps} steps", bench.rotations_by_noise(start, seed, steps))
        if arguments.published_steps:
            bench.measure_both("published", bench.published_rotations(start, seed, arguments.published_steps))
        show(bench.kl, bench.seconds)
    if arguments.json:
        table = {k: [float(x.mean()) for x in v] for k, v in bench.kl.items()}
        arguments.json.write_text(json.dumps({"kl": table, "seconds": bench.seconds}, indent=1))


def show(results: dict[str, list[Tensor]], seconds: dict[str, list[float]]) -> None:
    """Print the table as markdown, the best rotation against the published one and none, and the learning times."""
    print("\n| rotation, rounding | KL × 1000 (95 % over seeds) | share of PTQ's KL won back |\n| --- | ---: | ---: |")
    ptq = float(results["none, PTQ"][0].mean())
    for name, runs in results.items():
        means = torch.stack([r.mean() for r in runs])
        spread = T_95.get(len(runs), 2.0) * float(means.std()) / len(runs) ** 0.5 if len(runs) > 1 else 0.0
        interval = f" ± {1e3 * spread:.3f}" if len(runs) > 1 else ""
        print(f"| {name} | {1e3 * float(means.mean()):.3f}{interval} | {1 - float(means.mean()) / ptq:.3f} |")
    best = [n for n in results if n.startswith("noise") and n.endswith("our GPTQ")][-1]
    for other in ("published, plain GPTQ", "none, our GPTQ"):
        if other in results:
            print(f"{best} is {compare(results[best], results[other])} below {other}")
    times = "; ".join(f"{name} {sum(each) / len(each):.1f}" for name, each in seconds.items())
    print(f"learning, seconds: {times}\n", flush=True)


def compare(ours: list[Tensor], theirs: list[Tensor]) -> str:
    """Say how much lower a KL is, with its interval: a bootstrap over held-out windows, which both share."""
    a, b = torch.stack(ours).mean(0), torch.stack(theirs).mean(0)  # [windows]
    draws = torch.randint(len(a), (2000, len(a)), generator=torch.Generator().manual_seed(0))
    ratios = 1 - a[draws].sum(1) / b[draws].sum(1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return f"{1 - float(a.sum() / b.sum()):.1%} [{low:.1%}, {high:.1%}]"


if __name__ == "__main__":
    main()
