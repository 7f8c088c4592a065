"""What a variant costs and buys, as one sentence that needs no table beside it."""

from quantstudy.report.results import Result


def sentence(result: Result, drop_ci95: float, batch_size: int) -> str:
    """Return how many times smaller and faster a variant is, and the points of accuracy that it loses.

    Args:
        result: a variant.
        drop_ci95: half the width of the 95 % interval of its drop, in percentage points.
        batch_size: 1 or 16, the one that the speed-up is of.
    """
    if result.group == "baseline":
        return "what the others are compared with"
    return ", ".join([_smaller(result), _faster(result, batch_size), _lost(result, drop_ci95)])


def _smaller(result: Result) -> str:
    compression = result["compression"]
    if compression is None:
        return "size not compared"
    return f"{compression:.2f}× smaller" if compression >= 1 else f"{1 / compression:.2f}× larger"  # noqa: RUF001


def _faster(result: Result, batch_size: int) -> str:
    if result.simulated:
        return "no speed-up stated (its kernel is simulated here)"
    speedup = result[f"speedup_b{batch_size}"]
    if speedup is None:
        return "not timed here"
    ratio, word = (speedup, "faster") if speedup >= 1 else (1 / speedup, "slower")
    return f"{ratio:.1f}× {word} at batch {batch_size}" if ratio >= 1.05 else f"as fast at batch {batch_size}"  # noqa: RUF001


def _lost(result: Result, drop_ci95: float) -> str:
    drop = result["top1_drop"]
    if drop is None:
        return "accuracy not compared"
    word = "lost" if round(drop, 2) >= 0 else "gained"
    return f"{abs(drop):.2f} ± {drop_ci95:.2f} points {word}"
