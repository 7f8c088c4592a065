"""`make ship` has DVC search one study, and adds to the lists of the params."""

import pytest

from quantstudy.errors import UserError
from tests.conftest import TINY, Project
from tools.ship import arguments_of


def test_a_study_joins_the_lists_and_only_what_is_given_changes(project: Project) -> None:
    project.edit("studies.other", TINY)
    project.edit("studies.tiny.goal", {"max_drop": 1.0})
    assert arguments_of(["--study", "tiny"]) == ["exp", "run", "-S", "ship=[tiny]", "search@tiny"]
    found = arguments_of(["--study", "other", "--max-drop", "0.5", "--may-train", "true"])
    assert found[2:-1:2] == ["-S"] * 4 and found[-1] == "search@other"
    assert found[3:-1:2] == [
        *("run=[tiny,other]", "ship=[other]"),
        *("++studies.other.goal.max_drop=0.5", "++studies.other.goal.may_train=true"),
    ]
    for wrong in ("0", "100", "nan"):
        with pytest.raises(UserError, match=r"^studies\.tiny\.goal\.max_drop: "):
            arguments_of(["--study", "tiny", "--max-drop", wrong])
    with pytest.raises(UserError, match=r"^studies\.other\.goal\.max_drop: missing"):
        arguments_of(["--study", "other", "--minimize", "latency"])
    with pytest.raises(SystemExit):  # argparse names the choices
        arguments_of(["--study", "tiny", "--may-train", "yes"])
    with pytest.raises(UserError, match="'tony' is unknown"):
        arguments_of(["--study", "tony"])
