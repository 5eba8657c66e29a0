"""Run the whole chain: a BF16 checkpoint in, a quantized .pte and a report out.

    tune run qat_lora_dpo --config tiny                                        minutes, nothing to download
    tune run qat_lora_dpo --config llama3_2/1B_qat_lora_dpo checkpoint_dir=/path/to/Llama-3.2-1B-Instruct
    tune run --nproc_per_node 2 qat_lora_dpo --config …

    corpus, base          what the config starts from, if it says how to make it
    qat                   supervised fine-tuning, every weight of the scheme fake-quantized
    qat_lora              adapters on the frozen integer backbone
    reference, qat_dpo    preferences, backbone and adapters
    convert, export       integer codes in Meta's layout, then the .pte; each hand-over measured and gated
    answer                what the exported file says to a prompt
    control_*, evaluate   the same training without quantization, and every model on held-out text
    files, speed, …       measurements of the exported file itself: see `tune run evaluate --help`
    report                report/report.md, report/index.html, and README.md, the model card
    bundle                what an app needs: model.pte, its tokenizer, settings, card and checksums

Run it again to resume. Finished stages are checked and kept, an interrupted one continues from its last checkpoint, and
a changed setting runs only those stages again that depend on it.
"""

from llamaq.config import without
from llamaq.evaluate.models import check_evaluation
from llamaq.evaluate.stages import measure
from llamaq.export.bundle import bundle
from llamaq.recipes.evaluate import chain_models, chain_names, evaluate
from llamaq.recipes.export_executorch import answer, convert, export
from llamaq.recipes.qat import prepare_start, qat
from llamaq.recipes.qat_dpo import qat_dpo
from llamaq.recipes.qat_lora import qat_lora
from llamaq.report.publish import report_chain
from llamaq.runs.main import main
from llamaq.runs.ranks import say
from llamaq.runs.run import Run

NEEDS = ("qat", "qat_lora", "qat_dpo")


def recipe(run: Run) -> None:
    """Train, convert, export, measure and report."""
    run.config = without(run.config, "spinquant")
    check_evaluation(run.config, *chain_names(run.config))
    prepare_start(run)
    qat(run)
    qat_lora(run)
    qat_dpo(run)
    convert(run)
    export(run)
    answer(run)
    evaluate(run)
    models = chain_models(run)
    measured = measure(run, models)
    report = report_chain(run, models, measured)
    bundle(run)
    say(f"\nreport: {report}/report.md")


if __name__ == "__main__":
    main(recipe, __doc__, NEEDS)
