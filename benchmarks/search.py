"""Compare the search to a goal with those of NNCF and Olive, on the same model, images and machine.

    python -m benchmarks.search --study mobilenetv2_food101_64px --drops 0.5 1 2
    .venv-peers/bin/python -m benchmarks.search --study mobilenetv2_food101_64px --drops 0.5 1 2 --tools nncf olive

All judge on the same validation images and calibrate on the same calibration images. The model that each ends with
then runs on the whole test split, and is timed in turns with fp32 on OpenVINO. Olive makes models for ONNX Runtime: its
model runs there. Candidates that a search has made are kept for the next drop; their seconds count each time.

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
import onnx
import torch

from quantstudy import layout
from quantstudy import params as P
from quantstudy.data.batches import images_of
from quantstudy.data.container import Split, load_split
from quantstudy.errors import run_stage
from quantstudy.files import read_json, write_json, write_text
from quantstudy.machine.device import set_up
from quantstudy.machine.hardware import describe_machine
from quantstudy.quantization.variant import load_variant
from quantstudy.report.markdown import markdown_table
from quantstudy.runtimes.sessions import OpenVino, Session, open_session
from quantstudy.search.judging import Shipped
from quantstudy.search.search import Workshop, search
from quantstudy.search.ship import figures_on, latency_figures
from quantstudy.search.workshop import opened

Row = dict[str, Any]
TIMING_SECONDS = 6.0
OLIVE_TRIALS = 12
"""Of about fifty points of OnnxQuantization's search space."""


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
    images = _calibrating(shop)
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
    shipped: Any = Shipped(judge.fp32.exported, Session(run, lambda: frozenset()), is_dynamic=False)
    row = _row("nncf", shop.goal) | {"variant": "quantize_with_accuracy_control", "seconds": seconds, "size_mb": size}
    yield row | _judged(shop, shipped) | _measured(shop, shipped, test)


def olive(shop: Workshop, test: Split) -> Iterable[Row]:
    """Yield the result of Olive's search over its pass OnnxQuantization, on ONNX Runtime.

    As in Olive's documentation on search strategies: joint execution, the TPE sampler, and an accuracy metric whose
    goal is `max-degradation`. The objective of priority 1 is the size on disk, or the average latency.
    """
    import olive as tool
    from olive.data.registry import Registry

    judge, goal, name = shop.judge, shop.goal, "images"
    pairs = {"judging": _batches(judge.images, shop)}
    pairs["calibrating"] = [(image, 0) for image in _calibrating(shop)]
    Registry.register_dataset("qs_judging")(lambda **_: Pairs(pairs["judging"], name))
    Registry.register_dataset("qs_calibrating")(lambda **_: Pairs(pairs["calibrating"], name))
    Registry.register_post_process("qs_classes")(lambda logits, **_: torch.as_tensor(logits).argmax(1))

    def data(kind: str) -> dict[str, Any]:
        return {
            "name": kind,
            "load_dataset_config": {"type": f"qs_{kind}"},
            "pre_process_data_config": {"type": "skip_pre_process"},
            "dataloader_config": {"type": "default_dataloader", "params": {"batch_size": 1}},
            "post_process_data_config": {"type": "qs_classes"},
        }

    classes = {"task": "multiclass", "num_classes": len(test.classes)}
    limit = {"type": "max-degradation", "value": goal.max_drop / 100}
    accuracy = {"name": "accuracy_score", "priority": 2, "metric_config": classes, "goal": limit}
    small = {"name": "size", "type": "size_on_disk", "sub_types": [{"name": "bytes", "priority": 1}]}
    quick = {
        "name": "latency",
        "type": "latency",
        "data_config": "judging",
        "sub_types": [{"name": "avg", "priority": 1}],
    }
    metrics = [small if goal.minimize == "size" else quick]
    metrics += [{"name": "accuracy", "type": "accuracy", "data_config": "judging", "sub_types": [accuracy]}]
    strategy = {"execution_order": "joint", "sampler": "tpe", "max_iter": OLIVE_TRIALS, "output_model_num": 1}
    strategy["max_time"] = round(60 * goal.minutes)
    accelerator = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fp32.onnx"
        path.write_bytes(judge.fp32.exported.SerializeToString())
        started = time.perf_counter()
        found = tool.run(
            {
                "input_model": {"type": "ONNXModel", "model_path": str(path)},
                "systems": {"here": {"type": "LocalSystem", "accelerators": [accelerator]}},
                "data_configs": [data("judging"), data("calibrating")],
                "evaluators": {"both": {"type": "OnnxEvaluator", "metrics": metrics}},
                "passes": {"quantization": {"type": "OnnxQuantization", "data_config": "calibrating"}},
                "search_strategy": strategy,
                "host": "here",
                "target": "here",
                "evaluator": "both",
                "evaluate_input_model": True,
                "output_dir": f"{folder}/out",
                "cache_dir": f"{folder}/cache",
                "log_severity_level": 3,
            }
        )
        seconds = time.perf_counter() - started
        row = _row("olive", goal) | {"seconds": seconds, "variant": None}
        best = found.get_best_candidate() if found.has_output_model() else None
        if best is None:
            yield row
            return
        model = onnx.load(best.model_path)
    is_dynamic = any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.node)
    shipped = Shipped(model, open_session(model, "onnxruntime", judge.threads), is_dynamic)
    row |= {"variant": "OnnxQuantization, on ONNX Runtime", "size_mb": model.ByteSize() / 1e6}
    yield row | _judged(shop, shipped) | _measured(shop, shipped, test)


class Pairs(torch.utils.data.Dataset[Any]):
    """Images as Olive wants them, from pairs of float32 [1, C, H, W] and class: `({input: [C, H, W]}, class)`."""

    def __init__(self, pairs: Sequence[tuple[np.ndarray, int]], name: str) -> None:
        self._pairs, self._name = pairs, name

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], int]:
        """Return an image and its class."""
        image, label = self._pairs[index]
        return {self._name: image[0]}, label


TOOLS: dict[str, Callable[[Workshop, Split], Iterable[Row]]] = {"quantstudy": quantstudy, "nncf": nncf, "olive": olive}


def _batches(split: Split, shop: Workshop) -> list[tuple[np.ndarray, int]]:
    images = torch.cat(images_of(split, shop.judge.preprocessing, 64)).contiguous()
    return [(image[None].numpy(), int(label)) for image, label in zip(images, split.labels, strict=True)]


def _calibrating(shop: Workshop) -> list[np.ndarray]:
    """Return the calibration images one by one, float32 [1, C, H, W]."""
    return [image[None].numpy() for batch in shop.calibration.images for image in batch.contiguous()]


def _row(tool: str, goal: P.Goal) -> Row:
    return {"tool": tool, "max_drop": goal.max_drop, "minimize": goal.minimize}


def _judged(shop: Workshop, shipped: Shipped) -> Row:
    judge = shop.judge
    right, before = judge.right(shipped, judge.images), judge.right(judge.fp32, judge.images)
    return {"validation_drop": 100 * float(before.mean() - right.mean())}


def _measured(shop: Workshop, shipped: Shipped, test: Split) -> Row:
    figures = figures_on(shop.judge, shipped, test)
    timings = shop.judge.timed({"variant": shipped}, TIMING_SECONDS)
    latency = latency_figures(shop.goal, timings["variant"], timings["fp32"])
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
    run_stage(main)
