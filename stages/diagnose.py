"""Write down the machine: GPU, CPU, versions, the low-bit kernels that really run here, and what is missing."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from quantstudy import layout
from quantstudy.errors import run_stage
from quantstudy.files import write_json
from quantstudy.measure.environment import environment


def main(argv: Sequence[str] | None = None) -> None:
    """Write reports/environment.json and print it for a reader."""
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    facts = environment()
    write_json(layout.ENVIRONMENT, facts)
    print(summary(facts))
    print(f"\nwritten to {layout.ENVIRONMENT}")


def summary(facts: Mapping[str, Any]) -> str:
    """Return the facts as aligned lines, the missing things last."""
    gpu, cpu, compiler = facts["gpu"], facts["cpu"], facts["compiler"]
    lines = ["Machine"]
    lines += [f"  GPU       {_gpu_line(gpu)}"]
    lines += [f"  CPU       {cpu['model']}, {cpu['physical_cores']} cores, {cpu['torch_threads']} threads used"]
    present = [name for name, here in cpu["instruction_sets"].items() if here]
    lines += [f"            {', '.join(present) or 'none of the low-bit instruction sets'}"]
    lines += [f"  memory    {cpu['memory_gb']} GB"]
    lines += [f"  compiler  {compiler['version'] or compiler['command']}: {compiler['reason']}"]
    lines += ["", "Software"]
    lines += [f"  {name:<12}{version or '-'}" for name, version in facts["software"].items()]
    lines += ["", "Low-bit kernels"]
    lines += [f"  {_mark(row['available'])} {name:<30}{row['reason']}" for name, row in facts["kernels"].items()]
    lines += ["", "16-bit floats computed natively"]
    for device, types in facts["native_arithmetic"].items():
        lines += [f"  {device:<12}" + ", ".join(f"{dtype}: {'yes' if ok else 'no'}" for dtype, ok in types.items())]
    lines += ["", "Missing"]
    for row in facts["missing"]:
        lines += [f"  {row['what']}", f"      disables: {row['disables']}", f"      to get it: {row['how_to_get']}"]
    if facts["remarks"]:
        lines += ["", "Remarks", *(f"  {remark}" for remark in facts["remarks"])]
    return "\n".join(lines)


def _gpu_line(gpu: Mapping[str, Any]) -> str:
    if not gpu["available"]:
        return f"none: {gpu['reason']}"
    return (
        f"{gpu['count']} x {gpu['name']}, {gpu['memory_gb']} GB, compute capability {gpu['compute_capability']}, "
        f"driver {gpu['driver']}, CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}"
    )


def _mark(available: bool) -> str:
    return "yes" if available else "no "


if __name__ == "__main__":
    run_stage(main)
