"""Made-up but plausible results of a study, for tests of tables and plots."""

import json
import random
from pathlib import Path

from quantstudy import layout
from quantstudy.params import Params

FP32_MB = {"vgg11": 515.2, "mobilenet_v2": 9.1}
DROP = {"fp16": 0.01, "bf16": 0.06, "int8": 0.2, "int4": 2.3, "mixed": 0.8, "clip_int8": 0.6, "clip_int4": 38.0}
SHARE = {"16": 0.5, "8": 0.252, "4": 0.141, "mixed": 0.19}


DETAILS = {"kernel": {"real": 1, "total": 1, "note": ""}, "machine": "A CPU, 2 threads, no GPU; torch 2.14.1"}
DETAILS["remarks"] = ["No GPU latency or memory was taken: every figure is the CPU's."]


def fabricate(params: Params, study: str, images: int = 10_000, top1: float = 88.4) -> None:
    """Write metrics, details and curves of every variant of `params` below the working directory."""
    rng = random.Random(study)
    for variant in params.variants:
        _write(layout.metrics(study, variant), _metrics(params, study, variant, images, top1, rng))
        _write(layout.details(study, variant), DETAILS | {"variant": variant})
    _curve(layout.curve(study, "finetune"), params.study(study).training.epochs, 1.9, top1, rng, start=1)
    for method in params.qat:
        _curve(layout.curve(study, method), params.study(study).qat.epochs, 0.35, top1 + 0.4, rng, start=0)


def _metrics(
    params: Params, study: str, variant: str, images: int, top1: float, rng: random.Random
) -> dict[str, float | None]:
    architecture = params.study(study).model.architecture
    drop, share, speedup = 0.0, 1.0, 1.0
    if variant != "fp32":
        kind = next((k for k in sorted(DROP, key=len, reverse=True) if variant.startswith(k)), None)
        base = kind or variant.removeprefix("qat_")
        drop = DROP[base] * (0.2 if variant.startswith("qat") else rng.uniform(0.5, 1.4)) + rng.gauss(0, 0.05)
        key = "mixed" if variant.startswith("mixed") else next(k for k in ("16", "8", "4") if k in base)
        share = SHARE[key] * rng.uniform(0.999, 1.001)
        speedup = {"16": 1.3, "8": 3.4}.get(key, 0.5) * rng.uniform(0.9, 1.1)
    real = float(speedup > 1.2 or variant == "fp32")
    size, slow = FP32_MB.get(architecture, 20.0), 100.0 if architecture == "vgg11" else 10.0
    return {
        "top1": round(top1 - drop, 4),
        "top5": 98.2,
        "top1_ci95": round(196 * (top1 / 100 * (1 - top1 / 100) / images) ** 0.5, 4),
        "top1_drop": round(drop, 4),
        "top1_drop_p": 1.0 if variant == "fp32" else round(max(0.0, 0.6 - drop), 6),
        "images": images,
        "agreement": round(100 - 2 * abs(drop), 4),
        "sqnr_db": 200.0 if variant == "fp32" else round(40 - 2 * drop, 3),
        "size_mb": round(size * share, 4),
        "compression": round(1 / share, 4),
        "weight_bits": 32 * share,
        "layers_quantized": 0 if variant == "fp32" else 11,
        "layers_quantizable": 11,
        "gmacs": 7.6,
        "tbops": 7.8 * share,
        "latency_ms_b1": round(slow / speedup, 3),
        "latency_ms_b16": round(14 * slow / speedup, 3),
        "speedup_b1": round(speedup, 3) if real else None,
        "speedup_b16": round(speedup, 3) if real else None,
        "kernel_real": real,
        "peak_memory_mb": 700.0,
        "seed": 0,
    }


def _curve(path: Path, epochs: int, loss: float, top1: float, rng: random.Random, start: int) -> None:
    lines = ["epoch,train_loss,train_top1,validation_loss,validation_top1,learning_rate,images_per_second"]
    for epoch in range(start, epochs + 1):
        now, reached = loss * 0.7**epoch, top1 - 30 * 0.5 ** (epoch + 2) + rng.gauss(0, 0.1)
        train = f"{now:.5g},{reached + 1:.5g}" if epoch else ","
        lines.append(f"{epoch},{train},{now * 1.1 + rng.gauss(0, 0.003):.5g},{reached:.5g},0.001,73.1")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
