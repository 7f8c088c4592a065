"""What each post-training technique adds, scheme by scheme: rounding to nearest, then one technique after the other.

    python -m benchmarks.ablation --study mobilenetv2_food101_64px
    python -m benchmarks.ablation --study mobilenetv2_food101_64px --schemes W4A8 --seeds 3

The benchmark starts from models/<study>/fp32.pth. It draws calibration images by seed, from where the study draws its
own and as many, or `--images`. The last row of a scheme gets `--seeds` draws, each row before it one. Top-1 is measured
on the whole test split, simulated in eager mode.

The benchmark writes reports/<study>/ablation.json and .md. It keeps rows that are already there, so you can continue or
extend a run; rows of other schemes and techniques stand last. Delete ablation.json to start again.
"""

import argparse
import functools
import operator
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import nn

from benchmarks.low_bits import place
from quantstudy import layout
from quantstudy import params as P
from quantstudy.data.batches import images_of, run_on_split
from quantstudy.data.container import Split, load_split
from quantstudy.data.folder import calibration_images
from quantstudy.data.images import store
from quantstudy.data.sampling import calibration_indices, validation_indices
from quantstudy.errors import run_stage
from quantstudy.files import read_json, write_json, write_text
from quantstudy.machine.device import set_up
from quantstudy.machine.hardware import describe_machine
from quantstudy.measure.coverage import stored
from quantstudy.measure.statistics import mcnemar_exact_p, wilson_half_width
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.recipes import quantize
from quantstudy.network.checkpoint import load_checkpoint
from quantstudy.network.fp32 import load_fp32, load_preprocessing
from quantstudy.quantization.variant import save_variant
from quantstudy.report.ablation import markdown

Row = dict[str, Any]
CPU = torch.device("cpu")
BATCH = 64
_ALIKE = {"fragile_bits": None}
"""All layers have the same bits: the table then shows what each technique adds."""
SCHEMES: dict[str, dict[str, Any]] = {
    "W8A8": {"kind": "static", "weight_bits": 8, "activation_bits": 8},
    "W4A8": {"kind": "static", **_ALIKE, "weight_bits": 4, "activation_bits": 8},
    "W4A4": {"kind": "static", **_ALIKE, "weight_bits": 4, "activation_bits": 4, "edge_bits": 8},
    "W4": {"kind": "weight_only", **_ALIKE, "weight_bits": 4, "group_size": 32},
    "W3": {"kind": "weight_only", **_ALIKE, "weight_bits": 3, "group_size": 32},
    "W2": {"kind": "weight_only", **_ALIKE, "weight_bits": 2, "group_size": 32, "edge_bits": 8},
}
STEPS: dict[str, dict[str, Any]] = {
    "nearest": {},
    "bias correction": {"bias_correction": True},
    "mse activation ranges": {"activation_range": "mse"},
    "GPTQ": {"rounding": "gptq"},
    "gain correction": {"gain_correction": True},
    "mse weight ranges": {"weight_range": "mse"},
    "joint fine-tuning": {"finetune": True},
}


@dataclass
class Subject:
    """A study's model and images."""

    name: str
    study: P.Study
    """Its `calibration` says how many images are drawn, and from where."""
    fp32: nn.Module
    preprocessing: P.Preprocessing
    train: Split
    test: Split
    right: dict[tuple[str, ...], np.ndarray] = field(default_factory=dict)
    """Whether each test image is predicted correctly, by scheme and techniques; fp32's at ()."""

    def calibration(self, seed: int) -> Calibration:
        """Draw calibration images as the study does; with the study's seed, the same ones."""
        row, fraction = self.study.calibration, self.study.training.validation_fraction
        found = calibration_images(row, self.train.classes, f"studies.{self.name}.calibration")
        if found is None:
            kept, _ = validation_indices(self.train.labels, fraction, self.study.seed)
            drawn = self.train.subset(kept[calibration_indices(len(kept), row, seed, self.name)])
        else:
            chosen = found.subset(calibration_indices(len(found.names), row, seed, self.name))
            (drawn,) = store([chosen], self.preprocessing)
        return Calibration(self.fp32, images_of(drawn, self.preprocessing, BATCH), bins=row.bins)

    def correct(self, model: nn.Module) -> np.ndarray:
        """Return, for each test image, whether the model predicts its label."""
        logits = run_on_split(model, self.test, self.preprocessing, BATCH, CPU, torch.channels_last)
        return np.asarray(logits.argmax(1) == self.test.labels.numpy())


