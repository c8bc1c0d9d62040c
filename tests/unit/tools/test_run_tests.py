"""tools/run_tests.py: order, counts, and that silence is not success."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import tools.run_tests as run_tests
from tools.run_tests import Counts, Stage

LINT = Stage("lint", ["lint"], "1 s", quick=True)
UNIT = Stage("unit", ["python", "-m", "pytest", "tests/unit"], "1 s", quick=True)
SLOW = Stage("e2e", ["python", "-m", "pytest", "tests/e2e"], "1 s")


def runner(statuses: dict[str, int], junit: str | None) -> tuple[Callable[[Sequence[str]], int], list[str]]:
    """Return a stand-in for run_command that writes `junit` where asked, and the list of what it ran."""
    ran: list[str] = []

    def run(argv: Sequence[str]) -> int:
        report = next((word.partition("=")[2] for word in argv if word.startswith("--junitxml=")), None)
        name = Path(report).stem if report else argv[0]
        ran.append(name)
        if report and junit is not None:
            Path(report).write_text(junit)
        return statuses.get(name, 0)

    return run, ran


def junit(tests: int, failures: int = 0, errors: int = 0, skipped: int = 0) -> str:
    return (
        f'<testsuites><testsuite tests="{tests}" failures="{failures}" errors="{errors}" skipped="{skipped}"/>'
        "</testsuites>"
    )


def test_counts_are_added_up_and_end_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    run, ran = runner({}, junit(10, skipped=2))
    assert run_tests.run_stages([LINT, UNIT, SLOW], run) == Counts(17, 0, 4)
    assert ran == ["lint", "unit", "e2e"]
    assert capsys.readouterr().out.splitlines()[-1] == "17 passed, 0 failed, 4 skipped"


def test_a_quick_failure_still_runs_the_quick_ones_and_spares_the_slow(capsys: pytest.CaptureFixture[str]) -> None:
    run, ran = runner({"lint": 2}, junit(10))
    assert run_tests.run_stages([LINT, UNIT, SLOW], run).failed == 1
    assert ran == ["lint", "unit"]
    assert "e2e        not run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "report", "failed"),
    [
        (1, junit(3, failures=1, errors=1), 2),
        (5, junit(0), 1),  # pytest found no test
        (0, junit(2, skipped=2), 1),  # all were skipped
        (4, None, 1),  # pytest did not start
        (3, junit(3), 1),  # all passed, then pytest itself broke
    ],
)
def test_a_stage_fails_unless_tests_passed(status: int, report: str | None, failed: int) -> None:
    run, _ = runner({"e2e": status}, report)
    assert run_tests.run_stages([SLOW], run).failed == failed


def test_stages_are_chosen_by_name_in_their_own_order() -> None:
    assert [stage.name for stage in run_tests.choose(["unit", "lint"])] == ["lint", "unit"]
    assert run_tests.choose([]) == list(run_tests.STAGES)


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(SystemExit, match="stage e3e"):
        run_tests.choose(["e3e"])


def test_every_stage_of_ci_says_how_long_it_takes() -> None:
    assert [stage.name for stage in run_tests.STAGES] == ["lint", "unit", "prepare", "e2e", "molecule"]
    assert all(stage.expected for stage in run_tests.STAGES)
