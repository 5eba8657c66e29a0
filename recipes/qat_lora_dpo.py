"""The whole chain: a BF16 checkpoint in, a quantized .pte and a report out.

    tune run qat_lora_dpo --config tiny                                        minutes, nothing to download
    tune run qat_lora_dpo --config llama3_2/1B_qat_lora_dpo checkpoint_dir=/path/to/Llama-3.2-1B-Instruct
    tune run --nproc_per_node 2 qat_lora_dpo --config …

    corpus, base          what the config starts from, if it says how to make it
    qat                   supervised fine-tuning, every weight of the scheme fake-quantized
    qat_lora              adapters on the frozen integer backbone
    reference, qat_dpo    preferences, backbone and adapters
    convert, export       integer codes in Meta's layout, then the .pte; each hand-over measured and gated
    control_*, evaluate   the same training without quantization, and every model on held-out text
    files, speed, …       the exported file itself: see `tune run evaluate --help`
    report                report/report.md, and README.md, the model card

Run it again to resume: finished stages are checked and kept, an interrupted one goes on from its last checkpoint, and
a changed setting runs again only what depends on it.
"""

from llamaq.recipes.evaluate import chain_names, check, evaluate_and_report_chain
from llamaq.recipes.export_executorch import convert, export
from llamaq.recipes.qat import qat, start
from llamaq.recipes.qat_dpo import qat_dpo
from llamaq.recipes.qat_lora import qat_lora
from llamaq.runs.main import main
from llamaq.runs.run import Run, say


def recipe(run: Run) -> None:
    check(run.config, *chain_names(run.config))
    start(run)
    qat(run)
    qat_lora(run)
    qat_dpo(run)
    convert(run)
    export(run)
    say(f"\nreport: {evaluate_and_report_chain(run)}/report.md")


if __name__ == "__main__":
    main(recipe, __doc__)
