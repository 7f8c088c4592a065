"""The benchmark of few bits goes on from rows of any methods."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import low_bits
from benchmarks.low_bits import Subject, main
from quantstudy import layout
from quantstudy.errors import UserError
from quantstudy.files import read_json, write_json
from quantstudy.params import Preprocessing
from tests.conftest import Project


def measured(subject: Any, draw: int, methods: Sequence[str]) -> Iterator[dict[str, Any]]:
    keys = ("weight_bits", "sqnr_db", "divergence", "agreement", "fp32_top1", "drop", "drop_ci95", "images", "seconds")
    for name in methods:
        yield {"method": name, "draw": draw} | dict.fromkeys(keys, 1.0)


def test_rows_of_methods_that_are_gone_stand_last(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Preprocessing(image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    monkeypatch.setattr(low_bits, "of_study", lambda name: Subject(name, "no images", nn.Identity(), seen, torch.empty))
    monkeypatch.setattr(low_bits, "measured", measured)
    (old,) = measured(None, 0, ["an_older_one"])
    file: Path = layout.low_bits("tiny", "json")
    write_json(file, [old | {"target": "vnni"}])
    main(["--study", "tiny", "--methods", "int4_static", "int8_static", "--draws", "1"])
    assert [row["method"] for row in read_json(file)] == ["int8_static", "int4_static", "an_older_one"]
    with pytest.raises(UserError, match=r"--methods: 'int8_statics' is unknown \(did you mean int8_static\?\)"):
        main(["--study", "tiny", "--methods", "int8_statics"])
