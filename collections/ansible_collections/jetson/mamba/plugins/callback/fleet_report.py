"""Say before the work what will be done, and after it what was proven, per host."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ansible import context
from ansible.plugins.callback import CallbackBase
from ansible_collections.jetson.mamba.plugins.plugin_utils import report

DOCUMENTATION = r"""
name: fleet_report
type: notification
short_description: Print the plan before the work, and a verification table after it
description:
  - When all hosts have a plan (result key C(jetson_mamba_plan)), prints what will be done on each, with reason,
    expected minutes and disk space.
  - At the end, prints a verification table for each host and one line for each host of the run, whatever became of it,
    and writes the same as JSON under C(reports/), in a folder named by the time (UTC).
  - A run without a plan and without verification prints and writes nothing. In check mode no file is written.
requirements:
  - enabled in C(ansible.cfg) with C(callbacks_enabled = jetson.mamba.fleet_report)
notes:
  - The environment variable E(JETSON_MAMBA_REPORTS) names another folder for the reports.
author: The Jetson Mamba authors (@jetson-mamba)
"""

PLAN_KEY = "jetson_mamba_plan"
BUILDERS = "jetson.mamba.builders"
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

    # --- what happens on hosts ---

    @_guarded
    def v2_runner_on_ok(self, result: Any, **kwargs: Any) -> None:
        """Keep what a task's result says of plan or verification."""
        self._collect(result)

    @_guarded
    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False, **kwargs: Any) -> None:
        """Keep the first failure of a host; a failed verification brings its report."""
        had_report = self._collect(result)
        if ignore_errors:
            return
        host = self._host(result)
        if host not in self._failed:
            self._failed[host] = self._task(result)
            # whatever follows a failed verification fails because of it, and its report says why
            if host in self._reports and not had_report and self._reports[host].get("overall") != "failed":
                self._failed_after.add(host)

    @_guarded
    def v2_runner_on_unreachable(self, result: Any, **kwargs: Any) -> None:
        """Keep where a host was lost."""
        self._unreachable.setdefault(self._host(result), self._task(result))

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
        if not context.CLIARGS.get("check", False):
            self._write(outcomes)

    # --- parts ---

    @staticmethod
    def _host(result: Any) -> str:
        return str(_part(result, "host").get_name())

    @staticmethod
    def _task(result: Any) -> str:
        task = _part(result, "task")
        return str(task.get_name() if hasattr(task, "get_name") else task)

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
            )
            for host in sorted(hosts)
            if host in touched or host != "localhost"
        }

    def _write(self, outcomes: dict[str, report.Outcome]) -> None:
        now = datetime.now(timezone.utc)
        base = Path(os.environ.get(REPORTS_VARIABLE) or "reports").expanduser()
        folder = base / now.strftime("%Y%m%dT%H%M%SZ")
        number = 1
        while folder.exists():  # two runs in one second
            number += 1
            folder = base / f"{now.strftime('%Y%m%dT%H%M%SZ')}-{number}"
        report.write_reports(folder, outcomes, self._plans, now.isoformat(timespec="seconds"))
        self._show([f"  reports: {folder}"])

    def _show(self, lines: list[str]) -> None:
        self._display.display("\n".join(lines))
