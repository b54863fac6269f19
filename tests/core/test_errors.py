"""Messages: every case, grouped by what is wrong, each advice once."""

from __future__ import annotations

import pytest

from autoseg.core import errors
from autoseg.core.errors import MAX_SHOWN_PER_KIND, AutosegError, Problem, describe_problems


@pytest.mark.parametrize(
    "name", ["DatasetError", "PlanError", "WorkspaceError", "TrainingError", "PredictionError", "FormatError"]
)
def test_every_error_of_a_user_ends_with_exit_code_2(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, AutosegError)
    assert error.exit_code == 2


def test_a_problem_on_one_line() -> None:
    assert Problem(kind="k", case="c1", file="/f", found="3", expected="4").describe() == "c1: /f: found 3, expected 4"
    assert Problem(kind="k", file="/f").describe() == "/f"
    assert Problem(kind="k", expected="4").describe() == "expected 4"
    assert Problem(kind="k").describe() == ""


def test_equal_kinds_stand_together_with_their_advice_once() -> None:
    message = describe_problems(
        "headline",
        [
            Problem(kind="shape", case="c1", found="3", advice="crop it"),
            Problem(kind="missing", case="c2"),
            Problem(kind="shape", case="c3", found="5", advice="crop it"),
            Problem(kind="shape", case="c4", advice="pad it"),
        ],
    )
    assert message.splitlines() == [
        "headline",
        "",
        "shape (2)",
        "  - c1: found 3",
        "  - c3: found 5",
        "  What to do: crop it",
        "",
        "missing (1)",
        "  - c2",
        "",
        "shape (1)",
        "  - c4",
        "  What to do: pad it",
    ]


def test_a_long_list_is_cut_and_counted() -> None:
    n_problems = MAX_SHOWN_PER_KIND + 7
    message = describe_problems("headline", [Problem(kind="missing", case=f"c{i}") for i in range(n_problems)])
    assert f"missing ({n_problems})" in message
    assert f"- c{MAX_SHOWN_PER_KIND - 1}\n" in message
    assert f"- c{MAX_SHOWN_PER_KIND}\n" not in message
    assert message.endswith("... and 7 more")
