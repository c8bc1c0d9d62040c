"""Run the test stages in order, say how long each takes, and end with one line of counts.

    python tools/run_tests.py [STAGE …]

The quick stages always run all; a failure among them saves the time of the slow ones. A stage that finds no test has
failed: silence is not success.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Stage:
    """One stage of the tests.

    Args:
        name: as typed on the command line.
        argv: the command; a pytest command is given --junitxml, so that its tests can be counted.
        expected: how long it takes on two cores.
        quick: runs even though another stage has failed.
    """

    name: str
    argv: Sequence[str]
    expected: str
    quick: bool = False

    @property
    def is_pytest(self) -> bool:
        return "pytest" in self.argv


@dataclass
class Counts:
    """How many checks passed, failed and were skipped."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def add(self, other: Counts) -> None:
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


PYTHON = sys.executable
STAGES: Sequence[Stage] = (
    Stage("lint", ["make", "--no-print-directory", "lint"], "1 to 2 minutes", quick=True),
    Stage("unit", [PYTHON, "-m", "pytest", "tests/unit"], "2 to 3 minutes", quick=True),
    Stage("prepare", [PYTHON, "tools/provision.py", "prepare"], "10 minutes the first time, then seconds"),
    Stage("e2e", [PYTHON, "-m", "pytest", "tests/e2e", "-v", "--durations=15"], "20 minutes"),
    Stage("molecule", [PYTHON, "tools/provision.py", "molecule"], "6 minutes"),
)

RunCommand = Callable[[Sequence[str]], int]


def run_command(argv: Sequence[str]) -> int:
    """Run a command in the repository root, its output going where ours goes; return its exit status."""
    return subprocess.run(argv, cwd=ROOT, check=False).returncode


def run_stage(stage: Stage, run: RunCommand, scratch: Path) -> Counts:
    """Run one stage and count its checks; a stage other than pytest is one check."""
    if not stage.is_pytest:
        return Counts(passed=1) if run(stage.argv) == 0 else Counts(failed=1)
    report = scratch / f"{stage.name}.xml"
    status = run([*stage.argv, f"--junitxml={report}"])
    counts = read_junit(report) if report.exists() else Counts()
    if counts.failed == 0 and (status != 0 or counts.passed == 0):
        counts.failed = 1
    return counts


def read_junit(report: Path) -> Counts:
    """Return the counts of a JUnit report."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))

    def total(key: str) -> int:
        return sum(int(suite.get(key, "0")) for suite in suites)

    failed, skipped = total("failures") + total("errors"), total("skipped")
    return Counts(passed=max(total("tests") - failed - skipped, 0), failed=failed, skipped=skipped)


def run_stages(stages: Sequence[Stage], run: RunCommand, clock: Callable[[], float] = time.monotonic) -> Counts:
    """Run the stages in order and print what a person waits for.

    Returns:
        the counts of all; slow stages that did not run because of a failure are not in them.
    """
    counts = Counts()
    lines = []
    with tempfile.TemporaryDirectory(prefix="jetson-mamba-tests-") as scratch:
        for number, stage in enumerate(stages, start=1):
            if counts.failed and not stage.quick:
                lines.append(f"{stage.name:<10} not run: an earlier stage failed")
                continue
            print(f"==> stage {number} of {len(stages)}: {stage.name} ({stage.expected})", flush=True)
            start = clock()
            result = run_stage(stage, run, Path(scratch))
            lines.append(f"{stage.name:<10} {clock() - start:6.0f} s  {result}")
            counts.add(result)
    print("==> stages", *lines, sep="\n    ")
    print(counts, flush=True)
    return counts


def choose(names: Sequence[str], stages: Sequence[Stage] = STAGES) -> list[Stage]:
    """Return the named stages in their own order, all when none is named; exit with a message for an unknown name."""
    known: Mapping[str, Stage] = {stage.name: stage for stage in stages}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(
            f"found:    stage {', '.join(unknown)}\n"
            f"expected: some of {', '.join(known)}\n"
            "next:     make test STAGES='lint unit'"
        )
    return [stage for stage in stages if not names or stage.name in names]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; return 0 when nothing failed."""
    stages = choose(sys.argv[1:] if argv is None else argv)
    print("==> tests: " + ", ".join(f"{stage.name} ({stage.expected})" for stage in stages), flush=True)
    return 1 if run_stages(stages, run_command).failed else 0


if __name__ == "__main__":
    sys.exit(main())
