"""Compare the search to a goal with NNCF's quantization with accuracy control, on the same model, images and machine.

    python -m benchmarks.search --study mobilenetv2_food101_64px --drops 0.5 1 2
    .venv-peers/bin/python -m benchmarks.search --study mobilenetv2_food101_64px --drops 0.5 1 2 --tools nncf

NNCF judges on the same validation images as the search, and calibrates on the same calibration images. The model that
each ends with then runs on the whole test split on OpenVINO, and is timed there in turns with fp32. Candidates that a
search has made are kept for the next drop; their seconds count each time.

The benchmark writes reports/peers/<study>_search.json and .md. It replaces existing rows of the same tool and goal.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantstudy import layout
from quantstudy import params as P
from quantstudy.data.batches import images_of
from quantstudy.data.container import Split, load_split
from quantstudy.files import read_json, write_json, write_text
from quantstudy.machine.device import set_up
from quantstudy.machine.hardware import describe_machine
from quantstudy.quantization.variant import load_variant
from quantstudy.report.tables import markdown_table
from quantstudy.runtimes.sessions import OpenVino, Session
from quantstudy.search.judging import Shipped
from quantstudy.search.search import Workshop, search
from quantstudy.search.ship import figures_on, latency_figures
from quantstudy.search.workshop import opened

Row = dict[str, Any]
TIMING_SECONDS = 6.0


def main(argv: Sequence[str] | None = None) -> None:
    """Add the rows of each tool and goal to reports/peers/<study>_search.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True, help="a row of studies whose fp32 model, data and graph are there")
    parser.add_argument("--drops", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="percentage points")
    parser.add_argument("--minimize", nargs="+", choices=["size", "latency"], default=["size", "latency"])
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=["quantstudy"])
    parser.add_argument("--minutes", type=float, default=60.0, help="after how long a search begins no candidate")
    parser.add_argument("--may-train", action="store_true", help="let searches train")
    arguments = parser.parse_args(argv)
    params = P.load_params()
    study = params.study(arguments.study)
    device = set_up(study.seed, params.measure.threads)
    file = layout.peers(f"{arguments.study}_search", "json")
    rows: list[Row] = read_json(file) if file.is_file() else []
    test = load_split(layout.split(arguments.study, "test"))
    shop = None
    for drop in arguments.drops:
        for minimize in arguments.minimize:
            choices: Any = {"max_drop": drop, "minimize": minimize, "minutes": arguments.minutes}
            goal = P.Goal(runtime="openvino", batch_size=1, may_train=arguments.may_train, **choices)
            shop = replace(shop, goal=goal) if shop else opened(params, arguments.study, study, goal, device)
            shop.judge.goal = goal
            for tool in arguments.tools:
                for row in TOOLS[tool](shop, test):
                    key = ("tool", "max_drop", "minimize")
                    rows[:] = [old for old in rows if any(old[name] != row[name] for name in key)] + [row]
                    print(row, flush=True)
                    write_json(file, rows)
                    write_text(file.with_suffix(".md"), table(rows, arguments.study, test))
    if shop and "quantstudy" in arguments.tools:
        shop.close()


def quantstudy(shop: Workshop, test: Split) -> Iterable[Row]:
    """Yield the row of this project's search."""
    found = search(shop)
    row = _row("quantstudy", shop.goal) | {"seconds": found.seconds, "variant": found.best and found.best.name}
    if not found.best:
        yield row
        return
    shipped = shop.judge.shipped(load_variant(shop.variant(found.best)))
    yield row | {"validation_drop": found.best.drop, "size_mb": found.best.size_mb} | _measured(shop, shipped, test)


