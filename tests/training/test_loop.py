"""The training loop: resume, best epoch, divergence, gradient scaling."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from quantstudy import params as P
from quantstudy.data.batches import Batches
from quantstudy.data.prepare import prepare
from quantstudy.errors import UserError
from quantstudy.training import loop as training

Pair = tuple[Batches, Batches]
DATA = P.Data(source="digits", image_size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 10))


@pytest.fixture
def batches() -> Pair:
    split = prepare(DATA, "digits")["train"]
    train = Batches(split, DATA, 32, "cpu", indices=torch.arange(160), shuffle=True, augmentation="shift")
    return train, Batches(split, DATA, 64, "cpu", indices=torch.arange(160, 260))


@pytest.fixture
def run(tmp_path: Path) -> training.Run:
    settings = P.Training(epochs=4, learning_rate=0.05, batch_size=32)
    return training.Run("test", settings, tmp_path / "curve.csv", tmp_path / "resume.pt", "print")


def test_a_killed_run_resumes_to_its_weights(run: training.Run, batches: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = network()
    training.train(whole, *batches, run)
    curve = [line.split(",")[:5] for line in run.curve.read_text().splitlines()]

    real, calls = training.evaluate, []

    def killed(*arguments: object) -> tuple[float, float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "SAVE_SHARE", 1e9)
    monkeypatch.setattr(training, "evaluate", killed)
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        training.train(network(), *batches, run)
    assert run.resume.is_file()
    monkeypatch.setattr(training, "evaluate", real)
    resumed = network()
    state = training.train(resumed, *batches, run)
    assert [line.split(",")[:5] for line in run.curve.read_text().splitlines()] == curve
    assert state.epoch == 4 and not run.resume.exists()
    for ours, theirs in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_best_epoch_is_kept_and_no_other_runs_state_resumed(run: training.Run, batches: Pair) -> None:
    run.resume.write_bytes(b"broken")
    assert training.train(network(), *batches, run).epoch == 4
    assert len(run.curve.read_text().splitlines()) == 5
    model = network()
    state = training.train(model, *batches, run)
    best = max(row["validation_top1"] for row in state.rows)
    assert training.evaluate(model, batches[1])[1] == pytest.approx(best)
    assert state.best_score[0] == best
    harmful = replace(run, settings=P.Training(epochs=1, learning_rate=5.0), score_start=True)
    assert training.train(model, *batches, harmful).best_score[0] >= best
    wild = replace(run, settings=P.Training(epochs=3, learning_rate=1e12))
    with pytest.raises(UserError, match="lower learning_rate"):
        training.train(network(), *batches, wild)


def test_one_image_to_train_on_is_refused() -> None:
    split = prepare(DATA, "digits")["train"].subset(range(2))
    settings = P.Training(epochs=0, learning_rate=0.1)
    assert training.training_and_validation(split, DATA, settings, 0, torch.device("cpu"))[0].images == 1
    with pytest.raises(UserError, match=r"^studies\.s\.epochs: batches of 64 from 1 images"):
        settings = P.Training(epochs=1, learning_rate=0.1)
        training.training_and_validation(split, DATA, settings, 0, torch.device("cpu"), "studies.s.epochs")


def test_float16_scales_gradients_and_skips_those_that_overflow(
    run: training.Run, batches: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales = []
    scale = torch.amp.GradScaler.scale

    def overflow(self: torch.amp.GradScaler, loss: torch.Tensor) -> torch.Tensor:
        scales.append(self.get_scale())
        return scale(self, loss) * (torch.inf if self.get_scale() > 2**14 else 1.0)  # type: ignore[operator]

    monkeypatch.setattr(torch.amp.GradScaler, "scale", overflow)
    model = network()
    training.train(model, *batches, replace(run, dtype=torch.float16))
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values()) and min(scales) > 1


def test_a_run_of_other_code_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "quantstudy" / "training"
    package.mkdir(parents=True)
    script = tmp_path / "stages" / "own.py"
    script.parent.mkdir()
    monkeypatch.setattr("quantstudy.training.loop.__file__", str(package / "loop.py"))
    found = []
    for text in ("x = 1\n", "x = 1  # a comment\n", "x = 2\n"):
        script.write_text(text)
        found.append(training.fingerprint(str(script), 7, "a"))
    assert found[0] == found[1] != found[2]
    assert training.fingerprint(str(script), 8, "a") != found[2]
