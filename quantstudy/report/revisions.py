"""What a git revision or an experiment holds: its params, its metrics, and the predictions that DVC keeps of it.

Metrics are in git; predictions and images are in DVC's cache or a remote. A revision keeps its metrics even if its
predictions were never pushed, or if `dvc gc` removed them.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantstudy import layout
from quantstudy.errors import UserError, one_line
from quantstudy.measure.predictions import predictions_in
from quantstudy.params import PARAMS_FILE
from quantstudy.params.reading import parse_params

WORKSPACE = "workspace"


class Revision:
    """A git revision, an experiment by its name, or `workspace`: the files of the working directory.

    Raises:
        UserError: there is no such revision, no DVC repository, or no params in it.
    """

    def __init__(self, name: str) -> None:
        from dvc.api import DVCFileSystem
        from dvc.exceptions import DvcException

        self.name = name
        self._files = DVCFileSystem(rev=None if name == WORKSPACE else name)
        try:
            content = self._read(PARAMS_FILE)
        except DvcException as error:
            self.close()
            raise UserError(f"{name!r}: not a git revision or an experiment ({one_line(error)})") from None
        if content is None:
            raise UserError(f"{name!r}: has no {PARAMS_FILE}")
        self.params = parse_params(content.decode("utf-8", "replace"), PARAMS_FILE)

    def close(self) -> None:
        """Close the repository."""
        self._files.close()

    @property
    def variants(self) -> list[tuple[str, str]]:
        """Every (study, variant) that the revision's params list, in their order."""
        variants = ["fp32", *self._methods]
        return [(study, variant) for study in self.params["run"] for variant in variants]

    @property
    def params_in_use(self) -> dict[str, Any]:
        """The params without the studies and methods that are defined but not listed to run."""
        used = {"studies": self.params["run"], "methods": self._methods}
        return {
            section: {name: row for name, row in value.items() if name in used[section]} if section in used else value
            for section, value in self.params.items()
        }

    def metrics(self, study: str, variant: str) -> dict[str, Any] | None:
        """Return a variant's metrics; None if the revision's params do not list it or it was not measured.

        `busy` lists the batch sizes that were timed on a busy machine, if the details are kept.
        """
        metrics = self._read_json(layout.metrics(study, variant)) if (study, variant) in self.variants else None
        details = metrics and self._read_json(layout.details(study, variant))
        return metrics and metrics | {"busy": details.get("busy", []) if details else []}

    def page(self, study: str) -> dict[str, Any] | None:
        """Return what the HTML report shows of a study; None if it was not written."""
        return self._read_json(layout.page(study))

    def predictions(self, study: str, variant: str) -> NDArray[np.int16] | None:
        """Return a variant's predicted classes, int16 [images]; None where the cache has lost them."""
        content = self._read(layout.predictions(study, variant))
        return None if content is None else predictions_in(content, study, variant)

    def test_md5(self, study: str) -> str | None:
        """Return DVC's checksum of a study's test split; None if DVC has none."""
        try:
            return self._files.info(layout.split(study, "test").as_posix()).get("dvc_info", {}).get("md5")
        except FileNotFoundError:
            return None

    def test_labels(self, study: str) -> NDArray[np.int64] | None:
        """Return the true classes of a study's test split, int64 [images]; None where the cache has lost them."""
        import torch

        content = self._read(layout.split(study, "test"))
        return None if content is None else torch.load(io.BytesIO(content), weights_only=True)["labels"].numpy()

    @property
    def _methods(self) -> list[str]:
        """The methods that run; an old revision has no methods of a budget."""
        budget = self.params.get("budget", {}).get("methods", [])
        return [*self.params["ptq"], *budget, *self.params["qat"]]

    def _read_json(self, path: Path) -> Any:
        content = self._read(path)
        return None if content is None else json.loads(content)

    def _read(self, path: Path) -> bytes | None:
        try:
            with self._files.open(path.as_posix()) as file:
                return file.read()
        except FileNotFoundError:
            return None
