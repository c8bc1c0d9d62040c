"""Say before the work what will be done, and after it what was proven, per host."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ansible import context
from ansible.plugins.callback import CallbackBase
from ansible_collections.jetson.mamba.plugins.plugin_utils import fleet_data, fleet_files, report

DOCUMENTATION = r"""
name: fleet_report
type: notification
short_description: Print the plan before the work, and a verification table after it
description:
  - When all hosts have a plan (result key C(jetson_mamba_plan)), prints what will be done on each, with reason,
    expected minutes and disk space.
  - At the end, prints a verification table for each host and one line for each host of the run, whatever became of it,
    and writes all of it under C(reports/), in a folder named by the time (UTC) - as a page for any browser, as JSON
    (C(docs/schema) describes it), as JUnit XML and as CSV. The last lines name the files.
  - A run without a plan and without verification prints and writes nothing. In check mode no file is written.
  - What cannot be written is said, and costs neither the other files nor the run; its exit status tells of the devices
    alone.
requirements:
  - enabled in C(ansible.cfg) with C(callbacks_enabled = jetson.mamba.fleet_report)
notes:
  - The environment variable E(JETSON_MAMBA_REPORTS) names another folder for the reports.
author: The Jetson Mamba authors (@jetson-mamba)
"""

PLAN_KEY = "jetson_mamba_plan"
BUILDERS = "jetson.mamba.builders"
BUILD = "jetson.mamba.build_wheel"
PROJECT = "jetson.mamba.vision_project"
# what follows a plan before the work; the plan is told when something else begins
BOOKKEEPING = ("set_fact", "include_role", "include_tasks", "fail", "builders")
REPORT_KIND = "jetson.mamba.kernel_smoke_tests"
REPORTS_VARIABLE = "JETSON_MAMBA_REPORTS"


def _part(result: Any, name: str) -> Any:
    """Return a part of a task result; ansible-core before 2.19 has it with an underscore only."""
    value = getattr(type(result), name, None)
    if value is not None or name in getattr(result, "__dict__", {}):
        return getattr(result, name)
    return getattr(result, f"_{name}")


def _failure(task: str, data: Any) -> report.Data:
    """Return {task, message, problem} of a failed or unreachable result; the first failed item speaks for a loop."""
    data = data if isinstance(data, Mapping) else {}
    items = [item for item in data.get("results") or [] if isinstance(item, Mapping) and item.get("failed")]
    told = items[0] if items else data
    words = told.get("msg") or told.get("module_stderr") or told.get("stderr") or told.get("censored")
    problem = told.get("problem")
    parts = problem if isinstance(problem, Mapping) else {}
    whole = {"found", "expected", "next"} <= set(parts)
    return {
        "task": task,
        "message": report.plain(words) if isinstance(words, str) else str(words or "the task gave no message"),
        "problem": {key: str(parts[key]) for key in ("found", "expected", "next")} if whole else None,
    }


def _projects(data: Mapping[str, Any]) -> Iterator[report.Data]:
    """Yield {path, message} of the vision projects that a task looked at."""
    for row in data["results"] if isinstance(data.get("results"), list) else [data]:
        item = row.get("item")
        path = item.get("path") if isinstance(item, Mapping) else None
        if row.get("msg") and not row.get("skipped"):
            yield {"path": str(path or "a project"), "message": str(row["msg"])}


def _guarded(method: Callable[..., None]) -> Callable[..., None]:
    """Keep an error of the report from ending the run, but say it."""

    def guarded(self: CallbackModule, *args: Any, **kwargs: Any) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self._display.warning(f"fleet report: {type(error).__name__}: {report.clean(error)}")

    return guarded


class CallbackModule(CallbackBase):
    """Collects plans and verification reports; prints them."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "jetson.mamba.fleet_report"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self._plans: dict[str, report.Data] = {}
        self._choices: dict[str, report.Data] = {}
        self._unprinted: dict[str, report.Data] = {}
        self._reports: dict[str, report.Data] = {}
        self._failed: dict[str, str] = {}
        self._unreachable: dict[str, str] = {}
        self._failed_after: set[str] = set()
        self._messages: dict[str, report.Data] = {}
        self._runs: dict[str, fleet_data.HostRun] = {}
        self._began: dict[tuple[str, str], float] = {}
        self._items: dict[tuple[str, str], float] = {}
        self._started = time.monotonic()
        self._playbook = ""

    @_guarded
    def v2_playbook_on_start(self, playbook: Any) -> None:
        """Remember what is run, and since when."""
        self._started = time.monotonic()
        self._playbook = os.path.basename(str(getattr(playbook, "_file_name", "")))

    # --- what happens on hosts ---

    @_guarded
    def v2_runner_on_start(self, host: Any, task: Any) -> None:
        """Remember when a task began on a host."""
        self._began[str(host.get_name()), self._identity(task)] = time.monotonic()

    @_guarded
    def v2_runner_on_ok(self, result: Any, **kwargs: Any) -> None:
        """Keep what a task's result says of plan or verification."""
        self._note(result)
        self._collect(result)

    @_guarded
    def v2_runner_item_on_ok(self, result: Any, **kwargs: Any) -> None:
        """Keep what an item of a loop built, and how long it took."""
        self._note_build(result)

    @_guarded
    def v2_runner_item_on_failed(self, result: Any, **kwargs: Any) -> None:
        """Keep that an item of a loop could not be built."""
        self._note_build(result)

    @_guarded
    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False, **kwargs: Any) -> None:
        """Keep the first failure of a host; a failed verification brings its report."""
        self._note(result)
        had_report = self._collect(result)
        if ignore_errors:
            return
        host = self._host(result)
        if host not in self._failed:
            self._failed[host] = self._task(result)
            self._messages.setdefault(host, _failure(self._task(result), _part(result, "result")))
            # whatever follows a failed verification fails because of it, and its report says why
            if host in self._reports and not had_report and self._reports[host].get("overall") != "failed":
                self._failed_after.add(host)

    @_guarded
    def v2_runner_on_unreachable(self, result: Any, **kwargs: Any) -> None:
        """Keep where a host was lost."""
        host = self._host(result)
        if host not in self._unreachable:
            self._unreachable[host] = self._task(result)
            self._messages[host] = _failure(self._task(result), _part(result, "result"))

    # --- when to print ---

    @_guarded
    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool = False, **kwargs: Any) -> None:
        """Every host has finished the task before: print the plans that came of it."""
        if str(getattr(task, "action", "")).rpartition(".")[2] not in BOOKKEEPING:
            self._print_plans()

    @_guarded
    def v2_playbook_on_play_start(self, play: Any) -> None:
        """The same, where a plan was a play's last task."""
        self._print_plans()

    @_guarded
    def v2_playbook_on_stats(self, stats: Any) -> None:
        """Print the tables and write the files."""
        self._print_plans()
        if not self._plans and not self._reports:
            return
        outcomes = self._outcomes(stats)
        marks = report.marks_for(getattr(sys.stdout, "encoding", None))
        lines = []
        if self._reports:
            lines += ["", "VERIFICATION"]
            for host in sorted(self._reports):
                lines += [*report.verification_table(host, self._reports[host], marks), ""]
        else:
            lines.append("")
        self._show(lines + report.fleet_summary(outcomes, marks))
        hosts = {host: self._host_run(host, outcome) for host, outcome in outcomes.items()}
        fleet, documents = fleet_data.documents(self._whole_run(hosts))
        self._show([f"  {number} host(s): {words}" for number, words in fleet_data.proven(fleet)])
        if not context.CLIARGS.get("check", False):
            self._write(fleet, documents)

    # --- parts ---

    @staticmethod
    def _host(result: Any) -> str:
        return str(_part(result, "host").get_name())

    @staticmethod
    def _task(result: Any) -> str:
        task = _part(result, "task")
        return str(task.get_name() if hasattr(task, "get_name") else task)

    @staticmethod
    def _identity(task: Any) -> str:
        return str(getattr(task, "_uuid", "") or task)

    @staticmethod
    def _role(result: Any) -> str:
        """Return the role that a task is of, without its collection, or nothing."""
        role = getattr(_part(result, "task"), "_role", None)
        return str(role.get_name()).rpartition(".")[2] if role is not None else ""

    @staticmethod
    def _action(result: Any) -> str:
        return str(getattr(_part(result, "task"), "action", ""))

    def _run_of(self, host: str) -> fleet_data.HostRun:
        return self._runs.setdefault(host, fleet_data.HostRun())

    def _since(self, result: Any) -> float:
        """Return the seconds since the task, or its last item, began on the host; later items count from here."""
        key, now = (self._host(result), self._identity(_part(result, "task"))), time.monotonic()
        began, self._began[key] = self._began.get(key, now), now
        return round(now - began, 2)

    def _note(self, result: Any) -> None:
        """Keep what a task changed, and how long it took."""
        key = (self._host(result), self._identity(_part(result, "task")))
        run, role, data = self._run_of(key[0]), self._role(result), _part(result, "result")
        looped = isinstance(data, Mapping) and isinstance(data.get("results"), list)
        if self._action(result) == BUILD and not looped:
            self._note_build(result)
        whole = self._items.pop(key, 0.0) + self._since(result)
        self._began.pop(key, None)
        run.seconds[role] = round(run.seconds.get(role, 0.0) + whole, 2)
        if not isinstance(data, Mapping):
            return
        if data.get("changed") is True:
            name = self._task(result)
            run.changes.append({"role": role, "task": name.removeprefix(f"{role} : "), "seconds": round(whole, 2)})
        if self._action(result) == PROJECT:
            run.projects += list(_projects(data))

    def _note_build(self, result: Any) -> None:
        """Keep a build that a host did, followed or failed at; seconds are from its start to its wheel."""
        if self._action(result) != BUILD:
            return
        key, seconds = (self._host(result), self._identity(_part(result, "task"))), self._since(result)
        self._items[key] = self._items.get(key, 0.0) + seconds
        data = report.plain(_part(result, "result"))
        wheel, item = data.get("wheel") or {}, data.get("item")
        asked = item if isinstance(item, dict) else (data.get("invocation") or {}).get("module_args") or {}
        built = {True: "built", False: "was there already"}[data.get("changed") is True]
        self._run_of(key[0]).builds.append(
            {
                "component": str(wheel.get("component") or asked.get("component") or "?"),
                "version": str(wheel.get("version") or asked.get("version") or ""),
                "class_id": asked.get("class_id"),
                "status": "failed" if data.get("failed") else built,
                "seconds": seconds,
                "filename": wheel.get("filename"),
                "size": wheel.get("size"),
            }
        )

    def _collect(self, result: Any) -> bool:
        data = _part(result, "result")
        if not isinstance(data, dict):
            return False
        host = self._host(result)
        if getattr(_part(result, "task"), "action", "") == BUILDERS and isinstance(data.get("hosts"), dict):
            self._choices.update(report.plain(data["hosts"]))
        plan = data.get(PLAN_KEY)
        if isinstance(plan, dict):
            self._plans[host] = report.plain(plan)
            if data.get("purpose") != "verify":  # a run that only verifies does none of the plan's work
                self._unprinted[host] = self._plans[host]
        found = data.get("report")
        if isinstance(found, dict) and found.get("kind") == REPORT_KIND:
            self._reports[host] = report.plain(found)
            # a host that answers again was not lost for good, whatever came before was overcome
            self._failed_after.discard(host)
            self._failed.pop(host, None)
            self._unreachable.pop(host, None)
            self._messages.pop(host, None)
            return True
        return False

    def _print_plans(self) -> None:
        if not self._unprinted:
            return
        plans, self._unprinted = dict(sorted(self._unprinted.items())), {}
        self._show(["", *report.plan_table(plans, self._choices)])

    def _outcomes(self, stats: Any) -> dict[str, report.Outcome]:
        # a failure that was rescued is none
        failed = {host for host in self._failed if stats.failures.get(host)}
        hosts = {*stats.processed, *stats.dark, *self._plans, *self._reports}
        touched = {*self._plans, *self._reports, *failed, *self._unreachable}
        check = bool(context.CLIARGS.get("check", False))
        # the controller's own plays (localhost) are no device
        return {
            host: report.Outcome(
                report=self._reports.get(host),
                failed_at=self._failed[host] if host in failed else None,
                unreachable_at=self._unreachable.get(host),
                failed_after=host in failed and host in self._failed_after,
                check_mode=check,
                builder=bool((self._plans.get(host) or {}).get("builder_only")),
            )
            for host in sorted(hosts)
            if host in touched or host != "localhost"
        }

    def _host_run(self, host: str, outcome: report.Outcome) -> fleet_data.HostRun:
        """Return all that is known of a host."""
        run = self._run_of(host)
        run.outcome, run.plan, run.choice = outcome, self._plans.get(host), self._choices.get(host)
        known = outcome.failed_at is not None or outcome.unreachable_at is not None
        run.failure = self._messages.get(host) if known else None
        return run

    def _whole_run(self, hosts: dict[str, fleet_data.HostRun]) -> fleet_data.Run:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return fleet_data.Run(now, round(time.monotonic() - self._started, 1), self._playbook, hosts)

    def _write(self, fleet: report.Data, hosts: list[report.Data]) -> None:
        base = Path(os.environ.get(REPORTS_VARIABLE) or "reports").expanduser()
        written = fleet_files.write(fleet, hosts, base, REPORTS_VARIABLE)
        for trouble in written.troubles:
            self._display.warning(f"fleet report: {report.clean(trouble)}")
        self._show(written.lines)

    def _show(self, lines: list[str]) -> None:
        self._display.display("\n".join(lines))
