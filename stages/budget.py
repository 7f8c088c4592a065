"""Quantize a study's fp32 model after training, each layer in the bits that lose least within a method's budget."""

import argparse
from collections import Counter
from collections.abc import Sequence

from quantstudy import layout
from quantstudy.data.batches import images_of
from quantstudy.data.container import load_split
from quantstudy.errors import run_stage
from quantstudy.files import read_json
from quantstudy.machine.device import DTYPES, set_up
from quantstudy.methods.allocation import HALF
from quantstudy.methods.registry import settings_of
from quantstudy.methods.sensitivity import allocations_within, divergence_from, measurable, mixed, quantized_table
from quantstudy.network import models
from quantstudy.network.checkpoint import load_checkpoint
from quantstudy.params import BUDGET, load_params
from quantstudy.quantization.variant import save_variant


def main(argv: Sequence[str] | None = None) -> None:
    """Write models/<study>/ptq/<method>.pth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", required=True, help="a row of studies in params.yaml")
    parser.add_argument("--method", required=True, help="a row of methods in params.yaml of kind mixed_budget")
    arguments = parser.parse_args(argv)
    name, method = arguments.study, arguments.method
    params = load_params()
    study, settings = params.study(name), settings_of(params, method, [BUDGET])
    set_up(study.seed)

    fp32 = layout.model(name, "fp32")
    model, rows = models.load_fp32(fp32), read_json(layout.sensitivity(name, "json"))
    split, seen = load_split(layout.split(name, "calibration")), models.load_preprocessing(fp32)
    images = images_of(split, seen, study.calibration.batch_size)
    calibration = {"images": images, "image_size": study.data.image_size}
    allocations = allocations_within(measurable(model, calibration), rows, settings, f"methods.{method}")
    widths = sorted({width for bits in allocations for width in bits.values() if width < HALF})
    table = quantized_table(model, calibration, settings, widths)
    divergence = divergence_from(model, table, images, DTYPES[settings.dtype])
    bits = min(allocations, key=divergence)
    variant = mixed(model, table, bits, calibration, settings)

    path = layout.model(name, method)
    save_variant(path, variant, load_checkpoint(fp32), method)
    layers = ", ".join(f"{count} of {width} bits" for width, count in sorted(Counter(bits.values()).items()))
    print(f"{path}: {path.stat().st_size / 1e6:.3f} MB, fp32 {fp32.stat().st_size / 1e6:.3f} MB; layers: {layers}")
    least = f"{divergence(bits):.3g} nats on calibration images"
    print(f"of {len(allocations)} allocations the one that diverges least, {least}")


if __name__ == "__main__":
    run_stage(main)