def nncf(shop: Workshop, test: Split) -> Iterable[Row]:
    """Yield the row of `nncf.quantize_with_accuracy_control`; its only aim is int8 within the drop.

    The call follows "Quantizing with Accuracy Control" in OpenVINO's documentation: it gets the OpenVINO model in fp32,
    a calibration and a validation set, and a function that returns the accuracy.
    """
    import nncf as tool
    import openvino

    judge, shape = shop.judge, shop.judge.preprocessing.shape
    if shop.goal.minimize != "size":
        return
    started = time.perf_counter()
    source = openvino.convert_model(shop.calibration.model, example_input=torch.zeros(1, *shape), input=[-1, *shape])
    images = [image[None].numpy() for batch in shop.calibration.images for image in batch.contiguous()]
    checked = _batches(judge.images, shop)

    def accuracy(model: Any, data: Iterable[Any]) -> tuple[float, list[float]]:
        right = [float(np.argmax(model([x])[0]) == y) for x, y in data]
        return float(np.mean(right)), right

    model = tool.quantize_with_accuracy_control(
        source,
        calibration_dataset=tool.Dataset(images),
        validation_dataset=tool.Dataset(checked, lambda item: item),
        validation_fn=accuracy,
        max_drop=shop.goal.max_drop / 100,
        drop_type=tool.DropType.ABSOLUTE,
        preset=tool.QuantizationPreset.MIXED,
        subset_size=len(images),
    )
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nncf.xml"
        openvino.save_model(model, path)
        size = sum(part.stat().st_size for part in (path, path.with_suffix(".bin"))) / 1e6
    run = OpenVino(model, judge.threads)
    shipped: Any = Shipped(judge.fp32.exported, Session(run, lambda: frozenset()))
    row = _row("nncf", shop.goal) | {"variant": "quantize_with_accuracy_control", "seconds": seconds, "size_mb": size}
    right, before = judge.right(shipped, judge.images), judge.right(judge.fp32, judge.images)
    yield row | {"validation_drop": 100 * float(before.mean() - right.mean())} | _measured(shop, shipped, test)


TOOLS: dict[str, Callable[[Workshop, Split], Iterable[Row]]] = {"quantstudy": quantstudy, "nncf": nncf}


def _batches(split: Split, shop: Workshop) -> list[tuple[np.ndarray, int]]:
    images = torch.cat(images_of(split, shop.judge.preprocessing, 64)).contiguous()
    return [(image[None].numpy(), int(label)) for image, label in zip(images, split.labels, strict=True)]


def _row(tool: str, goal: P.Goal) -> Row:
    return {"tool": tool, "max_drop": goal.max_drop, "minimize": goal.minimize}


def _measured(shop: Workshop, shipped: Shipped, test: Split) -> Row:
    figures = figures_on(shop.judge, shipped, test)
    latency = latency_figures(shop.goal, *shop.judge.timed(shipped, TIMING_SECONDS))
    taken = {key: latency[key] for key in ("ms", "fp32_ms", "speedup", "busy")}
    return {key: figures[key] for key in ("top1", "top1_drop", "top1_drop_ci95")} | taken


def table(rows: Sequence[Row], study: str, test: Split) -> str:
    """Return the rows as Markdown, and what they were measured on."""
    columns = ("tool", "goal: drop", "smallest in", "found", "drop on test", "MB", "ms, batch 1", "speed-up", "s")
    cells = []
    for row in sorted(rows, key=lambda row: (row["max_drop"], row["minimize"], row["tool"])):
        found = [row["variant"] or "nothing", "", "", "", ""]
        if row["variant"]:
            speed = "busy" if row["speedup"] is None else f"{row['speedup']:.2f}"
            drop = f"{row['top1_drop']:+.2f} ± {row['top1_drop_ci95']:.2f}"
            found[1:] = [drop, f"{row['size_mb']:.2f}", f"{row['ms']:.2f}", speed]
        cells.append([row["tool"], f"{row['max_drop']:g}", row["minimize"], *found, f"{row['seconds']:.0f}"])
    note = f"`{study}`: {len(test)} test images, batch 1 on OpenVINO. {describe_machine()}."
    return markdown_table([columns, *cells], words=4) + "\n" + note + "\n"


if __name__ == "__main__":
    main()
