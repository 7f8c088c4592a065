"""The params of the tests: one tiny study, and methods of every kind. A user's params.yaml is no fixture."""

from typing import Any

ABSENT = object()
"""Stands for a key that is not there."""
HALVES = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
"""Brings pixels to -1 … 1."""
TINY: dict[str, Any] = {
    "model": {"architecture": "mobilenet_v2"},
    "data": {"source": "digits", "image_size": 32, **HALVES, "max_train": 96, "max_test": 48},
    "training": {"epochs": 1, "learning_rate": 1e-3, "batch_size": 16, "optimizer": "adamw"},
    "calibration": {"batches": 2, "batch_size": 16},
    "qat": {"epochs": 1, "learning_rate": 1e-5, "batch_size": 16},
    "seed": 0,
}

_INT8 = {"weight_bits": 8, "activation_bits": 8}
_W4 = {"weight_bits": 4, "fragile_bits": None}
_W4A4 = {"kind": "static", **_W4, "activation_bits": 4}
_GROUPS = {**_W4, "group_size": 32}
_ROUNDING = {"group_size": 32, "weight_range": "mse", "rounding": "gptq", "gain_correction": True}
METHODS: dict[str, dict[str, Any]] = {
    "fp16": {"kind": "cast", "dtype": "float16"},
    "bf16": {"kind": "cast", "dtype": "bfloat16"},
    "int8_dynamic": {"kind": "dynamic", **_INT8, "saturation_free": True},
    "int8_static": {"kind": "static", **_INT8, "saturation_free": True, "bias_correction": True},
    "int8_weight_only": {"kind": "weight_only", "weight_bits": 8},
    "int4_weight_only": {"kind": "weight_only", **_GROUPS},
    "mixed_simple": {"kind": "mixed_linear", **_GROUPS, "dtype": "float16"},
    "mixed_variance": {"kind": "mixed_variance", **_GROUPS, "dtype": "float16", "fraction": 0.5},
    "mixed_budget": {"kind": "mixed_budget", "mean_bits": 4.0, **_ROUNDING, "bias_correction": True},
    "int4_static": {"kind": "static", **_W4, "activation_bits": 8},
    "clip_int8": {"kind": "static", **_INT8, "clip_percentile": None},
    "clip_int8_p99": {"kind": "static", **_INT8, "clip_percentile": 99.0},
    "clip_int4": _W4A4 | {"clip_percentile": None},
    "clip_int4_p99": _W4A4 | {"clip_percentile": 99.0},
    "qat_int8": {"kind": "qat_static", **_INT8, "saturation_free": True},
    "qat_int4": {"kind": "qat_static", **_W4, "activation_bits": 8},
    "qat_w4a8": {
        "kind": "qat_joint",
        "weight_bits": 4,
        "activation_bits": 8,
        "rounding": "gptq",
        "epochs": 1,
        "learning_rate": 0.03,
    },
    "qat_fp16": {"kind": "qat_cast", "dtype": "float16"},
    "qat_bf16": {"kind": "qat_cast", "dtype": "bfloat16"},
}

_BUDGET = ("mixed_budget",)
TINY_PARAMS: dict[str, Any] = {
    "run": ["tiny"],
    "ship": [],
    "ptq": [name for name in METHODS if not name.startswith("qat_") and name not in _BUDGET],
    "qat": ["qat_int8", "qat_int4", "qat_fp16", "qat_bf16"],
    "budget": {"studies": [], "methods": []},
    "export": {"ptq": ["int8_static", "int4_weight_only"], "budget": [], "qat": ["qat_int8"]},
    "studies": {"tiny": TINY},
    "methods": METHODS,
    "outliers": {"percentiles": [99.9, 99.0, 95.0]},
    "sensitivity": {"bits": [2, 4, 16], "images": None, **_ROUNDING, "bias_correction": True},
    "measure": {"runtimes": [], "seconds": 0.05, "threads": None},
    "runtime": {"processes": 1, "threads": None},
    "target": "any_x86",
    "scaling_law": {
        "ptq": ["fp32", "fp16", "int8_static", "int4_static"],
        "qat": ["fp32", "qat_fp16", "qat_int8", "qat_int4"],
    },
}
"""Every method but that of a budget in the lists."""

FEW: dict[str, Any] = {
    "ptq": ["int8_static", "int4_weight_only"],
    "qat": ["qat_int8"],
    "budget": {"studies": ["tiny"], "methods": ["mixed_budget"]},
    "export": {"ptq": ["int8_static", "int4_weight_only"], "budget": ["mixed_budget"], "qat": ["qat_int8"]},
    "scaling_law": {"ptq": ["fp32", "int8_static"], "qat": ["fp32", "qat_int8"]},
}
"""Lists for a quick run of the whole DAG: one method of each stage, two of `ptq`."""
