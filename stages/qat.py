"""Fine-tune a study's model with one method's quantization in the loop, then freeze or cast it."""

from collections.abc import Sequence

from quantstudy import layout
from quantstudy.data.container import load_split
from quantstudy.errors import run_stage
from quantstudy.files import sha256, write_json
from quantstudy.machine.device import describe, set_up
from quantstudy.methods.calibration import load_calibration
from quantstudy.methods.recipes import method_row, naming, trained_recipe_of
from quantstudy.network.architectures import check_logits
from quantstudy.network.checkpoint import load_checkpoint, model_file
from quantstudy.network.fp32 import load_fp32, load_preprocessing
from quantstudy.params import load_params
from quantstudy.quantization.variant import left_out, save_variant
from quantstudy.training import loop as training
from quantstudy.training import parallel
from stages._flags import flags


def main(argv: Sequence[str] | None = None) -> None:
    """Write models/<study>/<method>.pth and reports/<study>/curves/<method>.{csv,json}."""
    arguments = flags(argv, __doc__, method="a row of methods in params.yaml that trains")
    name, method = arguments.study, arguments.method
    params = load_params()
    study, row = params.study(name), method_row(params, method, trains=True).made_for(params.target)
    if parallel.launched("qat", ["--study", name, "--method", method], params.runtime.processes):
        return
    device = parallel.join(set_up(study.seed, tf32=True))

    fp32, recipe = model_file(name, "fp32", study.model.architecture), trained_recipe_of(row)
    model, preprocessing = load_fp32(fp32, fold=not recipe.keeps_batchnorm), load_preprocessing(fp32)
    key = f"studies.{name}.model.architecture"
    check_logits(model, load_checkpoint(fp32)["classes"], preprocessing.shape, key, trains=True)
    with naming(row, f"methods.{method}"):
        variant = recipe.prepare(model, load_calibration(name, study, model, preprocessing), row)
    variant.to(device)

    settings = row.training(study.qat, method)
    split = load_split(layout.split(name, "train"))
    batches, validation = training.training_and_validation(
        split, preprocessing, settings, study.seed, device, f"studies.{name}.qat.epochs"
    )
    distillation = recipe.distillation(row)
    run = training.Run(
        name=f"{name} {method}",
        settings=settings,
        curve=layout.curve(name, method),
        resume=layout.resume(name, method),
        fingerprint=training.fingerprint(
            *(settings, row, study.seed, preprocessing),
            *(sha256(path) for path in (fp32, layout.calibration(name))),
            *(sha256(layout.split(name, part)) for part in ("train", "calibration")),
        ),
        dtype=recipe.autocast_dtype(row),
        score_start=True,
        before_validation=recipe.before_validation(batches),
        groups=recipe.parameter_groups(variant, settings.learning_rate),
        teacher=load_fp32(fp32).to(device) if distillation else None,
        distillation=distillation,
    )
    state = training.train(variant, batches, validation, run)
    if parallel.rank():
        return

    path, skipped = layout.model(name, method), variant.skipped
    stored = recipe.finish(variant.cpu(), model, row)
    stored.skipped, stored.method = skipped, row.said()
    save_variant(path, stored, load_checkpoint(fp32), method)
    facts = training.summary(state, batches, validation) | {"arithmetic": describe(device, run.dtype)}
    write_json(layout.training_summary(name, method), facts)
    print(f"best epoch {state.best_epoch}: validation top-1 {state.best_score[0]:.2f} %")
    for line in left_out(skipped):
        print(line)


if __name__ == "__main__":
    run_stage(main)
