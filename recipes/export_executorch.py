"""Convert the trained model to integer codes in Meta's layout, and export it as a .pte for Arm CPUs.

    tune run export_executorch --config llama3_2/1B_qat_lora_dpo [key=value …]        (after `tune run qat_dpo`)

    convert    integer codes and scales, Meta layout: `convert/model/` loads in ExecuTorch (`export_llama -qat -lora 16
               --preq_mode 8da4w_output_8da8w …`) and in llama-models; `convert/adapter/` holds the adapters for PEFT
    export     `export/model.pte` for XNNPACK and KleidiAI; with `export.adapters`, a method for each further set of
               adapters trained on the same backbone
    answer     what the exported file answers to `export.prompt`

Every hand-over is measured, fake-quantized → converted → ExecuTorch's eager model → .pte, and the chain stops where a
gate (`export.max_relative_error`, `export.min_top1_agreement`, `export.max_kl`) is missed.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llamaq.checkpoints.peft import save_peft, with_adapters
from llamaq.checkpoints.peft_config import BACKBONE
from llamaq.checkpoints.quantized import backbone_hash, load_quantized, save_quantized
from llamaq.checkpoints.torchtune import weights_of
from llamaq.config import without
from llamaq.config.view import only
from llamaq.data.tokenizer import copy_tokenizer, prompt_tokens, tokenizer_of
from llamaq.export.exporter import load_eager
from llamaq.export.gates import FILE, GATE_CONTEXT, GATES, check_gate, check_method, export_checked, gate_tokens
from llamaq.export.pte import Pte
from llamaq.model.build import build_model, scheme_of
from llamaq.model.causal_lm import CausalLM
from llamaq.model.compare import agreement
from llamaq.plan.preflight import check_adapters, check_prompt
from llamaq.runs.files import write_json
from llamaq.runs.main import main
from llamaq.runs.ranks import on_rank_zero, say
from llamaq.runs.run import Run

NEEDS = ("qat",)  # of a SpinQuant config, `tune run spinquant` exports


def parts_of(stage: str) -> list[str]:
    """Name the stages that hold the weights of the model after `stage`."""
    return ["qat", "qat_lora"] if stage == "qat_lora" else [stage]  # DPO trains both, and keeps both


def trained_model(run: Run, stage: str, frozen: bool = False) -> CausalLM:
    """Build the model after qat, qat_lora or qat_dpo, float32 on the CPU, latent (fake-quantized) or frozen."""
    c = only(run.config, "model", "scheme", "adapters")
    adapters = None if stage == "qat" else (c.adapters.rank, c.adapters.alpha)
    weights = weights_of(*(run.path(p) for p in parts_of(stage)))
    return build_model(c.model, weights, scheme_of(c), adapters, frozen=frozen).eval()


def final_model(run: Run, frozen: bool = False) -> CausalLM:
    """Build the model that ships, the one after `export.stage`; see `trained_model`."""
    return trained_model(run, run.config.export.stage, frozen)


@torch.no_grad()
def convert(run: Run) -> Path:
    """Write integer codes, bf16 adapters, params.json and the tokenizer, and check them by reading them back."""
    c = only(run.config, *GATES, "scheme", "adapters", "export.stage")
    trained = [run.need(p, made_by=f"tune run {p}") for p in parts_of(c.export.stage)]

    def build(folder: Path) -> dict[str, Any]:
        tokens = torch.tensor([gate_tokens(c)])
        expected = final_model(run)(tokens)[0]
        shipped = final_model(run, frozen=True)
        save_quantized(folder / "model", shipped.decoder, scheme_of(c))
        if c.export.stage != "qat":
            save_peft(folder / "adapter", shipped.decoder, c.adapters.rank, c.adapters.alpha)
            write_json(folder / "adapter" / BACKBONE, {"sha256": backbone_hash(folder / "model")})
        copy_tokenizer(c.tokenizer, folder / "model")
        latent = build_model(c.model, weights_of(*trained), scheme_of(c)).decoder
        read_back = CausalLM(load_quantized(folder / "model", latent))
        eager = load_eager(folder / "model", tokens.shape[1])

        def compare(what: str, logits: torch.Tensor) -> dict[str, float]:
            result = agreement(expected, logits)
            return check_gate(c.export, f"fake-quantized → {what}", result, "relative_error", "top1")

        return {
            "converted": compare("converted", read_back(tokens)[0]),
            "executorch_eager": compare("ExecuTorch eager", eager(tokens)[0]),
        }

    return run.stage("convert", on_rank_zero(build), c, trained)


@torch.no_grad()
def export(
    run: Run, source: str = "convert", model: Callable[[Run], CausalLM] = final_model, context: int = GATE_CONTEXT
) -> Path:
    """Export the .pte and compare it with the fake-quantized model token by token.

    Args:
        run: the run.
        source: the stage whose `model/` is exported.
        model: builds the same model as llamaq computes it.
        context: tokens in a short context of the gates.
    """
    c = only(run.config, *GATES, *FILE, "export.adapters", "scheme", "adapters")
    codes = run.need(source) / "model"

    def build(folder: Path) -> dict[str, Any]:
        pte_file = folder / "model.pte"
        methods = {
            name: with_adapters(codes, Path(adapter), folder / "methods" / name, c.export.trust_adapters)
            for name, adapter in c.export.adapters.items()
        }
        result = export_checked(c, codes, pte_file, lambda: model(run), context, methods)
        for name, checkpoint in methods.items():
            noise = result["noise"]["pte"]
            result["hand_overs"][f"pte/{name}"] = check_method(c, checkpoint, pte_file, name, noise, context)
        shutil.rmtree(folder / "methods", ignore_errors=True)  # all of it is in the .pte
        return result

    return run.stage("export", on_rank_zero(build), c, [run.path(source)], arguments={"context": context})


def answer(run: Run) -> Path:
    """Ask the exported file `export.prompt`; another prompt exports nothing again."""
    c = only(run.config, "tokenizer", "model", "export.prompt", "export.chat", "export.max_new_tokens")
    exported = run.need("export", made_by="tune run export_executorch")

    def build(folder: Path) -> dict[str, Any]:
        tokenizer, e = tokenizer_of(c), c.export
        prompt, stop = prompt_tokens(tokenizer, e.prompt, e.chat), list(tokenizer.stop_tokens)
        text = tokenizer.decode(Pte(exported / "model.pte").generate(prompt, e.max_new_tokens, stop))
        say(f"{e.prompt} → {text}")
        return {"prompt": e.prompt, "answer": text} | shown_in_template(tokenizer, e.prompt, text, e.chat)

    return run.stage("answer", on_rank_zero(build), c, [exported], version=2)


def shown_in_template(tokenizer: Any, question: str, text: str, chat: bool) -> dict[str, str]:
    """Return the name of the chat template, and question and answer as it writes them, for report and card."""
    if not chat:
        return {"template": "no chat template: the model continues text", "conversation": question + text}
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    return {"template": tokenizer.template_name, "conversation": tokenizer.render(turns)}


def recipe(run: Run) -> None:
    """Convert, export, and ask the file."""
    run.config = without(run.config, "spinquant")
    check_prompt(run.config)
    check_adapters(run.config)
    convert(run)
    exported = export(run)
    answer(run)
    say(f"model: {exported}/model.pte")


if __name__ == "__main__":
    main(recipe, __doc__, NEEDS)
