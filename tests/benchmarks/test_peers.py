"""The comparison with other tools: a model that fails is named and loses no other; own rows are fair."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import peer_tools, peers
from benchmarks.peer_tools import Candidate, Subject, own_row
from quantstudy import layout
from quantstudy.data.container import save_splits
from quantstudy.data.prepare import prepare
from quantstudy.errors import UserError
from quantstudy.files import read_json
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.recipes import quantize
from quantstudy.params import load_params
from quantstudy.quantization.layers import quantized_layers
from tests.conftest import ROOT, Project


def classes(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :10]


def fails_at(batch: int) -> Callable[[Tensor], Tensor]:
    """Return a model that fails for batches of one size."""

    def run(images: Tensor) -> Tensor:
        if len(images) == batch:
            raise RuntimeError(f"no kernel for {batch}")
        return classes(images)

    return run


def candidate(tool: str, method: str, run: Callable[[Tensor], Tensor] = classes) -> Candidate:
    return Candidate(tool, method, "eager", run, 1.0, 0.5)


def breaks(subject: Subject) -> Iterator[Candidate]:
    yield candidate("broken", "first")
    raise RuntimeError("no second")


@pytest.fixture
def run(project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[set[tuple[str, str]], str]]:
    """Return a function that runs the comparison of made-up tools, and returns its rows' names and its page."""
    study = load_params().study("tiny")
    splits = prepare(study.data, "tiny", study.calibration, study.seed)
    save_splits({layout.split("tiny", part): split for part, split in splits.items()})

    def own(subject: Subject, method: str) -> Iterator[Candidate]:
        if method == "int8_dynamic":
            raise RuntimeError("cannot be made")
        yield candidate("quantstudy", method)

    tools: dict[str, Any] = {
        "quantstudy": lambda subject: iter([candidate("quantstudy", "fp32")]),
        "early": lambda subject: iter([candidate("early", "bad", fails_at(16)), candidate("early", "good")]),
        "late": lambda subject: iter([candidate("late", "bad", fails_at(1)), candidate("late", "good")]),
        "broken": breaks,
    }
    monkeypatch.setattr(peers, "TOOLS", tools)
    monkeypatch.setattr(peers, "own", own)
    monkeypatch.setattr(peers, "load_fp32", lambda path: nn.Identity())
    monkeypatch.setattr(peers, "load_preprocessing", lambda path: study.data.preprocessing)
    monkeypatch.setattr(peers, "int8_sums_saturate", lambda: False)

    def run(*flags: str) -> tuple[set[tuple[str, str]], str]:
        peers.main(["--study", "tiny", *flags])
        rows = read_json(layout.peers("tiny", "json"))
        return {(row["tool"], row["method"]) for row in rows}, layout.peers("tiny", "md").read_text()

    return run


def test_a_model_that_fails_is_named_and_loses_no_other(run: Callable[..., tuple[set[tuple[str, str]], str]]) -> None:
    methods = ("--methods", "int8_dynamic", "int8_static")
    found, page = run(*methods, "--seconds", "0.01")
    good = {("quantstudy", "fp32"), ("quantstudy", "int8_static"), ("broken", "first")}
    assert found == good | {("early", "good"), ("late", "good")}
    for reason in (
        "quantstudy int8_dynamic: RuntimeError: cannot be made.",
        "early bad on eager: RuntimeError: no kernel for 16.",
        "late bad on eager: RuntimeError: no kernel for 1.",
        "broken: RuntimeError: no second.",
    ):
        assert f"- {reason}\n" in page
    found, _ = run(*methods, "--seconds", "0")
    assert ("late", "bad") in found  # it has an accuracy, and nothing is timed


def test_a_run_without_this_project_ends_with_a_table(run: Callable[..., tuple[set[tuple[str, str]], str]]) -> None:
    found, page = run("--methods", "int8_static", "--seconds", "0.01", "--without", "quantstudy")
    assert found == {("early", "good"), ("late", "good"), ("broken", "first")}
    assert "SQNR" not in page and "- quantstudy: left out of this run.\n" in page


def test_an_unknown_method_is_one_line(run: Callable[..., tuple[set[tuple[str, str]], str]]) -> None:
    for name in ("int8_statics", "int8_statics, uniform"):
        with pytest.raises(UserError, match=r"method: 'int8_statics' is unknown \(did you mean int8_static\?\)"):
            run("--methods", name)


@pytest.mark.parametrize("saturates", [True, False], ids=["without-vnni", "vnni"])
def test_own_rows_are_made_for_the_cpu(monkeypatch: pytest.MonkeyPatch, saturates: bool) -> None:
    monkeypatch.setattr(peer_tools, "int8_sums_saturate", lambda: saturates)
    params = load_params(ROOT / "params.yaml")
    assert own_row(params, "int8_static").saturation_free is saturates
    for method in peers.METHODS:
        own_row(params, method)


def test_what_is_compared_is_run_and_uniform_rows_have_the_same_bits_in_all_layers() -> None:
    assert set(peers.COMPARED) <= set(peers.METHODS) and "w4a8_finetuned, uniform" in peers.COMPARED
    params = load_params(ROOT / "params.yaml")
    row = own_row(params, "w4a8_finetuned, uniform")
    assert row.said() == own_row(params, "w4a8_finetuned").said() | {"fragile_bits": None}
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 5)]
    network = nn.Sequential(*layers).eval()
    variant = quantize(network, Calibration(network, [torch.randn(16, 3, 8, 8)]), row)
    assert {layer.scheme.weight.bits for layer in quantized_layers(variant).values()} == {4}
