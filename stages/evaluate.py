"""Measure one variant of a study on its test and validation splits: accuracy, latency, memory, size, bit-operations."""

from collections.abc import Sequence

import numpy as np

from quantstudy import layout
from quantstudy.data.container import load_split
from quantstudy.errors import run_stage, unknown
from quantstudy.files import write_json
from quantstudy.machine.device import set_up
from quantstudy.measure.evaluation import Task, evaluate
from quantstudy.measure.predictions import load_reference, save_predictions, save_reference
from quantstudy.network.checkpoint import model_file
from quantstudy.params import load_params
from stages._flags import flags


def main(argv: Sequence[str] | None = None) -> None:
    """Write reports/<study>/{metrics,details}/<variant>.json and the predictions; for fp32 its logits too."""
    arguments = flags(argv, __doc__, variant="fp32, or a method of ptq or qat in params.yaml")
    name, variant = arguments.study, arguments.variant
    params = load_params()
    study = params.study(name)
    if variant not in params.variants:
        raise unknown("variant", variant, params.variants)
    device = set_up(study.seed, params.measure.threads)

    test, validation = (load_split(layout.split(name, part)) for part in ("test", "validation"))
    for needed in ("fp32", variant):
        model_file(name, needed, study.model.architecture)
    images = len(test) + len(validation)
    reference = None if variant == "fp32" else load_reference(name, images, len(test.classes))
    task = Task(name, study, variant, params.measure, device)
    metrics, details, found = evaluate(task, test, validation, reference)

    if variant == "fp32":
        save_reference(name, np.concatenate(found))
    save_predictions(name, variant, found.test)
    write_json(layout.details(name, variant), details)
    write_json(layout.metrics(name, variant), metrics)
    busy = ", the machine was busy" if 16 in details["busy"] else ""
    print(
        f"{name} {variant}: top-1 {metrics['top1']:.2f} ± {metrics['top1_ci95']:.2f} %, {metrics['size_mb']:.2f} MB, "
        f"{metrics['latency_ms_b16']:.2f} ms a batch of 16 on {details['runtime']}{busy}, {details['kernel']['note']}"
    )


if __name__ == "__main__":
    run_stage(main)
