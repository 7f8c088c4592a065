"""Model files: exact, small, safe."""

from pathlib import Path

import pytest
import torch

from quantstudy.errors import UserError
from quantstudy.network.checkpoint import load_checkpoint, save_checkpoint


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
