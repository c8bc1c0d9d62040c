"""What the callback keeps of task results for the reports: failures, changes, times, builds, projects."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible import context
from ansible_collections.jetson.mamba.plugins.callback import fleet_report

from tests.unit.plugins import fleet_kit
from tests.unit.plugins.test_fleet_data import faults
from tests.unit.plugins.test_fleet_report import NewResult, OldResult, Said, Stats


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Replay:
    """Feeds a callback as a run does, and reads the files that it writes."""

    def __init__(self, kind: Any, reports: Path, clock: Clock) -> None:
        self.callback = fleet_report.CallbackModule()
        self.callback._display = Said()
        self.kind, self.reports, self.clock = kind, reports, clock

    def task(self, host: str, name: str, result: dict[str, Any], seconds: float = 1.0, **more: Any) -> None:
        """Run a task on a host; more: action, role, items (result, seconds), how (ok, failed, unreachable), ignored."""
        role = more.get("role", "")
        task = SimpleNamespace(
            action=more.get("action", "ansible.builtin.command"),
            get_name=lambda: f"{role} : {name}" if role else name,
            _uuid=name,
            _role=SimpleNamespace(get_name=lambda: f"jetson.mamba.{role}") if role else None,
        )
        self.callback.v2_runner_on_start(SimpleNamespace(get_name=lambda: host), task)
        for item, item_seconds in more.get("items", []):
            self.clock.now += item_seconds
            hook = f"v2_runner_item_on_{'failed' if item.get('failed') else 'ok'}"
            getattr(self.callback, hook)(self._result(host, task, item))
        self.clock.now += seconds
        how, arguments = more.get("how", "ok"), {"ignore_errors": True} if more.get("ignored") else {}
        getattr(self.callback, f"v2_runner_on_{how}")(self._result(host, task, result), **arguments)

    def _result(self, host: str, task: Any, result: dict[str, Any]) -> Any:
        made = self.kind(host, "", result)
        if self.kind is OldResult:
            made._task = task
        else:
            made._parts = (made._parts[0], task, made._parts[2])
        return made

    def end(self, hosts: list[str], **more: Any) -> dict[str, dict[str, Any]]:
        self.callback.v2_playbook_on_stats(Stats(hosts, **more))
        assert self.callback._display.warnings == []
        (folder,) = self.reports.iterdir()
        found = {}
        for path in folder.glob("*.json"):
            document = json.loads(path.read_text())
            if path.name != "fleet.json":
                assert faults("host", document) == []
                found[document["host"]] = document
        return found


@pytest.fixture(params=[OldResult, NewResult])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Replay:
    clock = Clock()
    monkeypatch.setenv("JETSON_MAMBA_REPORTS", str(tmp_path / "reports"))
    monkeypatch.setattr(context, "CLIARGS", {"check": False})
    monkeypatch.setattr(fleet_report, "time", SimpleNamespace(monotonic=clock.monotonic, sleep=time.sleep))
    made = Replay(request.param, tmp_path / "reports", clock)
    made.task("a", "Plan", {"jetson_mamba_plan": fleet_kit.plan()}, role="jetson_platform")
    return made


def test_changes_and_times_by_role(run: Replay) -> None:
    run.task("a", "Install", {"changed": True}, 12.5, role="mamba_ssm")
    run.task("a", "Look", {"changed": False}, 2.0, role="mamba_ssm")
    run.task("a", "Try", {"changed": True, "failed": True}, 3.0, how="failed", ignored=True)
    found = run.end(["a"])["a"]
    assert found["changes"] == [
        {"role": "mamba_ssm", "task": "Install", "seconds": 12.5},
        {"role": "", "task": "Try", "seconds": 3.0},
    ]
    assert found["seconds"] == {"jetson_platform": 1.0, "mamba_ssm": 14.5, "": 3.0} and found["failure"] is None


def test_builds_of_a_loop_have_their_own_times(run: Replay) -> None:
    item = {"component": "causal_conv1d", "version": "1.6.0", "class_id": fleet_kit.CLASSES[0]}
    wheel = {"component": "causal_conv1d", "version": "1.6.0", "filename": "c.whl", "size": 5}
    items = [
        ({"changed": True, "wheel": wheel, "item": item}, 300.0),
        ({"failed": True, "msg": "no", "item": dict(item, component="mamba_ssm", version="2.2.4")}, 40.0),
    ]
    whole = {"results": [result for result, _seconds in items], "changed": True, "failed": True, "msg": "One or more"}
    more: dict[str, Any] = {"role": "wheelhouse", "action": fleet_report.BUILD, "items": items, "how": "failed"}
    run.task("a", "Build the wheels", whole, 0.5, **more)
    found = run.end(["a"], failures=["a"])["a"]
    assert [(row["component"], row["status"], row["seconds"]) for row in found["builds"]] == [
        ("causal_conv1d", "built", 300.0),
        ("mamba_ssm", "failed", 40.0),
    ]
    assert found["builds"][0]["filename"] == "c.whl" and found["builds"][0]["class_id"] == fleet_kit.CLASSES[0]
    assert found["changes"] == [{"role": "wheelhouse", "task": "Build the wheels", "seconds": 340.5}]
    assert found["failure"]["message"] == "no", "the item that failed speaks for the loop"


def test_a_build_without_loop_and_one_that_was_there(run: Replay) -> None:
    wheel = {"component": "mamba_ssm", "version": "2.2.4", "filename": "m.whl", "size": 5}
    run.task("a", "Build", {"changed": False, "wheel": wheel}, 2.0, action=fleet_report.BUILD)
    (build,) = run.end(["a"])["a"]["builds"]
    assert (build["component"], build["status"], build["seconds"]) == ("mamba_ssm", "was there already", 2.0)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"msg": "disk full\nnext: free some"}, "disk full\nnext: free some"),
        ({"msg": "", "module_stderr": "Traceback"}, "Traceback"),
        ({"censored": "hidden by no_log"}, "hidden by no_log"),
        ({"msg": ["a", "b"]}, "['a', 'b']"),
        ({}, "the task gave no message"),
    ],
)
def test_a_failure_keeps_its_message(run: Replay, result: dict[str, Any], message: str) -> None:
    run.task("a", "Install", {"failed": True, **result}, how="failed", role="mamba_ssm")
    found = run.end(["a"], failures=["a"])["a"]
    assert found["failure"] == {"task": "mamba_ssm : Install", "message": message, "problem": None}


def test_a_problem_keeps_its_three_parts(run: Replay) -> None:
    broken = {"found": "only this"}
    run.task("a", "Install", {"failed": True, "msg": "x", "problem": fleet_kit.PROBLEM}, how="failed")
    run.task("b", "Install", {"failed": True, "msg": "x", "problem": broken}, how="failed")
    found = run.end(["a", "b"], failures=["a", "b"])
    assert found["a"]["failure"]["problem"] == fleet_kit.PROBLEM and found["b"]["failure"]["problem"] is None


def test_the_first_failure_stays_and_a_later_verification_clears_it(run: Replay) -> None:
    run.task("a", "One", {"failed": True, "msg": "first"}, how="failed")
    run.task("a", "Two", {"failed": True, "msg": "second"}, how="failed")
    run.task("b", "Lost", {"unreachable": True, "msg": "no route"}, how="unreachable")
    run.task("c", "Lost", {"unreachable": True, "msg": "no route"}, how="unreachable")
    run.task("c", "Prove", {"report": fleet_kit.verification()})
    found = run.end(["a", "c"], failures=["a"], dark=["b"])
    assert found["a"]["failure"]["message"] == "first"
    assert found["b"]["failure"] == {"task": "Lost", "message": "no route", "problem": None}
    assert found["c"]["failure"] is None and found["c"]["state"] == "passed"


def test_a_rescued_failure_is_in_no_document(run: Replay) -> None:
    run.task("a", "Try", {"failed": True, "msg": "x"}, how="failed")
    assert run.end(["a"])["a"]["failure"] is None


def test_projects_that_were_looked_at(run: Replay) -> None:
    rows = [
        {"item": {"path": "/srv/vmamba"}, "msg": "VMamba: nothing to fix; 3 convolutions recognised in 1 files"},
        {"item": {"path": "/srv/gone"}, "skipped": True, "msg": "x"},
    ]
    run.task("a", "Fix", {"results": rows}, action=fleet_report.PROJECT, role="vision_mamba")
    run.task("a", "Prove", {"report": fleet_kit.verification()})
    found = run.end(["a"])["a"]
    assert found["projects"] == [{"path": "/srv/vmamba", "message": rows[0]["msg"]}]
    assert "1 project(s) examined, their models not tested" in found["scope"]


def test_a_builder_is_no_device_that_somebody_forgot_to_test(run: Replay) -> None:
    run.task("big", "Plan", {"jetson_mamba_plan": {**fleet_kit.plan(), "builder_only": True}})
    assert run.end(["a", "big"])["big"]["state"] == "builder"
