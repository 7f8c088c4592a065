"""README keeps what it says: its generated parts are those of the committed reports, its outputs are true."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
import torch
from dvc.commands.status import CmdDataStatus
from dvc.repo import Repo
from PIL import Image

from quantstudy import layout
from quantstudy.data.preprocessing import pixels
from quantstudy.errors import UserError
from quantstudy.files import write_json, write_text
from quantstudy.network.architectures import build
from quantstudy.network.fp32 import skeleton
from quantstudy.params import Preprocessing
from quantstudy.report.documents import filled, pages, read_utf8
from quantstudy.runtimes.onnx_graph import network_graph
from quantstudy.runtimes.onnx_model import described, save_onnx, to_onnx
from quantstudy.runtimes.sessions import why_missing
from tests.blocks import SHOWN, Block, blocks, dialogues
from tests.conftest import ROOT

BLOCKS = [block for block in blocks() if block.page in SHOWN]
DIALOGUES = [dialogue for block in BLOCKS if block.kind == "console" for dialogue in dialogues(block)]
MEASURED = re.compile(r"(?<=on )\d+\.\d\d(?= %)|(?<=SQNR )\d+\.\d")
"""Numbers of an output that another checkpoint and other images change."""
REMARK = re.compile(r"[\w ,]+: \d+ of \d+ images are predicted otherwise")
"""A line that is printed of a network whose logits nearly tie, as those of a random one do."""


def committed(path: Path) -> str:
    """Return a file as git has it: a run of one's own writes other timings."""
    command = ["git", "show", f":{path.as_posix()}"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if shown.returncode:
        pytest.skip(f"git does not tell {path}: {shown.stderr.strip()}")
    return shown.stdout


def test_the_generated_parts_are_those_of_the_committed_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for page in pages():
        text = read_utf8(page)
        assert filled(page, text, committed) == text, f"{page}: run `python -m quantstudy readme`"


def test_a_table_has_the_rows_that_are_asked_for_and_a_place_needs_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind, path in (("peers", layout.peers("s", "md")), ("front", layout.budget_front("s", "png"))):
        with pytest.raises(UserError, match=rf"docs/a.md: no file {path}; run `"):
            filled(Path("docs/a.md"), f"<!-- {kind}: s -->\n<!-- end -->")
    table = "| variant | top-1 |\n|---|---|\n| fp32 | 9 |\n| fp16 | 8 |\n| bf16 | 7 |\n\nA note.\n"
    start, end = "<!-- results: s bf16 fp32 -->\n", "<!-- end -->"
    found = filled(Path("README.md"), f"a\n{start}old\n{end}\nb", lambda path: table)
    assert found == f"a\n{start}| variant | top-1 |\n|---|---|\n| fp32 | 9 |\n| bf16 | 7 |\n\nA note.\n{end}\nb"
    remarks = "\nx was not applied everywhere. a: b (fp16, bf16).\n\ny was not applied. c: d (f) (fp16); e (fp16).\n"
    found = filled(Path("README.md"), f"{start}{end}", lambda path: table + remarks)
    assert "(fp16, bf16)" in found and "y was" not in found
    figures = {"top1_drop": 1.5, "top1_drop_p": 0.25, "compression": 4.0, "speedup_b1": 2.0, "speedup_b16": None}
    start = "<!-- decision: s\nA small file = int8\nSpeed = int4\n-->\n"
    found = filled(Path("README.md"), f"{start}{end}", lambda path: json.dumps(figures | {"speedup_b1": path.stem}))
    assert re.findall(r"\| (.*?) +\| `(\w+)` \| \+1.50 \(0.250\)", found) == [
        ("A small file", "int8"),
        ("Speed", "int4"),
    ]
    for broken in (f"<!-- decision: s\nSpeed\n-->\n{end}", "<!-- results: s -->\n", f"<!-- results: s, a -->\n{end}"):
        with pytest.raises(UserError, match=r"README.md: one of 1 marks is not"):
            filled(Path("README.md"), broken)
    with pytest.raises(UserError, match="'int8' is unknown"):
        filled(Path("README.md"), f"<!-- results: s int8 -->\n{end}", lambda path: table)


@pytest.mark.parametrize("kind", ["ablation", "front", "low_bits"])
def test_a_table_of_another_fp32_model_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path("docs/a.md")
    place = f"<!-- {kind}: s -->\n<!-- end -->"

    def write(top1: float | None) -> None:
        rows = {
            "ablation": [{"top1": top1 - 2.25, "top1_drop": 2.25}] if top1 else [],
            "front": {"comparison": [], "rows": [{"series": "fp32", "top1": top1}] if top1 else []},
            "low_bits": [{"fp32_top1": top1}] if top1 else [{}],
        }
        file = {"ablation": layout.report("s") / "ablation.json", "front": layout.budget_front("s", "json")}
        write_json(file.get(kind, layout.low_bits("s", "json")), rows[kind])

    for path in (layout.report("s") / "ablation.md", layout.budget_front("s", "png"), layout.low_bits("s", "md")):
        write_text(path, "| a |\n|---|\n")
    write(58.44)
    assert "Another" not in filled(page, place)  # the study has no table of variants
    write_json(layout.metrics("s", "fp32"), {"top1": 58.42})
    line = "|\n\nAnother fp32 model than in the table of variants: 58.44 and 58.42 % top-1.\n<!-- end -->"
    assert filled(page, place).endswith(line)
    for top1 in (58.42, None):
        write(top1)
        assert "Another" not in filled(page, place)


def test_a_report_that_lacks_a_key_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_json(layout.metrics("s", "int8"), {"top1_drop": 1.5})
    with pytest.raises(UserError, match=r"a.md: the decision of s has no key 'speedup_b1'; run `dvc repro` again"):
        filled(Path("docs/a.md"), "<!-- decision: s\nSpeed = int8\n-->\n<!-- end -->")


@pytest.mark.skipif(why_missing("onnxruntime") is not None, reason="no onnxruntime")
@pytest.mark.parametrize("block", [block for block in BLOCKS if block.kind == "python"], ids=str)
def test_a_python_block_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    network = skeleton("mobilenet_v2", 10).to_empty(device="cpu")
    for tensor in network.state_dict().values():
        tensor.zero_()
    network.classifier[1].bias[7] = 1
    seen = Preprocessing(
        image_size=32, crop_fraction=0.9, interpolation="bicubic", mean=(0.4, 0.5, 0.6), std=(0.2,) * 3
    )
    facts = {"preprocessing": seen.model_dump(), "class_names": [f"digit {number}" for number in range(10)]}
    exported = described(to_onnx(network, network_graph("mobilenet_v2", 10, 32)), facts)
    save_onnx(layout.onnx("mobilenetv2_digits", "int8_static"), exported)
    photo = np.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=np.uint8)
    Image.fromarray(photo).save("photo.jpg")
    found: dict[str, Any] = {}
    exec(block.text, found)
    assert capsys.readouterr().out == "digit 7\n"
    assert np.array_equal(found["pixels"].transpose(2, 0, 1) * 255, pixels(Path("photo.jpg").read_bytes(), seen))


