"""The figure of the results of `benchmarks/jobs.py`: studies on a simulated box of GPUs."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from docs.drawing.tiny import Example, figure
from quantstudy.report import style

RECORD = Path(__file__).parents[2] / "reports" / "jobs" / "box.json"


def box(_: Example) -> Figure:
    """Draw the speed-up of each box over one GPU that never waits, and the best possible speed-up."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    seconds = {int(gpus): taken for gpus, taken in record["boxes"].items()}
    counts = sorted(seconds)
    speed = [record["sum_of_stages"] / seconds[gpus] for gpus in counts]
    drawn, axes = figure(1, 1)
    axes.plot(counts, counts, color=style.GREY, linestyle="--", label="as many times as there are GPUs")
    axes.plot(counts, speed, color=style.BLUE, marker="o", label="measured")
    for gpus, found in zip(counts, speed, strict=True):
        label = f"{found:.1f}, {seconds[gpus] / 60:.1f} min"
        axes.annotate(label, (gpus, found), (0, 8), textcoords="offset points", ha="center")
    axes.set(
        xlabel="GPUs of the simulated box",
        ylabel="times as fast",
        xticks=counts,
        title=f"{record['variants']} variants, {record['sum_of_stages'] / 60:.0f} minutes for one GPU that never waits",
    )
    axes.margins(x=0.15)
    axes.set_ylim(0, max(counts) * 1.1)
    axes.legend()
    return drawn
