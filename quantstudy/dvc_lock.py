"""DVC, reading `dvc.lock` by its quick parser: `python -m quantstudy.dvc_lock repro` is `dvc repro` in less time.

DVC writes the lock file anew after each stage, and before that reads it with the parser that keeps comments, of which
it has none. For 5,800 lines that takes 0.8 s of 1.2, more than a hundred times in a run. Here DVC's other parser reads
it, and the same is written, but for floats of 16 digits, which the other parser changes a little each time. Where a DVC
has these functions elsewhere nothing is changed.
"""

import sys
from typing import Any

from dvc.cli import main
from dvc.utils.serialize import _yaml

LOCK_FILE = "dvc.lock"


def read_quickly() -> None:
    """Have DVC parse lock files without looking for comments, in this process."""
    keep_comments, parse = getattr(_yaml, "parse_yaml_for_update", None), getattr(_yaml, "parse_yaml", None)
    if not keep_comments or not parse:
        return

    def parse_for_update(text: str, path: Any) -> Any:
        return (parse if str(path).endswith(LOCK_FILE) else keep_comments)(text, path)

    _yaml.parse_yaml_for_update = parse_for_update


if __name__ == "__main__":
    read_quickly()
    sys.argv[0] = "dvc"
    sys.exit(main(sys.argv[1:]))
