"""What `evaluate` reports, on stand-in executables whose logits and delays are known."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quantstudy import layout
from quantstudy.data.batches import run_on_split
from quantstudy.data.container import Split
from quantstudy.machine.hardware import int8_sums_saturate
from quantstudy.measure import evaluation, latency
from quantstudy.measure.accuracy import accuracy
from quantstudy.measure.evaluation import Task
from quantstudy.measure.latency import Timing, busy_sizes, fastest, latencies, time_alternately, time_calmly
from quantstudy.measure.operations import count_macs, layer_bits, tera_bit_operations
from quantstudy.params import Preprocessing
from quantstudy.quantization.sqnr import SQNR_LIMIT_DB
from quantstudy.runtimes import executables
from quantstudy.runtimes.executables import Executable, real_layers
from tests.runtimes.variants import METHODS

CPU = torch.device("cpu")
Evaluated = Callable[..., tuple[dict[str, Any], dict[str, Any]]]
CLASSES, LABELS = 7, np.array([0, 1, 2, 3, 4, 5, 6, 0, 1, 2])


class Clock:
    """Stands for the module `time`: it moves only when something takes its time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(latency, "time", self)

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def call(self, *milliseconds: float) -> Callable[[], None]:
        """Return a function that takes the given times in turn."""
        left = list(milliseconds)

        def run() -> None:
            left.append(left.pop(0))
            self.now += left[-1] / 1000

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture(autouse=True)
def others(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The processors that others keep busy in each attempt; the last for all that follow."""
    left = [0.0]

    class Others:
        def processors(self) -> float:
            return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(latency.load, "Others", Others)
    monkeypatch.setattr(latency.load, "others_now", lambda: 0.0)
    monkeypatch.setattr(latency.load, "leaves_room", lambda others, threads: others < 0.5)
    return left


def logits_at(*ranks: int) -> np.ndarray:
    """Logits [10, 7] in which the label of each image comes at a rank, 0 for the largest."""
    logits = np.zeros((len(ranks), CLASSES), np.float32)
    for row, label, rank in zip(logits, LABELS, ranks, strict=True):
        others = [number for number in range(CLASSES) if number != label]
        row[[*others[:rank], label, *others[rank:]]] = np.arange(CLASSES, 0, -1)
    return logits


FP32 = logits_at(0, 0, 0, 0, 0, 0, 0, 0, 5, 6)
WORSE = logits_at(0, 0, 0, 0, 0, 1, 4, 5, 5, 6)


def executable(runtime: str, real: bool = True, run: Callable[[Tensor], Tensor] = lambda x: x) -> Executable:
    return Executable(runtime, run, {"0": True, "1": real})


def timings(**medians: tuple[float, float]) -> dict[int, dict[str, Timing]]:
    """By executable, `variant__runtime`, its medians at batch 1 and 16."""
    names = {name.replace("__", " "): values for name, values in medians.items()}
    sizes = enumerate((1, 16))
    return {size: {name: Timing(row[place], 0.0, 0.0, 9) for name, row in names.items()} for place, size in sizes}


def test_accuracy_drop_agreement_and_sqnr_of_known_logits() -> None:
    found = accuracy(WORSE, FP32, LABELS)
    assert found["top1"] == 50 and found["images"] == 10
    assert found["top5"] == 70  # ranks 0 to 4
    assert accuracy(FP32, FP32, LABELS)["top5"] == 80
    assert accuracy(WORSE, FP32, LABELS)["top1_drop"] == pytest.approx(30)
    assert accuracy(FP32, WORSE, LABELS)["top1_drop"] == pytest.approx(-30)
    assert accuracy(WORSE, FP32, LABELS)["top1_drop_p"] == 0.25  # three of three disagreements
    assert accuracy(FP32, FP32, LABELS)["top1_drop"] == 0
    assert accuracy(WORSE, FP32, LABELS)["agreement"] == 70  # both are wrong, and alike, on two
    assert accuracy(FP32, FP32, LABELS)["agreement"] == 100
    assert accuracy(1.1 * FP32, FP32, LABELS)["sqnr_db"] == pytest.approx(20, abs=1e-3)
    assert accuracy(FP32, FP32, LABELS)["sqnr_db"] == SQNR_LIMIT_DB


def test_of_the_real_runtimes_that_with_the_smallest_sum_of_medians_is_chosen() -> None:
    both = [executable("eager"), executable("openvino")]
    assert fastest("v", both, timings(v__eager=(1, 9), v__openvino=(3, 6))).runtime == "openvino"
    assert fastest("v", both, timings(v__eager=(1, 7), v__openvino=(3, 6))).runtime == "eager"
    slow, quick = executable("eager"), executable("openvino", real=False)
    times = timings(v__eager=(2, 20), v__openvino=(1, 10))
    assert fastest("v", [slow, quick], times).runtime == "eager"
    simulated = executable("eager", real=False)
    assert fastest("v", [simulated, quick], times).runtime == "openvino"


def test_a_speed_up_is_over_the_best_runtime_of_fp32_and_of_real_kernels_alone() -> None:
    times = timings(v__openvino=(2, 10), fp32__eager=(4, 40), fp32__openvino=(8, 30))
    wanted = {"latency_ms_b1": 2, "speedup_b1": 2, "latency_ms_b16": 10, "speedup_b16": 3}
    assert latencies("v", executable("openvino"), times) == wanted
    times = timings(v__eager=(2, 10), fp32__eager=(4, 40))
    found = latencies("v", executable("eager", real=False), times)
    assert (found["latency_ms_b1"], found["speedup_b1"], found["speedup_b16"]) == (2, None, None)
    assert latencies("v", executable("eager"), timings(v__eager=(2, 10)))["speedup_b1"] is None
    assert latencies("fp32", executable("eager"), times)["speedup_b16"] == 1


def test_medians_and_quartiles_are_those_of_the_timed_calls(clock: Clock) -> None:
    turns = [[50.0, 9.0, 1.0, 5.0], [50.0, 2.0, 8.0, 3.0], [50.0, 7.0, 4.0, 6.0]]  # the first of each is not timed
    steps = [100.0, 100.0, *turns[0], *turns[1], *turns[2]]
    found = time_alternately({"a": clock.call(*steps), "b": clock.call(4.0)}, 0)
    assert found["b"].median_ms == found["b"].upper_quartile_ms == pytest.approx(4)
    timing = found["a"]
    assert (timing.median_ms, timing.calls) == (pytest.approx(5), 9)
    assert (timing.lower_quartile_ms, timing.upper_quartile_ms) == (pytest.approx(3), pytest.approx(7))


def test_executables_take_turns_of_four_calls_until_the_time_is_up(clock: Clock) -> None:
    order: list[str] = []

    def recorded(name: str, milliseconds: float) -> Callable[[], None]:
        call = clock.call(milliseconds)
        return lambda: (order.append(name), call())[1]

    calls = {name: recorded(name, milliseconds) for name, milliseconds in (("a", 10), ("b", 5))}
    assert time_alternately(calls, 0.2)["a"].calls == 12  # a round is 60 ms
    assert "".join(order) == "aabb" + 4 * "aaaabbbb"
    order.clear()
    assert time_alternately(calls, 0)["b"].calls == 9
    assert "".join(order) == "aabb" + 3 * "aaaabbbb"


@pytest.mark.parametrize(
    ("busy", "attempts", "during", "marked"),
    [([0.0], 1, 0.0, False), ([2.0, 0.1], 2, 0.1, False), ([3.0, 1.0, 2.0], 3, 1.0, True)],
    ids=["calm", "calm later", "never calm"],
)
def test_a_busy_timing_is_taken_again_and_marked_when_it_stays_so(
    clock: Clock, others: list[float], busy: list[float], attempts: int, during: float, marked: bool
) -> None:
    others[:] = busy
    calls: list[int] = []
    found, load = time_calmly({"a": lambda: (calls.append(1), clock.call(1.0)())}, 0)
    assert len(calls) == attempts * (2 + 3 * 4)
    assert (load.during, load.busy, found["a"].busy) == (during, marked, marked)


def test_quartiles_far_apart_are_busy(clock: Clock) -> None:
    calls = {"wide": clock.call(1.0, 1.0, 9.0), "narrow": clock.call(1.0, 1.1, 1.2)}
    found, load = time_calmly(calls, 0)
    assert (found["wide"].busy, found["narrow"].busy, load.busy) == (True, False, False)


def test_a_busy_timing_of_either_side_gives_no_speed_up() -> None:
    for slow in ("v eager", "fp32 eager"):
        times = timings(v__eager=(2, 10), v__openvino=(3, 11), fp32__eager=(4, 40), fp32__openvino=(9, 90))
        times[16][slow] = replace(times[16][slow], busy=True)
        times[1]["v openvino"] = replace(times[1]["v openvino"], busy=True)  # neither is compared
        found = latencies("v", executable("eager"), times)
        assert (found["latency_ms_b16"], found["speedup_b16"], found["speedup_b1"]) == (10, None, 2)
        assert busy_sizes("v", executable("eager"), times) == [16]
    assert latencies("fp32", executable("eager"), times)["speedup_b16"] is None


MODEL = evaluation._Model(
    {"layers_quantizable": 2.0}, {"0": (8, 8), "1": (4, 32)}, {"0": (9, 9), "1": (9, 18)}, {}, {}, {}, False
)
VALIDATION = [9, 0, 5, 6]
"""Numbers of images."""
MACS = 30, {"0": 10**12, "1": 2 * 10**12}


@pytest.fixture
def evaluated(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluated:
    """A function that evaluates a variant of given runtimes: (milliseconds an image, logits, whether real)."""
    monkeypatch.chdir(tmp_path)

    def stand_in(runtime: str, milliseconds: float, logits: np.ndarray, real: bool = True) -> Executable:
        def run(images: Tensor) -> Tensor:
            clock.now += milliseconds * len(images) / 1000
            numbers = images[:, 0, 0, 0].mul(255).round().long().clamp(0, 9)  # the pixels are the image's number
            return torch.from_numpy(logits)[numbers]

        return executable(runtime, real, run)

    def evaluate(
        *runtimes: tuple[Any, ...],
        fp32: float = 4.0,
        validation: Sequence[int] = VALIDATION,
        is_dynamic: bool = False,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        built, baseline = [stand_in(*given) for given in runtimes], stand_in("eager", fp32, FP32)
        model = MODEL._replace(is_dynamic=is_dynamic)
        monkeypatch.setattr(evaluation, "_eager_after_a_batch", lambda task: (built[0], model))
        monkeypatch.setattr(evaluation, "_executables", lambda task, eager: (built, [baseline], {}))
        for name, size in (("v", 1_000_000), ("fp32", 4_000_000)):
            layout.model("study", name).parent.mkdir(parents=True, exist_ok=True)
            layout.model("study", name).write_bytes(bytes(size))
        monkeypatch.setattr(evaluation, "_layer_sqnr", lambda task, test: {})
        monkeypatch.setattr(evaluation, "count_macs", lambda model, size: MACS)
        monkeypatch.setattr(Task, "fp32", None)
        measure: Any = SimpleNamespace(seconds=0.01, runtimes=[])
        task = Task("study", SimpleNamespace(seed=0), "v", measure, CPU)  # type: ignore[arg-type]
        seen = vars(task)["preprocessing"] = Preprocessing(image_size=8, mean=(0, 0, 0), std=(1, 1, 1))
        pixels = torch.arange(10, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
        split = Split(torch.from_numpy(LABELS), tuple("abcdefg"), seen, pixels)
        reference = np.concatenate([FP32, FP32[validation]])
        metrics, details, found = evaluation.evaluate(task, split, split.subset(validation), reference)
        assert len(found.test) == 10 and len(found.validation) == len(validation)
        return metrics, details

    return evaluate


def test_accuracy_and_latency_are_of_one_executable(evaluated: Evaluated) -> None:
    metrics, details = evaluated(("eager", 3, FP32), ("openvino", 2, WORSE))
    assert details["runtime"] == "openvino"
    assert (metrics["latency_ms_b1"], metrics["latency_ms_b16"]) == (pytest.approx(2), pytest.approx(32))
    assert (metrics["top1"], metrics["top5"], metrics["agreement"]) == (50, 70, 70)
    assert metrics["top1_drop"] == pytest.approx(30)
    assert metrics["speedup_b1"] == metrics["speedup_b16"] == pytest.approx(2)
    assert details["agreement_with_eager"] == {"eager": 100, "openvino": 70}
    assert {timing["executable"] for timing in details["timings"]} == {"v eager", "v openvino", "fp32 eager"}
    assert (metrics["kernel_real"], metrics["size_mb"], metrics["compression"]) == (1, 1, 4)
    assert metrics["tbops"] == 8 * 8 + 2 * 4 * 32
    assert [(row["weight"], row["activation"]) for row in details["layers"]] == [(8, 8), (4, 32)]


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_all_runtimes_see_the_same_batches_if_results_depend_on_them(
    is_dynamic: bool, evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def recorded(run: Any, images: Any, preprocessing: Any, size: int, *rest: Any) -> np.ndarray:
        sizes.append(size)
        return run_on_split(run, images, preprocessing, size, *rest)

    monkeypatch.setattr(evaluation, "run_on_split", recorded)
    evaluated(("eager", 2, FP32), ("openvino", 3, WORSE), is_dynamic=is_dynamic)
    eager = 16 if is_dynamic else 64
    assert sizes == [eager, 16, eager]  # the test images on both, the validation images on the fastest


@pytest.mark.parametrize("method", ["int8-dynamic", "int8-static", "int8-weight-only"])
def test_the_model_tells_whether_results_depend_on_the_batch(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    made = METHODS[method](network, torch.randn(2, 3, 8, 8))
    monkeypatch.setattr(evaluation, "load_any", lambda path: made)
    monkeypatch.setattr(Task, "noise", lambda task, size: torch.zeros(size, 3, 8, 8))
    _, facts = evaluation._eager_after_a_batch(Task("study", None, "v", None, CPU))  # type: ignore[arg-type]
    assert facts.is_dynamic == (method == "int8-dynamic")


@pytest.mark.skipif(int8_sums_saturate(), reason="int8 sums saturate here")
@pytest.mark.parametrize("wrong", [(), (1,), (16,)])
def test_a_runtime_that_computes_something_else_is_not_timed(wrong: tuple[int, ...], monkeypatch: Any) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval().requires_grad_(False)

    def run(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = network(images)
        return 1e3 * logits if len(images) in wrong else logits * (1 + 1e-6)

    measure = SimpleNamespace(runtimes=["openvino"])
    task = SimpleNamespace(
        measure=measure, device=CPU, load=lambda variant: network, noise=lambda size: torch.randn(size, 3, 8, 8)
    )
    made = evaluation.Executable("openvino", run, {"1": True})
    monkeypatch.setattr(evaluation, "_build", lambda *_: made)
    failed: dict[str, str] = {}
    assert evaluation._others(task, "v", failed) == ([] if wrong else [made])  # type: ignore[arg-type]
    assert [*failed] == (["v openvino"] if wrong else [])
    assert all(f"its logits of {wrong[0]} images are at" in why for why in failed.values())


def test_validation_figures_are_of_their_own_images(evaluated: Evaluated) -> None:
    metrics, _ = evaluated(("eager", 3, FP32), ("openvino", 2, WORSE))
    assert (metrics["validation_images"], metrics["validation_top1"], metrics["validation_drop"]) == (4, 25, 50)
    assert metrics["validation_drop_ci95"] > 0
    metrics, _ = evaluated(("eager", 2, WORSE), validation=[])
    assert (metrics["validation_images"], metrics["validation_drop"], metrics["top1_drop"]) == (
        0,
        None,
        pytest.approx(30),
    )


def test_what_was_timed_on_a_busy_machine_says_so(evaluated: Evaluated, others: list[float]) -> None:
    others[:] = [0.0, 9.0]
    metrics, details = evaluated(("eager", 3, FP32))
    assert (metrics["speedup_b1"], metrics["speedup_b16"]) == (pytest.approx(4 / 3), None)
    assert metrics["latency_ms_b16"] == pytest.approx(48) and details["busy"] == [16]
    assert [(row["batch_size"], row["during"], row["busy"]) for row in details["load"]] == [
        (1, 0, False),
        (16, 9, True),
    ]
    assert {row["busy"] for row in details["timings"] if row["batch_size"] == 16} == {True}


def test_what_is_simulated_is_chosen_last_and_reported_without_a_speed_up(evaluated: Evaluated) -> None:
    metrics, details = evaluated(("eager", 3, FP32), ("openvino", 2, WORSE, False))
    assert details["runtime"] == "eager" and metrics["top1_drop"] == 0
    metrics, details = evaluated(("eager", 3, FP32, False), ("openvino", 2, WORSE, False))
    assert details["runtime"] == "openvino" and metrics["kernel_real"] == 0
    assert metrics["speedup_b1"] is None and metrics["speedup_b16"] is None
    assert details["kernel"]["real"] == 1 and details["kernel"]["total"] == 2


BITS = {"int8-static": (8, 8), "7-bit-dynamic": (7, 8), "int4-static": (4, 8)}
BITS |= {"int8-weight-only": (8, 32), "int4-weight-only": (4, 32), "bf16": (16, 16)}


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "no-kernels"])
@pytest.mark.parametrize("runtime", ["eager", "inductor"])
@pytest.mark.parametrize(("method", "bits"), BITS.items())
def test_bits_are_the_schemes_whatever_kernels_there_are(
    method: str, bits: tuple[int, int], runtime: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("int8_kernels_available", "runs_in_int8", "has_kernel", "arithmetic_is_native"):
        monkeypatch.setattr(executables, name, lambda *_: kernels)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    made = METHODS[method](network, torch.randn(2, 3, 8, 8))
    assert layer_bits(made) == {"0": bits, "3": bits}
    macs = 144 * 27 + 144 * 5
    found = tera_bit_operations(count_macs(network, 8)[1], layer_bits(made))
    assert found == pytest.approx(macs * bits[0] * bits[1] / 1e12)
    if not kernels:
        assert not any(real_layers(made, runtime, CPU).values())


def test_layers_beside_quantized_ones_have_the_networks_float_type() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    assert layer_bits(network) == {"0": (32, 32), "3": (32, 32)}
    assert layer_bits(METHODS["mixed"](network, torch.randn(2, 3, 8, 8))) == {"0": (16, 16), "3": (4, 16)}


def test_inductor_runs_a_layer_that_is_called_twice_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("int8_kernels_available", "runs_in_int8"):
        monkeypatch.setattr(executables, name, lambda *_: True)
    twice = nn.Conv2d(4, 4, 3, padding=1)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), twice, nn.ReLU(), twice, nn.Flatten(), nn.Linear(144, 5)).eval()
    network.example_shape = (3, 8, 8)  # type: ignore[assignment]
    made = METHODS["int8-static"](network, torch.randn(2, 3, 8, 8))
    assert real_layers(made, "inductor", CPU) == {"0": True, "1": False, "5": True}
    assert all(real_layers(made, "eager", CPU).values())
