"""What a run learned of its hosts, as the documents that every report is made of (docs/schema). Data in, data out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ansible_collections.jetson.mamba.plugins.module_utils.passwords import without_passwords
from ansible_collections.jetson.mamba.plugins.plugin_utils import report

SCHEMA = 1
Data = dict[str, Any]

PASSED, FAILED, NOT_RUN, BUSY = "passed", "failed", "not run", "not tested: busy"
STATUSES = (FAILED, BUSY, NOT_RUN, PASSED)
# the worst first, as tables and counts name them
STATES = ("failed", "not verified", "busy", "incomplete", "builder", "passed")


@dataclass
class HostRun:
    """What a run learned of one host.

    Args:
        outcome: how it ended.
        plan: the plan fact, or None.
        choice: what the host builds and where its wheels come from (module builders), or None.
        failure: {task, message, problem} of the first failure or of the loss of the host, or None.
        changes: {role, task, seconds} of each task that changed something; seconds as the controller saw it.
        seconds: role -> seconds that its tasks took, as the controller saw it.
        builds: {component, version, class_id, seconds, built, filename, size} of each wheel that it was asked to build.
        projects: {path, message} of each vision project that was looked at.
    """

    outcome: report.Outcome = field(default_factory=report.Outcome)
    plan: Data | None = None
    choice: Data | None = None
    failure: Data | None = None
    changes: list[Data] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    builds: list[Data] = field(default_factory=list)
    projects: list[Data] = field(default_factory=list)


@dataclass
class Run:
    """A whole run.

    Args:
        made_at: UTC time of its end, ISO 8601.
        seconds: how long it took, or None.
        playbook: its file's name, or "".
        hosts: host -> what was learned.
    """

    made_at: str
    seconds: float | None = None
    playbook: str = ""
    hosts: Mapping[str, HostRun] = field(default_factory=dict)


def scope_of(state: str, host: HostRun) -> str:
    """Return what a host's state says about kernels and about the user's projects, in words."""
    if state == "builder":
        return "nothing is tested on a builder"
    kind = "cpu kernels" if (host.outcome.report or {}).get("kernels") == "cpu" else "kernels"
    why = "" if state == "not verified" else f": {state}"
    kernels = f"{kind} verified" if state == "passed" else f"{kind} not verified{why}"
    if not host.projects:
        return f"{kernels}, projects not tested"
    return f"{kernels}, sources of {len(host.projects)} project(s) examined, their models not tested"


def proven(fleet: Data) -> list[tuple[int, str]]:
    """Return on how many hosts what was verified, and what was not: (number, words)."""
    scopes: dict[str, int] = {}
    for row in fleet["hosts"].values():
        if row["state"] == "passed":
            scopes[row["scope"]] = scopes.get(row["scope"], 0) + 1
    return [(number, words) for words, number in scopes.items()]


def documents(run: Run) -> tuple[Data, list[Data]]:
    """Return the document of the fleet and one for each host, without any password of a URL."""
    hosts: list[Data] = []
    taken = {"fleet"}
    fleet: Data = {
        "schema": SCHEMA,
        "made_at": run.made_at,
        "seconds": run.seconds,
        "playbook": run.playbook,
        "counts": {},
        "hosts": {},
    }
    for name, host in run.hosts.items():
        document = _host_document(name, host, run.made_at)
        stem = report.file_stem(name)
        while stem.lower() in taken:  # some file systems take no notice of case
            stem += "_"
        taken.add(stem.lower())
        hosts.append(document)
        state = document["state"]
        fleet["counts"][state] = fleet["counts"].get(state, 0) + 1
        fleet["hosts"][name] = {
            "state": state,
            "summary": document["summary"],
            "scope": document["scope"],
            "class_id": (host.plan or {}).get("class_id"),
            "changes": len(host.changes),
            "file": f"{stem}.json",
        }
    return without_passwords(fleet), [_finite(without_passwords(host)) for host in hosts]


def _finite(value: Any) -> Any:
    """Return a copy of plain data in which what is no number (NaN, infinity) is null; JSON knows neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _host_document(name: str, host: HostRun, made_at: str) -> Data:
    state, summary = report.host_state(host.outcome)
    task = host.outcome.unreachable_at if host.outcome.unreachable_at is not None else host.outcome.failed_at
    failure = host.failure
    if failure is None and task is not None:
        failure = {"task": task, "message": "the task gave no message", "problem": None}
    return {
        "schema": SCHEMA,
        "made_at": made_at,
        "host": name,
        "state": state,
        "summary": summary,
        "scope": scope_of(state, host),
        "failed_at": host.outcome.failed_at,
        "unreachable_at": host.outcome.unreachable_at,
        "failed_after": host.outcome.failed_after,
        "failure": failure,
        "changes": host.changes,
        "seconds": host.seconds,
        "builds": host.builds,
        "projects": host.projects,
        "choice": host.choice,
        "plan": host.plan,
        "verification": host.outcome.report,
    }


def components(document: Data) -> list[Data]:
    """Return the component rows of a host's verification; none where nothing was verified."""
    rows = (document.get("verification") or {}).get("components") or []
    return [row for row in rows if isinstance(row, dict)]


def failures(document: Data) -> Iterator[Data]:
    """Yield what went wrong on a host, {kind, title, message, problem}, its cause first.

    Kinds: unreachable, task, component. The task that turns a failed verification into a failed host is left out,
    because the components say why.
    """
    failure = document.get("failure")
    verified = document.get("verification") is not None
    own = failure is not None and (not verified or document["failed_after"] or document["unreachable_at"] is not None)
    task: Data = {}
    if failure is not None and own:
        lost = document["unreachable_at"] is not None and failure["task"] == document["unreachable_at"]
        task = {
            "kind": "unreachable" if lost else "task",
            "title": failure["task"],
            "message": failure["message"],
            "problem": failure["problem"],
        }
    if task and not verified:
        yield task
    for row in components(document):
        if row.get("status") == FAILED:
            yield {
                "kind": "component",
                "title": str(row.get("component")),
                "message": str(row.get("message") or "no reason given"),
                "problem": None,
            }
    if task and verified:
        yield task
