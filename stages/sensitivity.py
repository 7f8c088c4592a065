"""Quantize one layer of a study's fp32 model at a time, at each number of bits, and measure what it costs."""

import itertools
from collections.abc import Sequence

from quantstudy import layout
from quantstudy.data.batches import Batches
from quantstudy.data.container import load_split
from quantstudy.errors import run_stage
from quantstudy.files import write_csv, write_json
from quantstudy.machine.device import set_up
from quantstudy.measure.operations import count_macs
from quantstudy.methods.calibration import load_calibration
from quantstudy.methods.sensitivity import COLUMNS, measure_layers
from quantstudy.network.checkpoint import model_file
from quantstudy.network.fp32 import load_fp32, load_preprocessing
from quantstudy.params import load_params
from quantstudy.report.heatmap import plot_sensitivity
from stages._flags import flags


def main(argv: Sequence[str] | None = None) -> None:
    """Write reports/<study>/sensitivity.{json,csv,png}, from calibration images alone."""
    name = flags(argv, __doc__).study
    params = load_params()
    study, settings = params.study(name), params.sensitivity
    set_up(study.seed, params.runtime.threads)

    fp32 = model_file(name, "fp32", study.model.architecture)
    model, preprocessing = load_fp32(fp32), load_preprocessing(fp32)
    split, size = load_split(layout.split(name, "calibration")), study.calibration.batch_size
    calibration = load_calibration(name, study, model, preprocessing, observed=False)
    measured = split.subset(range(min(settings.images or len(split), len(split))))
    batches = list(Batches(measured, preprocessing, size, "cpu"))
    _, macs = count_macs(model, preprocessing.shape)
    rows = measure_layers(model, calibration, batches, settings, macs)

    write_json(layout.sensitivity(name, "json"), rows)
    write_csv(layout.sensitivity(name, "csv"), COLUMNS, rows)
    plot_sensitivity(layout.sensitivity(name, "png"), name, rows)
    for bits, at in itertools.groupby(sorted(rows, key=lambda row: row["bits"]), key=lambda row: row["bits"]):
        worst = min(at, key=lambda row: row["sqnr_db"])
        cost = f"{worst['sqnr_db']:.1f} dB, top-1 {worst['top1_drop']:+.2f} points down"
        print(f"{bits:2} bits: {worst['layer']} alone costs most: {cost}")


if __name__ == "__main__":
    run_stage(main)
