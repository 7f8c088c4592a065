"""Write the folder that a search ends with: the model to deploy, its figures, and a script of ten lines that runs it.

    models/<study>/ship/
      model.pth model.onnx model.json   the variant; its ONNX file, made for the goal's runtime; the input it expects
      ship.json                         the goal, the validation figures behind the choice, then the test figures
      run.py README.md                  a script that classifies an image file; a model card

If no variant meets the goal, the folder holds only ship.json and README.md.
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantstudy import params as P
from quantstudy.data.container import Split
from quantstudy.files import PARTIAL, write_json, write_text
from quantstudy.machine.hardware import describe_machine
from quantstudy.measure.accuracy import accuracy
from quantstudy.measure.latency import Timing
from quantstudy.measure.statistics import paired_drop_half_width
from quantstudy.quantization.variant import load_variant
from quantstudy.runtimes.onnx_model import described, save_onnx
from quantstudy.runtimes.onnx_tuning import form_of, may_saturate
from quantstudy.search.candidates import Trial
from quantstudy.search.judging import Judge, Shipped
from quantstudy.search.search import Found, Workshop

TIMING_SECONDS = 4.0
_SENTENCE = {"size": "the smallest", "latency": "the fastest", "bit_operations": "the one of the fewest bit-operations"}


def ship(shop: Workshop, found: Found, test: Split, folder: Path) -> dict[str, Any]:
    """Write the folder; return the content of ship.json. Only this function looks at the test split, and only once.

    The folder is put in its place once it is whole.
    """
    begun = folder.with_name(f"{PARTIAL}{folder.name}")
    try:
        shutil.rmtree(begun, ignore_errors=True)
        facts = _written(shop, found, test, begun)
        shutil.rmtree(folder, ignore_errors=True)
        begun.rename(folder)
    finally:
        shutil.rmtree(begun, ignore_errors=True)
    return facts


def _written(shop: Workshop, found: Found, test: Split, folder: Path) -> dict[str, Any]:
    facts = described_search(shop, found)
    if found.best:
        variant = load_variant(shop.variant(found.best))
        shipped = shop.judge.shipped(variant)
        facts |= {"method": variant.method, "skipped": variant.skipped, "agreement_with_pytorch": found.best.agreement}
        facts["test"] = figures_on(shop.judge, shipped, test)
        timings = shop.judge.timed({found.best.name: shipped}, TIMING_SECONDS)
        facts["latency"] = latency_figures(shop.goal, timings[found.best.name], timings["fp32"])
        save_onnx(folder / "model.onnx", described(shipped.exported, shop.facts))
        shutil.copyfile(shop.variant(found.best), folder / "model.pth")
        sizes = {name: (folder / f"model.{name}").stat().st_size / 1e6 for name in ("pth", "onnx")}
        facts["size_mb"] = sizes["onnx"]
        facts["files_mb"] = sizes | {"fp32_onnx": shop.judge.fp32.exported.ByteSize() / 1e6}
        facts["onnx_form"] = form_of(shipped.exported)
        saturates = may_saturate(shipped.exported)
        facts["saturation"] = "Its int8 sums need an x86 CPU with VNNI." if saturates else "It is exact on any x86 CPU."
        if shop.judge.preprocessing.antialias:  # Pillow always antialiases
            write_text(folder / "run.py", run_script(shop.judge.preprocessing, shop.goal.runtime))
    write_text(folder / "README.md", card(shop, found, facts))
    write_json(folder / "ship.json", facts)
    return facts


def described_search(shop: Workshop, found: Found) -> dict[str, Any]:
    """Return the goal, whether it is met, the validation figures, and the words for it."""
    best = found.best
    return {
        "study": shop.study,
        "variant": best.name if best else None,
        "goal": shop.goal.model_dump(exclude_none=True),
        "goal_met": best is not None,
        "sentence": sentence(shop, found),
        "validation": {
            "images": len(shop.judge.images),
            "images_looked_at": best.images if best else None,
            "top1_drop": best.drop if best else None,
            "divergence": best.divergence if best else None,
        },
        "size_mb": best.size_mb if best else None,
        "judged_on": judged_on(shop),
        "tbops": best.tbops if best else None,
        "ended": found.ended,
        "seconds": found.seconds,
        "machine": describe_machine(),
        "weights": shop.params.study(shop.study).model.weights or "trained from a random start",
        "data": shop.params.study(shop.study).data.path or shop.params.study(shop.study).data.source,
    }


def judged_on(shop: Workshop) -> str:
    """Return in words what is known of the validation images."""
    if shop.params.study(shop.study).training.epochs:
        return "images of the training split that neither trained nor calibrated"
    return "images of the training split that did not calibrate; whether they trained the given weights is not known"


def sentence(shop: Workshop, found: Found) -> str:
    """Return the result in words; if nothing keeps the goal, how near the nearest candidate came."""
    goal = shop.goal
    limit = f"lose no more than {goal.max_drop:g} points of top-1 with {100 * goal.confidence:g} % confidence"
    if found.best:
        made = sum(trial.divergence is not None for trial in found.trials)
        return f"of {made} candidates {found.best.name} is {_SENTENCE[goal.minimize]} that is shown to {limit}"
    tested = [trial for trial in found.trials if trial.drop is not None]
    nearest = min(tested, key=_drop, default=None)
    if nearest is None:
        return f"no candidate is shown to {limit}: none could be tested"
    seen = f"its drop on {nearest.images} validation images is {nearest.drop:.2f} points, {nearest.verdict}"
    return f"no candidate is shown to {limit}; nearest is {nearest.name}: {seen}"


def _drop(trial: Trial) -> float:
    assert trial.drop is not None
    return trial.drop


def figures_on(judge: Judge, shipped: Shipped, test: Split) -> dict[str, Any]:
    """Return the metrics of `accuracy` on the test split, fp32's top-1, and half the drop's paired 95 % interval."""
    labels = test.labels.numpy()
    before, after = (judge.logits(each, test) for each in (judge.fp32, shipped))
    found: dict[str, Any] = accuracy(after, before, labels)
    half = paired_drop_half_width(before.argmax(1) == labels, after.argmax(1) == labels)
    return found | {"fp32_top1": found["top1"] + found["top1_drop"], "top1_drop_ci95": half}


def latency_figures(goal: P.Goal, own: Timing, fp32: Timing) -> dict[str, Any]:
    """Return the milliseconds per batch of the variant and of fp32; no speed-up if the machine was busy."""
    return {
        "runtime": goal.runtime,
        "batch_size": goal.batch_size,
        "ms": own.median_ms,
        "quartiles_ms": [own.lower_quartile_ms, own.upper_quartile_ms],
        "fp32_ms": fp32.median_ms,
        "busy": own.busy or fp32.busy,
        "speedup": None if own.busy or fp32.busy else fp32.median_ms / own.median_ms,
    }


def metrics(facts: dict[str, Any]) -> dict[str, float | None]:
    """Return the numbers of ship.json as one flat row, for DVC to compare experiments; null if nothing is shipped."""
    test, latency = facts.get("test", {}), facts.get("latency", {})
    return {
        "goal_met": int(facts["goal_met"]),
        "max_drop": facts["goal"]["max_drop"],
        "validation_drop": facts["validation"]["top1_drop"],
        "validation_images": facts["validation"]["images_looked_at"],
        **{key: test.get(key) for key in ("top1", "top1_drop", "top1_drop_ci95", "agreement")},
        "size_mb": facts["size_mb"],
        "compression": facts["files_mb"]["fp32_onnx"] / facts["size_mb"] if facts["goal_met"] else None,
        "tbops": facts["tbops"],
        "latency_ms": latency.get("ms"),
        "speedup": latency.get("speedup"),
        "seconds": facts["seconds"],
    }


def run_script(seen: P.Preprocessing, runtime: str) -> str:
    """Return a script that prints the class of an image file; it needs only the runtime, NumPy and Pillow."""
    height, width = seen.size
    how, mode = f"Image.Resampling.{seen.interpolation.upper()}", "RGB" if seen.channels == 3 else "L"
    turned = "ImageOps.exif_transpose(Image.open(sys.argv[1]))" if seen.exif else "Image.open(sys.argv[1])"
    tall, wide = (round(side / seen.crop_fraction) for side in seen.size)
    resize = {
        "exact": f"image = image.resize(({width}, {height}), {how})",
        "none": "",
        "short_side": f"scale = max({tall} / image.height, {wide} / image.width)\n"
        f"image = image.resize([max(int(side * scale + 1e-9), least) for side, least in zip(image.size, "
        f"({wide}, {tall}))], {how})",
    }[seen.resize]
    model = 'folder / "model.onnx"'
    run = {
        "onnxruntime": f'onnxruntime.InferenceSession({model}).run(None, {{"images": images}})[0]',
        "openvino": f'openvino.Core().compile_model({model}, "CPU", {{"EXECUTION_MODE_HINT": "ACCURACY"}})(images)[0]',
    }[runtime]
    lines = [
        f'"""Print the class of an image file: python run.py photo.jpg; needs numpy, pillow and {runtime}."""',
        f"import json, pathlib, sys\nimport numpy as np, {runtime}\nfrom PIL import Image{', ImageOps' * seen.exif}",
        f'folder = pathlib.Path(__file__).parent\nimage = {turned}.convert("{mode}")',
        resize,
        f"left, top = round((image.width - {width}) / 2), round((image.height - {height}) / 2)",
        f"pixels = np.array(image.crop((left, top, left + {width}, top + {height})), np.float32)",
        f"pixels = (pixels.reshape({height}, {width}, -1) / 255 - {list(seen.mean)}) / {list(seen.std)}",
        "images = np.float32(pixels.transpose(2, 0, 1)[None])",
        'names = json.loads((folder / "model.json").read_text()).get("class_names", range(10**6))',
        f"print(names[{run}.argmax()])",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def card(shop: Workshop, found: Found, facts: dict[str, Any]) -> str:
    """Return the model card: the model, its test figures, how it was chosen and made, and how to run it."""
    title = f"# {shop.study}: {facts['variant'] or 'nothing to ship'}"
    goal, lines = shop.goal, [title, "", facts["sentence"] + ".", ""]
    if found.best:
        test, latency, files = facts["test"], facts["latency"], facts["files_mb"]
        speed = "the machine was busy" if latency["busy"] else f"{latency['speedup']:.2f} times as fast"
        batch = f"batch {latency['batch_size']} on {latency['runtime']}"
        how = f"`python run.py photo.jpg` with numpy, pillow and {goal.runtime}."
        if not shop.judge.preprocessing.antialias:
            how = "There is no run.py: Pillow cannot resize without antialiasing, as this model's images were."
        lines += [
            "| | fp32 | this model |",
            "|---|---:|---:|",
            f"| top-1 on {test['images']} test images, % | {test['fp32_top1']:.2f} | {test['top1']:.2f} |",
            f"| drop, points | | {test['top1_drop']:.2f} ± {test['top1_drop_ci95']:.2f} |",
            f"| same class as fp32, % | | {test['agreement']:.1f} |",
            f"| ONNX file, MB | {files['fp32_onnx']:.3f} | {files['onnx']:.3f} |",
            f"| {batch}, ms | {latency['fp32_ms']:.2f} | {latency['ms']:.2f} ({speed}) |",
            "",
            "± is half the paired 95 % interval. The test images were looked at once, after the choice.",
            "",
            "## How it was chosen",
            "",
            f"On {found.best.images} of {len(shop.judge.images)} {facts['judged_on']}: "
            f"drop {found.best.drop:.2f} points.",
            "",
            "## How it was made",
            "",
            *(f"- {key}: {value}" for key, value in facts["method"].items()),
            "",
            "## How to run it",
            "",
            f"{how} `model.onnx` takes float32 images "
            f"[N, {', '.join(map(str, shop.judge.preprocessing.shape))}], normalized as `model.json` says. It is "
            f"{facts['onnx_form']}. {facts['saturation']}",
            "",
        ]
    lines += [
        "## Where it comes from",
        "",
        f"Weights: {facts['weights']}. Images: {facts['data']}. Machine: {facts['machine']}.",
        f"The search took {facts['seconds']:.0f} s and ended because: {facts['ended']}.",
        "",
    ]
    return "\n".join(lines)


def records(found: Found) -> list[dict[str, Any]]:
    """Return one row per candidate, and one per method that was not tried, as the report shows them."""
    left = [Trial(name, "not tried", verdict=reason) for name, reason in found.left.items()]
    rows = [asdict(trial) for trial in (*found.trials, *left)]
    return [{key: value for key, value in row.items() if key != "agreement"} for row in rows]
