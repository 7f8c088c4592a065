"""Made-up but plausible results of a study, for tests of tables and plots."""

import random
from pathlib import Path

from quantstudy import layout
from quantstudy.files import write_json, write_text
from quantstudy.params import Params

DROP = {4: 2.3, 8: 0.2, 16: 0.03, None: 1.0}
DETAILS = {
    "kernel": {"real": 1, "total": 1, "note": ""},
    "machine": "A CPU, 2 threads, no GPU; torch 2.14.1",
    "remarks": ["No GPU latency or memory was taken: every figure is the CPU's."],
}


def fabricate(params: Params, study: str, images: int = 10_000, top1: float = 88.4) -> None:
    """Write metrics, details and curves of every variant of `params` below the working directory."""
    rng = random.Random(study)
    for variant in params.variants:
        write_json(layout.metrics(study, variant), _metrics(params, variant, images, top1, rng))
        write_json(layout.details(study, variant), DETAILS | {"variant": variant})
    _curve(layout.curve(study, "finetune"), params.study(study).training.epochs, 1.9, top1, rng, start=1)
    for method in params.qat:
        _curve(layout.curve(study, method), params.study(study).qat.epochs, 0.35, top1 + 0.4, rng, start=0)


def _metrics(params: Params, variant: str, images: int, top1: float, rng: random.Random) -> dict[str, float | None]:
    """Return metrics in which INT8 is real and quick, 4 bits are simulated, and clipping to 4 bits ruins accuracy."""
    drop, share, speedup = 0.0, 1.0, 1.0
    if variant != "fp32":
        row = params.method(variant)
        drop = DROP.get(row.bits, 5.0) * (0.2 if row.trains else rng.uniform(0.5, 1.4)) + rng.gauss(0, 0.05)
        drop += 36.0 if row.clips and row.bits == 4 else 0.0
        share = (0.19 if row.is_mixed else row.bits / 31) * rng.uniform(0.999, 1.001)
        speedup = (0.5 if row.is_mixed else {16: 1.3, 8: 3.4}.get(row.bits, 0.5)) * rng.uniform(0.9, 1.1)
    real = variant == "fp32" or speedup > 1.1
    half, speedup = 196 * (top1 / 100 * (1 - top1 / 100) / images) ** 0.5, round(speedup, 3)
    accuracy = dict(top1=top1 - drop, top5=98.2, top1_ci95=half, top1_drop=drop, top1_drop_p=max(0.0, 0.6 - drop))
    agreement = dict(images=images, agreement=100 - 2 * abs(drop), sqnr_db=40 - 2 * drop, seed=0)
    size = dict(size_mb=9.1 * share, compression=1 / share, weight_bits=32 * share, gmacs=7.6, tbops=7.8 * share)
    layers = dict(layers_quantized=11 * (variant != "fp32"), layers_quantizable=11, kernel_real=float(real))
    speed = dict.fromkeys(("speedup_b1", "speedup_b16"), speedup if real else None)
    time = dict(latency_ms_b1=10 / speedup, latency_ms_b16=140 / speedup, peak_memory_mb=700.0)
    judged = dict(validation_images=100, validation_top1=top1 - drop, validation_drop=drop, validation_drop_ci95=0.4)
    return accuracy | agreement | size | layers | speed | time | judged


def _curve(path: Path, epochs: int, loss: float, top1: float, rng: random.Random, start: int) -> None:
    lines = ["epoch,train_loss,train_top1,validation_loss,validation_top1,learning_rate,images_per_second"]
    for epoch in range(start, epochs + 1):
        now, reached = loss * 0.7**epoch, top1 - 30 * 0.5 ** (epoch + 2) + rng.gauss(0, 0.1)
        train = f"{now:.5g},{reached + 1:.5g}" if epoch else ","
        lines.append(f"{epoch},{train},{now * 1.1 + rng.gauss(0, 0.003):.5g},{reached:.5g},0.001,73.1")
    write_text(path, "\n".join(lines) + "\n")
