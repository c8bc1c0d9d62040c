"""Turn plans and verification reports into what people read and into files. Data in, text or JSON out; no Ansible."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Data = dict[str, Any]

_ANSI = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[PX^_][^\x1b]*(?:\x1b\\)?|[@-_])|\x9b[0-?]*[ -/]*[@-~]"
)
_SHORT_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Marks(NamedTuple):
    """The signs of a table."""

    passed: str
    failed: str
    not_run: str
    arrow: str
    dot: str


# a tick, a cross, an en dash, an arrow, a middle dot: the guide's own signs
UNICODE = Marks("\u2713", "\u2717", "\u2013", "\u2192", "\u00b7")
ASCII = Marks("+", "X", "-", "->", "|")


def marks_for(encoding: str | None) -> Marks:
    """Return signs that a terminal of this encoding can show."""
    try:
        "".join(UNICODE).encode(encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return ASCII
    return UNICODE


def plain(value: Any) -> Any:
    """Return a copy of a result in JSON's own types; what Ansible wrapped or tagged loses that."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    return "".join(str(value))


def clean(text: Any) -> str:
    """Return text that a device supplied without anything that could steer a terminal, on one line."""
    words = " ".join(_ANSI.sub("", str(text)).split())
    return "".join(char for char in words if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"))


def columns(rows: Sequence[Sequence[str]], indent: str = "  ", gap: str = "  ") -> list[str]:
    """Return rows as aligned lines; the last column is not padded."""
    if not rows:
        return []
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append((indent + gap.join(cells)).rstrip())
    return lines


# --- the plan ----------------------------------------------------------------------------------------------------


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return "?"
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _build_rows(choice: Data) -> list[list[str]]:
    """Return the rows, without the host, of what a builder builds: outcome, minutes, MB, reason."""
    rows = []
    for item in choice.get("builds") or []:
        hosts = [clean(host) for host in item.get("hosts") or []]
        why = "".join(f"; {clean(reason)}" for reason in item.get("reasons") or [])
        text = f"build: {clean(item.get('component'))} {clean(item.get('version'))} for {_some(hosts)}"
        rows.append(["wheelhouse", _number(item.get("minutes")), _number(item.get("disk_mb")), text + why])
    return rows


def plan_table(plans: Mapping[str, Data], choices: Mapping[str, Data] | None = None) -> list[str]:
    """Return what will be done, a line for each piece of work: host, outcome, reason, minutes, MB.

    Args:
        plans: host -> plan (docs/architecture.md); minutes are an estimate.
        choices: host -> what the host builds and where its wheels come from (module builders).
    """
    rows = [["host", "outcome", "min", "MB", "reason"]]
    idle, blocked = [], []
    for host, plan in plans.items():
        name, choice = clean(host), (choices or {}).get(host) or {}
        if plan.get("problems"):
            blocked.append(f"  {name}: {len(plan['problems'])} problem(s) found; see the task's message")
        work, builds = plan.get("work") or [], choice.get("builds") or []
        if plan.get("builder_only") and not builds:
            idle.append(name)
            continue
        own: list[list[str]] = []
        if not work and not builds and plan.get("outcomes"):
            own.append([", ".join(clean(item) for item in plan["outcomes"]), "0", "0", "prepared earlier"])
        elif not work and not builds:
            idle.append(name)
        for item in work:
            what, reason = clean(item.get("what") or ""), clean(item.get("reason") or "")
            source = (choice.get("waits") or {}).get(str(item.get("outcome")))
            text = f"{what}: {reason}" if what and reason else what or reason
            own.append(
                [
                    clean(item.get("outcome") or "?"),
                    _number(item.get("minutes")),
                    _number(item.get("disk_mb")),
                    f"{text}; wheel {clean(source)}" if source else text,
                ]
            )
        own += _build_rows(choice)
        rows += [[name if index == 0 else "", *row] for index, row in enumerate(own)]
        if len(own) > 1:
            minutes = sum(item.get("minutes") or 0 for item in [*work, *builds])
            size = sum(item.get("disk_mb") or 0 for item in [*work, *builds])
            rows.append(["", "together", _number(minutes), _number(size), ""])
    lines = ["PLAN"]
    if len(rows) > 1:
        lines += columns(rows)
    if idle:
        lines.append(f"  no work: {_some(idle, 8)}")
    return lines + _class_lines(plans) + blocked


def _class_lines(plans: Mapping[str, Data]) -> list[str]:
    """Return a line for each platform class: its id, as playbooks/wheelhouse.yml takes it, and whose it is."""
    hosts: dict[str, list[str]] = {}
    for host, plan in plans.items():
        if plan.get("class_id"):
            hosts.setdefault(clean(plan["class_id"]), []).append(clean(host))
    return [f"  class {name}: {_some(whose)}" for name, whose in sorted(hosts.items())]


def _some(names: Sequence[str], most: int = 3) -> str:
    """Return the first of some names, and how many more there are."""
    others = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + others


# --- verification ------------------------------------------------------------------------------------------------


def _shape(shape: Any) -> str:
    if not isinstance(shape, list):
        return ""
    return "(" + ", ".join(clean(size) for size in shape) + ")"


def _shapes(row: Data, marks: Marks) -> str:
    if not row.get("shapes_in"):
        return ""
    return f"{_shape(row['shapes_in'])} {marks.arrow} {_shape(row.get('shapes_out'))}"


def _error(row: Data) -> str:
    error, tolerance = row.get("max_error"), row.get("tolerance")
    if not isinstance(error, (int, float)) or not isinstance(tolerance, (int, float)):
        return ""
    return f"{error:.1e} / {tolerance:.1e}"


def _kernels(row: Data) -> str:
    kernels = row.get("kernels")
    return f"{clean(kernels)} kernels" if kernels else ""


def _mark(status: Any, marks: Marks) -> str:
    return {"passed": marks.passed, "failed": marks.failed}.get(str(status), marks.not_run)


def verification_table(host: str, report: Data, marks: Marks) -> list[str]:
    """Return one host's table as the guide has it, then the reasons of what failed and of what was not run."""
    components = [row for row in report.get("components") or [] if isinstance(row, dict)]
    versions = report.get("versions") or {}
    gpu = report.get("gpu") or {}
    title = [clean(host), clean(report.get("overall")).upper(), f"device {clean(report.get('device'))}"]
    if report.get("kernels") == "cpu":
        title.append("cpu kernels, no GPU was tested")
    if gpu.get("name"):
        title.append(clean(gpu["name"]))
    lines = [f" {marks.dot} ".join(title)]
    facts = [f"{name} {clean(versions[name])}" for name in versions if versions[name]]
    lines.append("  " + ", ".join([*facts, f"seed {clean(report.get('seed'))}"]))
    rows = [["", "component", "status", "dtype", "shapes", "error / allowed", "time", "kernels"]]
    for row in components:
        rows.append(
            [
                _mark(row.get("status"), marks),
                clean(row.get("component")),
                clean(row.get("status")),
                " ".join(_SHORT_DTYPES.get(name, clean(name)) for name in row.get("dtypes") or []),
                _shapes(row, marks),
                _error(row),
                f"{row['seconds']:.1f} s" if isinstance(row.get("seconds"), (int, float)) else "",
                _kernels(row),
            ]
        )
    lines += columns(rows)
    for status in ("failed", "not tested: busy", "not run"):
        lines += _reasons(components, status)
    return lines


def _reasons(components: Iterable[Data], status: str) -> list[str]:
    """Return the components of one status by reason, so that one reason for several is told once."""
    by_reason: dict[str, list[str]] = {}
    for row in components:
        if row.get("status") == status:
            by_reason.setdefault(clean(row.get("message") or "no reason given"), []).append(clean(row.get("component")))
    return [f"  {status}: {', '.join(names)}: {reason}" for reason, names in by_reason.items()]


class Outcome(NamedTuple):
    """What is known of one host at the end of a run.

    Args:
        report: the last verification report, or None.
        failed_at: the task that failed, or None.
        unreachable_at: the task at which the host could not be reached, or None.
        failed_after: whether the failure came after the report.
        check_mode: whether verification was left out by check mode.
        builder: whether the host only builds for others, so that nobody tests it.
    """

    report: Data | None = None
    failed_at: str | None = None
    unreachable_at: str | None = None
    failed_after: bool = False
    check_mode: bool = False
    builder: bool = False


def host_state(outcome: Outcome) -> tuple[str, str]:
    """Return a host's state in one word, and a sentence about it.

    States: passed, failed, busy, incomplete, not verified, builder. Only a report can say passed, and nothing
    after it may have gone wrong.
    """
    report = outcome.report
    if report is None:
        if outcome.unreachable_at is not None:
            return "not verified", f"could not be reached at task {clean(outcome.unreachable_at)!r}"
        if outcome.failed_at is not None:
            return "not verified", f"failed before verification at task {clean(outcome.failed_at)!r}"
        if outcome.builder:
            return "builder", "builds for other hosts, is not tested"
        return "not verified", "check mode runs no tests" if outcome.check_mode else "no verification was run"
    components = [row for row in report.get("components") or [] if isinstance(row, dict)]
    counts = [
        f"{sum(row.get('status') == status for row in components)} {status}"
        for status in ("passed", "failed", "not tested: busy", "not run")
        if any(row.get("status") == status for row in components)
    ]
    text = ", ".join(counts) or "no component"
    ran = any(row.get("status") == "passed" and row.get("kernels") for row in components)
    state = str(report.get("overall"))
    if state not in ("passed", "failed", "busy", "incomplete"):
        state = "incomplete"
    if state == "passed" and (not ran or any(row.get("status") == "failed" for row in components)):
        state = "incomplete"
    if report.get("kernels") == "cpu":
        text += "; cpu kernels"
    if outcome.failed_after or (outcome.unreachable_at is not None):
        state = "failed"
        what = outcome.unreachable_at if outcome.unreachable_at is not None else outcome.failed_at
        text += f"; after verification this failed: {clean(what)}"
    return state, text


def fleet_summary(outcomes: Mapping[str, Outcome], marks: Marks) -> list[str]:
    """Return one line for each host, whatever became of it, and a line of counts."""
    rows: list[list[str]] = []
    counts: dict[str, int] = {}
    for host, outcome in outcomes.items():
        state, text = host_state(outcome)
        counts[state] = counts.get(state, 0) + 1
        sign = marks.failed if outcome.failed_at is not None or outcome.unreachable_at is not None else None
        rows.append([sign or _mark(state, marks), clean(host), state, text])
    together = ", ".join(f"{number} {state}" for state, number in counts.items())
    return ["FLEET", *columns(rows), f"  {len(rows)} host(s): {together}"]


# --- files -------------------------------------------------------------------------------------------------------


def file_stem(host: str) -> str:
    """Return a file name for a host, whatever its inventory name holds."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", host).lstrip(".")[:150]
    return stem if stem and stem != "fleet" else f"host_{stem}"
