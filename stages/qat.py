"""Fine-tune a study's model with one method's quantization in the loop, then freeze or cast it."""

from collections.abc import Sequence

from quantstudy import layout
from quantstudy.data.container import load_split
from quantstudy.errors import run_stage
from quantstudy.files import write_json
from quantstudy.machine.device import set_up
from quantstudy.methods.calibration import load_calibration
from quantstudy.methods.recipes import method_row
from quantstudy.methods.trained import Place, train
from quantstudy.network.checkpoint import load_checkpoint, model_file
from quantstudy.network.fp32 import load_preprocessing
from quantstudy.params import load_params
from quantstudy.quantization.variant import left_out, save_variant
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
    device = parallel.join(set_up(study.seed, params.runtime.threads, tf32=True))

    fp32 = model_file(name, "fp32", study.model.architecture)
    preprocessing = load_preprocessing(fp32)
    splits = (layout.split(name, part) for part in ("train", "calibration"))
    inputs = (layout.calibration(name), *splits)
    variant, facts = train(
        Place(name, fp32, layout.curve(name, method), layout.resume(name, method), inputs),
        *(study, method, row),
        lambda model: load_calibration(name, study, model, preprocessing),
        load_split(layout.split(name, "train")),
        device,
    )
    if variant is None:
        return

    path = layout.model(name, method)
    save_variant(path, variant, load_checkpoint(fp32), method)
    write_json(layout.training_summary(name, method), facts)
    print(f"best epoch {facts['best_epoch']}: validation top-1 {facts['validation_top1']:.2f} %")
    for line in left_out(variant.skipped):
        print(line)


if __name__ == "__main__":
    run_stage(main)