def main(argv: Sequence[str] | None = None) -> None:
    """Add the missing rows to reports/<study>/ablation.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True, help="a row of studies whose fp32 model and data are there")
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--seeds", type=int, default=3, help="calibration draws of each scheme's last row")
    parser.add_argument("--images", type=int, help="calibration images of a draw, the study's number by default")
    parser.add_argument("--without", nargs="*", choices=list(STEPS), default=[], help="techniques to leave out")
    arguments = parser.parse_args(argv)
    study = P.load_params().study(arguments.study)
    if arguments.images is not None:
        drawn = {"batches": 1, "batch_size": arguments.images}
        study = study.model_copy(update={"calibration": study.calibration.model_copy(update=drawn)})
    set_up(study.seed)
    path = layout.model(arguments.study, "fp32")
    train, test = (load_split(layout.split(arguments.study, part)) for part in ("train", "test"))
    preprocessing = load_preprocessing(path)
    subject = Subject(arguments.study, study, load_fp32(path), preprocessing, train, test)
    subject.right[()] = subject.correct(subject.fp32)
    file = layout.report(arguments.study) / "ablation.json"
    rows: list[Row] = read_json(file) if file.is_file() else []
    for scheme in arguments.schemes:
        known = P.METHOD_ROWS[SCHEMES[scheme]["kind"]].model_fields  # weight-only rows have no activation range
        possible = [step for step, keys in STEPS.items() if keys.keys() <= known.keys()]
        steps = [step for step in possible if step not in arguments.without]
        for number in range(1, len(steps) + 1):
            _add(rows, subject, scheme, steps[:number], arguments.seeds if number == len(steps) else 1)
            _write(rows, subject, file)


def _add(rows: list[Row], subject: Subject, scheme: str, steps: list[str], seeds: int) -> None:
    images = subject.study.calibration.batches * subject.study.calibration.batch_size
    same = [row for row in rows if (row["scheme"], row["techniques"], row["images"]) == (scheme, steps, images)]
    if any(row["seeds"] >= seeds for row in same):
        return
    row = functools.reduce(operator.or_, (STEPS[step] for step in steps), SCHEMES[scheme])
    settings: P.MethodRow = TypeAdapter(P.Method).validate_python(row)
    correct, seconds = [], []
    for seed in range(seeds):
        calibration = subject.calibration(seed)
        started = time.perf_counter()
        variant = quantize(subject.fp32, calibration, settings)
        seconds.append(time.perf_counter() - started)
        correct.append(subject.correct(variant))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "variant.pth"
        save_variant(path, variant, load_checkpoint(layout.model(subject.name, "fp32")), scheme)
        facts = _facts(images, variant, path, statistics.mean(seconds))
    _put(rows, subject, {"scheme": scheme, "techniques": steps}, correct, facts)


def _facts(images: int, variant: nn.Module, path: Path, seconds: float) -> dict[str, Any]:
    mean_bits, size = stored(variant)["weight_bits"], path.stat().st_size / 1e6
    return {"images": images, "mean_bits": mean_bits, "size_mb": size, "seconds": seconds}


def _put(
    rows: list[Row], subject: Subject, facts: dict[str, Any], correct: list[np.ndarray], more: dict[str, Any]
) -> None:
    """Add a row, or replace the row of the same scheme and techniques.

    Its p-value compares it with the row above, which lacks the last technique, if the same run measured that row.
    """
    fp32, name = subject.right[()], (facts["scheme"], *facts["techniques"])
    drops = [100 * float(fp32.mean() - found.mean()) for found in correct]
    above = subject.right.get(name[:-1])
    subject.right[name] = correct[0]
    row = {
        **facts,
        "seeds": len(drops),
        "top1": 100 * float(fp32.mean()) - statistics.mean(drops),
        "top1_ci95": wilson_half_width(int(correct[0].sum()), len(fp32)),
        "top1_drop": statistics.mean(drops),
        "top1_drop_std": statistics.stdev(drops) if len(drops) > 1 else None,
        "p_above": None if above is None else mcnemar_exact_p(above, correct[0]),
        **more,
    }
    rows[:] = [old for old in rows if (old["scheme"], *old["techniques"]) != name] + [row]
    print(f"{row['scheme']} {row['techniques']}: drop {row['top1_drop']:+.2f}, {row['seconds']:.0f} s", flush=True)


def order(row: Row) -> tuple[Any, ...]:
    """Return a row's place in the table: by scheme, then by techniques; unknown ones come last, by name."""
    return place(row["scheme"], list(SCHEMES)), [place(step, list(STEPS)) for step in row["techniques"]]


def _write(rows: list[Row], subject: Subject, file: Path) -> None:
    rows.sort(key=order)
    write_json(file, rows)
    note = (
        f"`{subject.name}`: fp32 {100 * subject.right[()].mean():.2f} % on {len(subject.test)} test images. "
        f"{describe_machine()}."
    )
    write_text(file.with_suffix(".md"), markdown(rows) + "\n" + note + "\n")


if __name__ == "__main__":
    run_stage(main)
