"""Quantize a study's fp32 model after training, with one method."""

import argparse
from collections.abc import Sequence

from quantstudy import layout
from quantstudy.data.batches import images_of
from quantstudy.data.container import load_split
from quantstudy.errors import run_stage
from quantstudy.machine.device import set_up
from quantstudy.methods.registry import POST_TRAINING, quantize, settings_of
from quantstudy.network import models
from quantstudy.network.checkpoint import load_checkpoint, load_tensors
from quantstudy.params import load_params
from quantstudy.quantization.variant import save_variant


def main(argv: Sequence[str] | None = None) -> None:
    """Write models/<study>/ptq/<method>.pth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", required=True, help="a row of studies in params.yaml")
    parser.add_argument("--method", required=True, help="a row of methods in params.yaml that needs no training")
    arguments = parser.parse_args(argv)
    name, method = arguments.study, arguments.method
    params = load_params()
    study, settings = params.study(name), settings_of(params, method, POST_TRAINING)
    set_up(study.seed)

    fp32 = layout.model(name, "fp32")
    model = models.load_fp32(fp32)
    calibration = load_tensors(layout.calibration(name)) | {"image_size": study.data.image_size}
    if getattr(settings, "needs_images", False):
        split, seen = load_split(layout.split(name, "calibration")), models.load_preprocessing(fp32)
        calibration["images"] = images_of(split, seen, study.calibration.batch_size)
    variant = quantize(model, calibration, settings)

    path = layout.model(name, method)
    save_variant(path, variant, load_checkpoint(fp32), method)
    print(f"{path}: {path.stat().st_size / 1e6:.3f} MB, fp32 {fp32.stat().st_size / 1e6:.3f} MB")


if __name__ == "__main__":
    run_stage(main)
