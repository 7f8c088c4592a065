"""Model files: exact, small, safe."""

from pathlib import Path

import pytest
import torch

from quantstudy import layout
from quantstudy.errors import UserError
from quantstudy.network.checkpoint import load_checkpoint, model_file, save_checkpoint


def test_what_is_saved_comes_back_small_and_as_equal_bytes(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.uint8), "c": torch.randn(2).bfloat16()}
    save_checkpoint(tmp_path / "m.pth", state, architecture="x", classes=3)
    found = load_checkpoint(tmp_path / "m.pth")
    assert found["architecture"] == "x" and found["classes"] == 3
    assert all(torch.equal(found["state_dict"][name], tensor) for name, tensor in state.items())
    state = {f"layer.{number}.bias": torch.zeros(1) for number in range(500)}
    save_checkpoint(tmp_path / "m.pth", state)
    assert (tmp_path / "m.pth").stat().st_size < 500 * 100
    for name in ("a.pth", "b.pth"):
        save_checkpoint(tmp_path / name, {"w": torch.ones(3)}, variant="v")
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "foreign"])
def test_a_broken_file_is_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "m.pth"
    save_checkpoint(path, {"w": torch.ones(1000)})
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        torch.save({"w": torch.ones(3)}, path)
    else:
        path.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"hello"}[damage])
    with pytest.raises(UserError, match=r"m\.pth"):
        load_checkpoint(path)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    torch.save({"format": Path("x")}, path)
    with pytest.raises(UserError, match=r"m\.pth"):
        load_checkpoint(path)


def test_a_file_is_of_its_study_variant_and_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    facts = {"study": "a", "variant": "int8", "architecture": "resnet18"}
    save_checkpoint(layout.model("a", "int8"), {"w": torch.ones(3)}, **facts)
    assert model_file("a", "int8", "resnet18") == layout.model("a", "int8")
    for key, wrong in {"study": "b", "variant": "int4", "architecture": "vgg11"}.items():
        save_checkpoint(layout.model("a", "int8"), {"w": torch.ones(3)}, **facts | {key: wrong})
        with pytest.raises(UserError, match=rf"int8\.pth: its {key} is '{wrong}', not '{facts[key]}'"):
            model_file("a", "int8", "resnet18")


def test_flipped_bytes_are_found_wherever_they_matter(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    save_checkpoint(path, {"w": torch.arange(999.0)}, name="x" * 99)
    whole, expected = path.read_bytes(), load_checkpoint(path)
    for at in range(0, len(whole), 13):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        try:
            found = load_checkpoint(path)
        except UserError:
            continue
        assert torch.equal(found.pop("state_dict")["w"], expected["state_dict"]["w"])
        assert found == {key: value for key, value in expected.items() if key != "state_dict"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_written(tmp_path: Path, value: float) -> None:
    with pytest.raises(UserError, match=r"m\.pth: w has 1 values that are not finite"):
        save_checkpoint(tmp_path / "m.pth", {"w": torch.tensor([1.0, value])})
    assert not list(tmp_path.iterdir())
