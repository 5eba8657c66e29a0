"""Export a random model, then run it, each in a process of its own: peak memory beside the plans.

    python memory_probe.py FOLDER qat|qat_lora [key=value …]

Settings go over the tiny config's, e.g. model.embed_dim=1024.
"""

import json
import multiprocessing
import sys
from pathlib import Path

import torch

from llamaq.checkpoints.quantized import save_quantized
from llamaq.config import Config, load
from llamaq.export.benchmark import measure_model, memory
from llamaq.export.exporter import export_pte
from llamaq.model.build import build_model
from llamaq.model.shape import shape_of
from llamaq.plan.memory import export_bytes, phone_bytes
from llamaq.quant.scheme import Scheme


def configured(folder: str, kind: str, settings: list[str]) -> Config:
    return load("tiny", [f"output_dir={folder}/run", f"export.stage={kind}", *settings])


def write(folder: str, kind: str, settings: list[str]) -> None:
    c = configured(folder, kind, settings)
    model = build_model(c.model, None, Scheme(), (16, 32.0) if kind == "qat_lora" else None, frozen=True)
    for name, p in model.decoder.named_parameters():
        if name.endswith("adapter.b"):
            torch.nn.init.normal_(p, std=0.02)  # else the file would store all of them once
    save_quantized(Path(folder) / "model", model.decoder, Scheme())


def export(folder: str, kind: str, settings: list[str], peaks) -> None:
    c = configured(folder, kind, settings)
    export_pte(f"{folder}/model", f"{folder}/model.pte", c.export, {"get_bos_id": 1, "get_eos_ids": [2]})
    peaks["export"] = memory("VmHWM")


def run(folder: str, kind: str, settings: list[str], peaks) -> None:
    tokens = configured(folder, kind, settings).export.max_seq_length
    peaks["phone"] = measure_model(f"{folder}/model.pte", tokens, 4, 1, 1)["memory_bytes"][0]


def main() -> None:
    folder, kind, *settings = sys.argv[1:]
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        peaks = manager.dict()
        for step, arguments in ((write, ()), (export, (peaks,)), (run, (peaks,))):
            process = context.Process(target=step, args=(folder, kind, settings, *arguments))
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(f"{step.__name__} failed")
        c = configured(folder, kind, settings)
        shape = shape_of(c.model)
        plans = {"export": export_bytes(shape, c), "phone": phone_bytes(shape, c, kind == "qat_lora")}
        print(json.dumps({k: {"measured": peaks[k], "planned": sum(plans[k].values())} for k in plans}))


if __name__ == "__main__":
    main()
