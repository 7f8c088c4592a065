"""Print the DAG of the present params as a Mermaid flowchart, with one box per kind of stage."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import networkx
from dvc.repo import Repo


def flowchart(stages: Iterable[Any], edges: Iterable[tuple[Any, Any]]) -> str:
    """Return the flowchart of stages and edges; an edge leads from a stage to a stage that it reads from.

    A box shows the number of its stages if there are several. An arrow that a longer path implies is left out.
    """
    cells = Counter(map(_kind, stages))
    kinds = networkx.DiGraph((_kind(read), _kind(stage)) for stage, read in edges)
    boxes = [f'  {kind}["{kind}{f" × {count}" if count > 1 else ""}"]' for kind, count in cells.items()]  # noqa: RUF001
    arrows = [f"  {read} --> {kind}" for read, kind in networkx.transitive_reduction(kinds).edges]
    return "\n".join(["flowchart LR", *sorted(boxes), *sorted(arrows)])


def _kind(stage: Any) -> str:
    return stage.name.partition("@")[0]


if __name__ == "__main__":
    with Repo() as repo:
        print(flowchart(repo.index.graph.nodes, repo.index.graph.edges))
