"""Two optimizer steps of a stage in a process of its own: prints what it held at its peak, beside the plan.

    MALLOC_MMAP_THRESHOLD_=65536 python memory_probe.py qat|qat_lora|qat_dpo BATCH SEQ_LEN [key=value …]

At real shapes glibc maps every tensor alone and gives it back; here, where they are small, it has to be told to.
"""

import json
import sys

import torch

from llamaq.config import load
from llamaq.config.components import instantiate
from llamaq.export.benchmark import memory
from llamaq.model.build import build_model
from llamaq.model.shape import shape_of
from llamaq.plan.memory import stage_bytes
from llamaq.quant.scheme import Scheme
from llamaq.train.loop import make_engine, one_step
from llamaq.train.objectives import DPO, SFT


def main() -> None:
    kind, batch, seq_len = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sizes = [f"{kind}.batch_size={batch}", f"{kind}.global_batch_size={batch}"]
    c = load("tiny", ["output_dir=/tmp/none", "wandb.mode=disabled", *sizes, *sys.argv[4:]])
    training, device = getattr(c, kind), torch.device("cpu")
    adapters = None if kind == "qat" else (c.adapters.rank, c.adapters.alpha)
    # a first step of a tiny model: what libraries allocate once is not the model's
    tokens = torch.randint(0, c.model["vocab_size"], (batch, seq_len))
    tiny = {"embed_dim": 64, "num_layers": 1, "intermediate_dim": 64, "num_heads": 2, "num_kv_heads": 1}
    small = build_model(c.model | tiny, None, Scheme(), adapters, frozen=kind == "qat_lora")
    small(tokens[:1, :8], tokens[:1, :8])[0].sum().backward()
    del small
    before = memory("VmRSS")
    model = build_model(c.model, None, Scheme(), adapters, frozen=kind == "qat_lora")
    engine = make_engine(model, training, kind, 2, c, device)
    if kind == "qat_dpo":
        objective = DPO(0, instantiate(c.section("qat_dpo").loss, setting="qat_dpo.loss"))
        pairs = torch.cat([tokens, tokens.flip(0)])
        batches = [{"tokens": pairs, "labels": pairs, "reference": torch.zeros(2 * batch)}]
    else:
        objective, batches = SFT(0), [{"tokens": tokens, "labels": tokens}]
    for _ in range(2):
        one_step(engine, objective, batches, training, device)
    parts = stage_bytes(shape_of(c.model), training, c, seq_len, kind)
    print(json.dumps({"measured": memory("VmHWM") - before, "planned": sum(parts.values()), "parts": parts}))


if __name__ == "__main__":
    main()