@pytest.mark.parametrize(
    ("command", "output"),
    [
        pytest.param(*dialogue, id=dialogue[0][:48], marks=[pytest.mark.slow] if " quantize " in dialogue[0] else [])
        for dialogue in DIALOGUES
    ],
)
def test_an_output_is_printed(command: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = [print_it for start, print_it in PRINTED.items() if command.startswith(start)]
    assert len(known) == 1, f"no test of what `{command}` prints"
    monkeypatch.chdir(tmp_path)
    printed = known[0](command)
    expected, found = (sorted(MEASURED.sub("#", text).splitlines()) for text in (output, printed))
    for line, other in zip(expected, found, strict=True):
        assert re.fullmatch(re.escape(line).replace("…", ".*"), other), f"{line}\n{other}"


def stages_of_one_method(command: str) -> str:
    """Return what DVC runs when a number of a method changes: the stages that track it, and all that rest on them."""
    method = re.search(r"-S (methods\.\w+)", command)
    assert method
    with contextlib.chdir(ROOT), Repo() as repo:
        graph = repo.index.graph
        tracking = [s for s in graph if any(method[1] in getattr(dep, "params", ()) for dep in s.deps)]
        found = set(tracking).union(*(networkx.ancestors(graph, stage) for stage in tracking))
        return "\n".join(f"Running stage '{stage.addressing}':" for stage in found)


def program(command: str) -> str:
    """Run a module of the project in a folder with params.yaml, a ResNet-18 and 200 images; return what it printed."""
    torch.manual_seed(0)
    torch.save(build("resnet18", 10).state_dict(), "model.pth")
    random = np.random.default_rng(0)
    for number in range(200):
        path = Path("imgs") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text())
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=environment())
    lines = (done.stdout + done.stderr).strip().splitlines()
    return "\n".join(line for line in lines if not REMARK.match(line))


def environment() -> dict[str, str]:
    """Return the variables under which `python -m` finds the project and this interpreter."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


PRINTED: dict[str, Callable[[str], str]] = {
    "python -m": program,
    "dvc exp run -S methods.": stages_of_one_method,
    "dvc repro": lambda command: CmdDataStatus.UP_TO_DATE_MSG,
}
