"""What a variant costs and gains, as one sentence that you can read without a table."""

from quantstudy.report.results import Result


def sentence(result: Result, drop_ci95: float, batch_size: int) -> str:
    """Return how many times smaller and faster (at batch 1 or 16) a variant is, and the points of accuracy it loses.

    `drop_ci95` is half the width of the 95 % interval of its drop, in percentage points.
    """
    if result.group == "baseline":
        return "what the others are compared with"
    compression, speedup, drop = result["compression"], result[f"speedup_b{batch_size}"], result["top1_drop"]
    smaller = "size not compared" if compression is None else _times(compression, "smaller", "larger", 2)
    if result.simulated:
        faster = "no speed-up stated (its kernel is simulated here)"
    elif batch_size in result.busy:
        faster = "no speed-up stated (the machine was busy)"
    elif speedup is None:
        faster = "not timed here"
    else:
        faster = "as fast" if 1 / 1.05 < speedup < 1.05 else _times(speedup, "faster", "slower", 1)
        faster += f" at batch {batch_size}"
    lost = "accuracy not compared"
    if drop is not None:
        lost = f"{abs(drop):.2f} ± {drop_ci95:.2f} points {'lost' if drop > 0 else 'gained'}"
        if abs(drop) <= drop_ci95:
            lost = f"no measurable loss ({drop:+.2f} ± {drop_ci95:.2f} points)"
    return ", ".join([smaller, faster, lost])


def _times(ratio: float, above: str, below: str, decimals: int) -> str:
    ratio, word = (ratio, above) if ratio >= 1 else (1 / ratio, below)
    return f"{ratio:.{decimals}f}× {word}"  # noqa: RUF001
