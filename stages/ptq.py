"""Quantize a study's fp32 model after training, with one method."""

from collections.abc import Sequence

from quantstudy import layout
from quantstudy.errors import run_stage
from quantstudy.machine.device import set_up
from quantstudy.methods.calibration import load_calibration
from quantstudy.methods.recipes import method_row, quantize
from quantstudy.network.checkpoint import load_checkpoint, model_file
from quantstudy.network.fp32 import load_fp32, load_preprocessing
from quantstudy.params import load_params
from quantstudy.quantization.variant import left_out, save_variant
from stages._flags import flags


def main(argv: Sequence[str] | None = None) -> None:
    """Write models/<study>/<method>.pth."""
    arguments = flags(argv, __doc__, method="a row of methods in params.yaml that needs no training")
    name, method = arguments.study, arguments.method
    params = load_params()
    study, row = params.study(name), method_row(params, method, trains=False).made_for(params.target)
    set_up(study.seed, params.runtime.threads)

    fp32 = model_file(name, "fp32", study.model.architecture)
    model = load_fp32(fp32)
    observed = not row.needs_sensitivity
    calibration = load_calibration(name, study, model, load_preprocessing(fp32), observed=observed)
    variant = quantize(model, calibration, row, f"methods.{method}")

    path = layout.model(name, method)
    save_variant(path, variant, load_checkpoint(fp32), method)
    print(f"{path}: {path.stat().st_size / 1e6:.3f} MB, fp32 {fp32.stat().st_size / 1e6:.3f} MB")
    for line in left_out(variant.skipped):
        print(line)


if __name__ == "__main__":
    run_stage(main)
