"""Where the harnesses write down what they counted, for docs/reliability.md."""

from collections.abc import Mapping

from quantstudy import layout
from quantstudy.files import write_json
from quantstudy.machine.hardware import describe_machine
from tests.conftest import ROOT


def record(name: str, counts: Mapping[str, int]) -> None:
    """Write the counts of a harness to reports/reliability/<name>.json, and print where they are."""
    path = ROOT / layout.reliability(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"counts": dict(counts), "machine": describe_machine()})
    print(f"{path.relative_to(ROOT)}: {', '.join(f'{count} {what}' for what, count in counts.items())}")
