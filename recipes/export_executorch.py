"""Convert the trained model to integer codes in Meta's layout, and export it as a .pte for Arm CPUs.

    tune run export_executorch --config llama3_2/1B_qat_lora_dpo [key=value …]        (after `tune run qat_dpo`)

With `export.adapters` the file has a method for each further set of adapters trained on the same backbone.

`convert/model/` loads in ExecuTorch (`export_llama -qat -lora 16 --preq_mode 8da4w_output_8da8w …`) and in
llama-models; `convert/adapter/` holds the adapters for PEFT; `export/model.pte` runs on XNNPACK and KleidiAI. Every
hand-over is measured, fake-quantized → converted → ExecuTorch's eager model → .pte, and the chain stops where a gate
(`export.max_relative_error`, `export.min_top1_agreement`) is missed.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llamaq.checkpoints.quantized import BACKBONE, backbone_hash, load_quantized, save_peft, save_quantized
from llamaq.evaluate.scores import agreement
from llamaq.export.exporter import load_eager
from llamaq.export.gates import (
    GATE_CONTEXT,
    check_gate,
    check_method,
    copy_tokenizer,
    export_checked,
    gate_settings,
    gate_tokens,
    with_adapters,
)
from llamaq.export.pte import Pte
from llamaq.model.causal_lm import CausalLM, build_model
from llamaq.runs.main import main
from llamaq.runs.run import Run, on_rank_zero, say, write_json
from llamaq.train.sft import tokenizer_of, weights_of


def parts_of(stage: str) -> list[str]:
    """The stages that hold the weights of the model after `stage`."""
    return ["qat", "qat_lora"] if stage == "qat_lora" else [stage]  # DPO trains both, and keeps both


def trained_model(run: Run, stage: str, frozen: bool = False) -> CausalLM:
    """The model after qat, qat_lora or qat_dpo, float32 on the CPU, latent (fake-quantized) or frozen."""
    c = run.config
    adapters = None if stage == "qat" else (c.adapters.rank, c.adapters.alpha)
    weights = weights_of(*(run.path(p) for p in parts_of(stage)))
    return build_model(c.model, weights, run.scheme, adapters, frozen=frozen).eval()


def final_model(run: Run, frozen: bool = False) -> CausalLM:
    """What ships: the model after `export.stage`, likewise."""
    return trained_model(run, run.config.export.stage, frozen)


@torch.no_grad()
def convert(run: Run) -> Path:
    """Integer codes and scales, bf16 adapters, params.json and the tokenizer; checked by reading the files back."""
    c = run.config
    trained = [run.need(p) for p in parts_of(c.export.stage)]

    def build(folder: Path) -> dict[str, Any]:
        latent, tokens = final_model(run), torch.tensor([gate_tokens(run)])
        expected = latent(tokens)[0]
        shipped = final_model(run, frozen=True)
        save_quantized(folder / "model", shipped.decoder, run.scheme)
        if c.export.stage != "qat":
            save_peft(folder / "adapter", shipped.decoder, c.adapters.rank, c.adapters.alpha)
            write_json(folder / "adapter" / BACKBONE, {"sha256": backbone_hash(folder / "model")})
        copy_tokenizer(c, folder / "model")
        read_back = load_quantized(folder / "model", build_model(c.model, weights_of(*trained), run.scheme).decoder)
        eager = load_eager(folder / "model", len(tokens[0]))
        return {
            name: check_gate(run, f"fake-quantized → {what}", agreement(expected, logits), "relative_error", "top1")
            for name, what, logits in (
                ("converted", "converted", CausalLM(read_back)(tokens)[0]),
                ("executorch_eager", "ExecuTorch eager", eager(tokens)[0]),
            )
        }

    settings = {"tokenizer": c.tokenizer, "model": c.model, "adapters": [c.adapters.rank, c.adapters.alpha]}
    return run.stage("convert", on_rank_zero(build), settings | gate_settings(run), trained)


@torch.no_grad()
def export(
    run: Run, source: str = "convert", model: Callable[[Run], CausalLM] = final_model, context: int = GATE_CONTEXT
) -> Path:
    """The .pte, compared with the fake-quantized model token by token, and asked a question.

    Args:
        run: the run.
        source: the stage whose `model/` is exported.
        model: the same model as llamaq computes it.
        context: tokens in a short context of the gates.
    """
    c = run.config
    converted = run.need(source)
    adapters = {name: Path(folder) for name, folder in c.export.adapters.items()}

    def build(folder: Path) -> dict[str, Any]:
        e, tokenizer, pte_file = c.export, tokenizer_of(c), folder / "model.pte"
        methods = {n: with_adapters(converted / "model", a, folder / "methods" / n) for n, a in adapters.items()}
        result = export_checked(run, converted / "model", pte_file, lambda: model(run), context, methods)
        for name, checkpoint in methods.items():
            result["hand_overs"][f"pte/{name}"] = check_method(run, checkpoint, pte_file, name, context)
            shutil.rmtree(checkpoint)  # all of it is in the .pte
        prompt = prompt_tokens(tokenizer, e.prompt, e.chat)
        answer = tokenizer.decode(Pte(pte_file).generate(prompt, e.max_new_tokens, list(tokenizer.stop_tokens)))
        say(f"{e.prompt} → {answer}")
        return result | {"prompt": e.prompt, "answer": answer}

    settings = {"export": c.export, "tokenizer": c.tokenizer} | gate_settings(run)
    return run.stage("export", on_rank_zero(build), settings, [converted, *adapters.values()])


def prompt_tokens(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """A prompt as the model saw it in training: a user's turn and the start of the answer, or plain text."""
    if not chat:
        return tokenizer.encode(prompt, add_bos=True, add_eos=False)
    from torchtune.data import Message

    messages = [Message(role="user", content=prompt), Message(role="assistant", content="")]
    return tokenizer.tokenize_messages(messages, add_end_tokens=False)[0]


def recipe(run: Run) -> None:
    convert(run)
    say(f"model: {export(run)}/model.pte")


if __name__ == "__main__":
    main(recipe, __doc__)
