"""`python -m docs.drawing [name ...]` draws the named figures, or all figures, of `docs/` into `docs/figures/`."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from docs.drawing import corrections, grids, mixed, training
from docs.drawing.box import box
from docs.drawing.tiny import Example, example
from quantstudy.machine.device import set_up
from quantstudy.report.style import plot_style, save

FOLDER = Path("docs") / "figures"
FIGURES: dict[str, Callable[[Example], Figure]] = {
    "rounding": grids.rounding,
    "schemes": grids.schemes,
    "ranges": grids.ranges,
    "casts": grids.casts,
    "saturation": grids.saturation,
    "mixed_precision": mixed.mixed_precision,
    "equalization": corrections.equalization,
    "bias_correction": corrections.bias_correction,
    "gain_correction": corrections.gain_correction,
    "gptq": corrections.gptq,
    "adaround": corrections.adaround,
    "joint": corrections.joint,
    "straight_through": training.straight_through,
    "learned_step": training.learned_step,
    "trained": training.accuracy,
    "box": box,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the figures."""
    parser = argparse.ArgumentParser(prog="python -m docs.drawing", description="Draw the figures of docs/.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(FIGURES)}; all by default")
    names = parser.parse_args(argv).names or list(FIGURES)
    for name in names:
        if name not in FIGURES:
            parser.error(f"{name!r} is no figure; choose of {', '.join(FIGURES)}")
    set_up(0)
    drawn_on = example()
    with plot_style():
        for name in names:
            save(FIGURES[name](drawn_on), FOLDER / f"{name}.png", dpi=100)
            print(FOLDER / f"{name}.png", flush=True)


if __name__ == "__main__":
    main()
