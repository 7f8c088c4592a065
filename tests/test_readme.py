"""README keeps what it says: its tables are those of the committed reports, its links exist."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantstudy import layout, models
from quantstudy.report.documents import filled, pages, read_utf8
from quantstudy.export.graph import network_graph
from quantstudy.export.onnx_model import save_onnx, to_onnx
from quantstudy.runtimes.sessions import why_missing
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def committed(path: Path) -> str:
    """Return a file as git has it: a run of one's own writes other timings."""
    shown = subprocess.run(["git", "show", f":{path.as_posix()}"], cwd=ROOT, capture_output=True, text=True, check=False)
    if shown.returncode:
        pytest.skip(f"git does not tell {path}: {shown.stderr.strip()}")
    return shown.stdout


def test_the_generated_parts_are_those_of_the_committed_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for page in pages():
        text = read_utf8(page)
        assert filled(page, text, committed) == text, f"{page}: run `python -m quantstudy readme`"


@pytest.mark.skipif(why_missing("onnxruntime") is not None, reason="no onnxruntime")
def test_the_onnx_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    block = re.search(r"```python\nimport numpy as np, onnxruntime\n(.*?)```", README, re.DOTALL)
    assert block
    monkeypatch.chdir(tmp_path)
    network = models.skeleton("mobilenet_v2", 10).to_empty(device="cpu")
    for tensor in network.state_dict().values():
        tensor.zero_()
    exported = to_onnx(network, network_graph("mobilenet_v2", 10, 32))
    save_onnx(layout.onnx("mobilenetv2_digits", "int8_static"), exported)
    exec("import numpy as np, onnxruntime\n" + block[1], {})
    assert capsys.readouterr().out == "[0 0]\n"


def test_links_to_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_example_row_is_valid() -> None:
    from quantstudy.params import Study

    block = re.search(r"```yaml\nstudies:\n(.*?)```", README, re.DOTALL)
    assert block
    text = "studies:\n" + block[1].replace("<its SHA-256>", "ab" * 32)
    Study.model_validate(yaml.safe_load(text)["studies"]["my_flowers"])
