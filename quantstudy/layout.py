"""The path of every file of a study, relative to the project root that stages run in."""

from pathlib import Path


def split(study: str, name: str) -> Path:
    """A split's container file; `name` is train, validation, calibration or test."""
    return Path("data") / study / f"{name}.pt"


def model(study: str, variant: str) -> Path:
    """A variant's model file; `fp32` is a variant too."""
    return Path("models") / study / f"{variant}.pth"


def sensitivity(study: str, suffix: str) -> Path:
    """What quantizing each layer alone costs, at each number of bits: json, csv or png."""
    return report(study) / f"sensitivity.{suffix}"


def budget_front(study: str, suffix: str) -> Path:
    """Accuracy against size for budgets from 2 to 8 bits: json or png."""
    return report(study) / f"budget_front.{suffix}"


def calibration(study: str) -> Path:
    """Histograms and ranges of every quantizable layer's input."""
    return Path("models") / study / "calibration.pt"


def reference(study: str) -> Path:
    """The fp32 model's logits on the test and then the validation images, float32 [images, classes]."""
    return Path("models") / study / "reference.npy"


def graph(study: str) -> Path:
    """The network's ONNX graph, without weights."""
    return Path("models") / study / "graph.onnx"


def onnx(study: str, variant: str) -> Path:
    """A variant as an ONNX model."""
    return Path("models") / study / "onnx" / f"{variant}.onnx"


def predictions(study: str, variant: str) -> Path:
    """Predicted classes, int16 [images], in the order of the test split."""
    return Path("models") / study / "predictions" / f"{variant}.npy"


def resume(study: str, name: str) -> Path:
    """A training run's state after its last finished epoch; deleted when the run ends."""
    return Path("models") / study / "resume" / f"{name}.pt"


def ship(study: str) -> Path:
    """The folder of the model to deploy, which the stage `search` writes."""
    return Path("models") / study / "ship"


def searching(study: str) -> Path:
    """The folder where a search keeps the variants that it has made; deleted when the search ends."""
    return Path("models") / study / "resume" / "search"


def ship_metrics(study: str) -> Path:
    """The DVC metrics of the model to deploy, one flat JSON."""
    return report(study) / "ship.json"


def search(study: str) -> Path:
    """Every candidate of the search, with its outcome."""
    return report(study) / "search.json"


def report(study: str) -> Path:
    """The folder of a study's metrics, details, curves, tables and plots."""
    return Path("reports") / study


def metrics(study: str, variant: str) -> Path:
    """The DVC metrics of a variant, one flat JSON."""
    return report(study) / "metrics" / f"{variant}.json"


def details(study: str, variant: str) -> Path:
    """Strings, rows per layer and all timings of a variant; these are not DVC metrics."""
    return report(study) / "details" / f"{variant}.json"


def onnx_report(study: str, variant: str) -> Path:
    """Size of a variant's ONNX file, and how far the runtimes agree with PyTorch on the test images."""
    return report(study) / "onnx" / f"{variant}.json"


def peers(study: str, suffix: str) -> Path:
    """The comparison with other tools: json, md or png."""
    return Path("reports") / "peers" / f"{study}.{suffix}"


def low_bits(name: str, suffix: str) -> Path:
    """What each scheme costs a network, over several draws of calibration images: json or md."""
    return Path("reports") / "low_bits" / f"{name}.{suffix}"


def reliability(name: str) -> Path:
    """The counts of `tests.harness`, of runs, params or files."""
    return Path("reports") / "reliability" / f"{name}.json"


def curve(study: str, name: str) -> Path:
    """A training curve, one row per epoch; `name` is finetune or a QAT method."""
    return report(study) / "curves" / f"{name}.csv"


def training_summary(study: str, name: str) -> Path:
    """What a training run started from, its images and its best epoch; `name` as for `curve`."""
    return report(study) / "curves" / f"{name}.json"


def activation_stats(study: str) -> Path:
    """The outliers of every layer's input."""
    return report(study) / "activation_stats.json"


def page(study: str) -> Path:
    """A study's part of the HTML report."""
    return Path("reports") / "pages" / f"{study}.json"


REPORT = Path("reports") / "report.html"
"""The HTML report of the studies in `run`."""

ENVIRONMENT = Path("reports") / "environment.json"
