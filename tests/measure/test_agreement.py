"""An exported model that no installed runtime can run is no success."""

import re
from typing import Any

import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

from quantstudy import params as P
from quantstudy.data.container import Split
from quantstudy.errors import UserError
from quantstudy.measure import agreement
from quantstudy.runtimes.sessions import Session, why_missing

MISSING, BROKEN = "not installed", "no operator\nof this name"
SEEN = P.Preprocessing(image_size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval()


def found(timed: dict[str, onnx.ModelProto]) -> dict[str, Any]:
    pixels = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    split = Split(torch.zeros(4, dtype=torch.int64), ("a", "b"), SEEN, pixels)
    return agreement.check(network(), onnx.ModelProto(), timed, split, SEEN)


@pytest.mark.parametrize(
    ("states", "fails"),
    [
        ({"onnxruntime": "broken", "openvino": "broken"}, True),
        ({"onnxruntime": "broken", "openvino": "missing"}, True),
        ({"onnxruntime": "missing", "openvino": "broken"}, True),
        ({"onnxruntime": "broken"}, True),
        ({"onnxruntime": "broken", "openvino": "runs"}, False),
        ({"onnxruntime": "runs", "openvino": "missing"}, False),
        ({"onnxruntime": "missing", "openvino": "missing"}, False),
        ({}, False),
    ],
)
def test_a_model_that_no_installed_runtime_can_run_is_refused(
    states: dict[str, str], fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return network()(images)  # type: ignore[no-any-return]

    def open_session(exported: onnx.ModelProto, runtime: str, threads: int) -> Session:
        if states[runtime] == "broken":
            raise RuntimeError(BROKEN)
        return Session(run, frozenset)

    monkeypatch.setattr(agreement, "why_missing", lambda name: MISSING if states[name] == "missing" else None)
    monkeypatch.setattr(agreement, "open_session", open_session)
    timed = dict.fromkeys(states, onnx.ModelProto())
    if fails:
        broken = next(name for name, state in states.items() if state == "broken")
        with pytest.raises(UserError, match=rf"{broken}: .*of this name; nothing is written$") as raised:
            found(timed)
        assert "\n" not in str(raised.value)
    else:
        facts = found(timed)
        assert facts["unavailable"].keys() == {name for name, state in states.items() if state != "runs"}
        assert facts["exported"].keys() == facts["agreement"].keys() == states.keys() - facts["unavailable"].keys()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_runtimes_own_reason_is_one_line(runtime: str) -> None:
    if reason := why_missing(runtime):
        pytest.skip(reason)
    values = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None]) for name in ("images", "logits"))
    graph = helper.make_graph([helper.make_node("Invented", ["images"], ["logits"])], "x", *([each] for each in values))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    with pytest.raises(UserError, match=rf"^export: no installed runtime can run the model: {runtime}: ") as raised:
        found({runtime: model})
    assert re.fullmatch(r".*; nothing is written", str(raised.value))
