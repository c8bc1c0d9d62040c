"""Make the fleet report: one HTML file without any network, out of the documents of a run (fleet_data)."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.jetson.mamba.plugins.module_utils.smoke_components import SHORT
from ansible_collections.jetson.mamba.plugins.plugin_utils import fleet_data, report
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

Data = dict[str, Any]

ASSETS = Path(__file__).with_name("page")
TEMPLATE, STYLE, SCRIPT = "fleet.html.j2", "fleet.css", "fleet.js"
# status or state -> letter of its style, sign
LOOKS = {
    "passed": ("p", "\u2713"),
    "failed": ("f", "\u2717"),
    "not tested: busy": ("b", "\u2016"),
    "busy": ("b", "\u2016"),
    "not run": ("n", "\u2013"),
    "incomplete": ("n", "~"),
    "not verified": ("v", "?"),
    "builder": ("n", "#"),
}
UNKNOWN = ("v", "?")
# numbers differ from host to host where the trouble is the same
_NUMBER = re.compile(r"\d[\d.]*(?:e[+-]?\d+)?")
_MOST_LINKS = 12


def render(fleet: Data, hosts: Sequence[Data]) -> str:
    """Return the page.

    It loads nothing: its policy forbids every connection, and allows the one style and the one script inside by their
    hashes, so that text which a device supplied could not run even if it were not escaped.

    Args:
        fleet: the document of the fleet.
        hosts: those of its hosts (fleet_data.documents).
    """
    style, script = ((ASSETS / name).read_text(encoding="utf-8") for name in (STYLE, SCRIPT))
    return _template().render(
        view(fleet, hosts),
        style=style,
        script=script,
        policy=f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; "
        "base-uri 'none'; form-action 'none'",
    )


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(TEMPLATE)


def _digest(text: str) -> str:
    """Return a source expression that allows exactly this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


def tidy(value: Any) -> Any:
    """Return a copy of plain data whose texts hold no control characters and no direction marks; lines stay."""
    if isinstance(value, dict):
        return {tidy(key): tidy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [tidy(item) for item in value]
    if not isinstance(value, str) or (value.isascii() and value.isprintable()):
        return value
    return "\n".join(report.clean(line) for line in value.splitlines())


def duration(seconds: Any) -> str:
    """Return seconds as people say them."""
    if not isinstance(seconds, (int, float)):
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# --- what the template shows -------------------------------------------------------------------------------------


def view(fleet: Data, hosts: Sequence[Data]) -> Data:
    """Return all that the template shows; the template itself decides nothing."""
    anchors = {name: f"host-{row['file'][: -len('.json')]}" for name, row in fleet["hosts"].items()}
    classes = _classes(hosts)
    labels = {row["id"]: row["label"] for row in classes}
    names: dict[str, None] = {}
    for document in hosts:
        names.update(dict.fromkeys(str(row.get("component")) for row in fleet_data.components(document)))
    devices = [_device(document, anchors[document["host"]], labels, tuple(names)) for document in _worst_first(hosts)]
    for device, before, after in zip(devices, [None, *devices[:-1]], [*devices[1:], None], strict=True):
        device["before"], device["after"] = before and before["anchor"], after and after["anchor"]
    counts = [
        {"state": state, "look": LOOKS[state][0], "sign": LOOKS[state][1], "number": fleet["counts"][state]}
        for state in fleet_data.STATES
        if fleet["counts"].get(state)
    ]
    verified = any(fleet_data.components(document) for document in hosts)
    return {
        "title": _title(fleet),
        "made_at": fleet["made_at"].replace("T", " ").replace("+00:00", " UTC"),
        "playbook": tidy(fleet["playbook"]),
        "took": duration(fleet["seconds"]),
        "number": len(hosts),
        "counts": counts,
        "verified": verified,
        "scopes": fleet_data.proven(fleet),
        "on_cpu": _many(cpu, "host") if (cpu := sum(map(_on_cpu, hosts))) else "",
        "failures": _failure_groups(hosts, anchors),
        "open": _open_groups(hosts, anchors),
        "names": [tidy(name) for name in names],
        "classes": tidy(classes),
        "devices": devices,
        "builds": _builds(hosts, labels, anchors),
        "times": _times(hosts, anchors),
        "not_run": _not_run_groups(hosts),
    }


def _title(fleet: Data) -> str:
    number = len(fleet["hosts"])
    return f"{_many(number, 'host')}: {_count_states(fleet['counts'])}" if number else "no host"


def _count_states(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[state]} {state}" for state in fleet_data.STATES if counts.get(state))


def _on_cpu(document: Data) -> bool:
    return (document.get("verification") or {}).get("kernels") == "cpu"


def _worst_first(hosts: Sequence[Data]) -> list[Data]:
    def rank(document: Data) -> tuple[int, list[tuple[bool, int, str]]]:
        state = document["state"]
        parts = re.split(r"(\d+)", document["host"])  # host-9 before host-10
        natural = [(part.isdigit(), int(part) if part.isdecimal() else 0, part) for part in parts]
        return fleet_data.STATES.index(state) if state in fleet_data.STATES else len(fleet_data.STATES), natural

    return sorted(hosts, key=rank)


def _links(hosts: Iterable[str], anchors: Mapping[str, str]) -> list[Data]:
    return [{"host": tidy(host), "anchor": anchors[host]} for host in hosts]


def _split(links: list[Data]) -> Data:
    return {"number": len(links), "first": links[:_MOST_LINKS], "rest": links[_MOST_LINKS:]}


def _failure_groups(hosts: Sequence[Data], anchors: Mapping[str, str]) -> list[Data]:
    """Return what went wrong, the same trouble of several hosts once, whole hosts before components."""
    groups: dict[tuple[str, str, str], tuple[Data, list[str], set[str]]] = {}
    for document in hosts:
        for item in fleet_data.failures(document):
            key = (item["kind"], item["title"], _NUMBER.sub("#", item["message"].replace(document["host"], "#")))
            _item, names, messages = groups.setdefault(key, (item, [], set()))
            names.append(document["host"])
            messages.add(item["message"])
    order = ("unreachable", "task", "component")
    labels = {"unreachable": "could not be reached", "task": "task failed", "component": "component failed"}
    rows = []
    for item, names, messages in sorted(groups.values(), key=lambda group: order.index(group[0]["kind"])):
        row = tidy(item)
        row.update(label=labels[item["kind"]], hosts=_split(_links(names, anchors)))
        row["example"] = tidy(names[0]) if len(messages) > 1 else ""
        rows.append(row)
    return rows


def _open_groups(hosts: Sequence[Data], anchors: Mapping[str, str]) -> list[Data]:
    """Return hosts of which nothing is proven though nothing is known to be wrong, by state and reason."""
    groups: dict[tuple[str, str], tuple[str, list[str]]] = {}
    for document in hosts:
        state = document["state"]
        if state in ("passed", "failed") or any(fleet_data.failures(document)):
            continue
        busy = [row for row in fleet_data.components(document) if row.get("status") == fleet_data.BUSY]
        reason = str(busy[0].get("message")) if busy else document["summary"]
        groups.setdefault((state, _NUMBER.sub("#", reason)), (reason, []))[1].append(document["host"])
    return [
        {
            "state": state,
            "look": LOOKS.get(state, UNKNOWN)[0],
            "sign": LOOKS.get(state, UNKNOWN)[1],
            "message": tidy(reason),
            "hosts": _split(_links(names, anchors)),
        }
        for (state, _key), (reason, names) in sorted(
            groups.items(), key=lambda item: fleet_data.STATES.index(item[0][0])
        )
    ]


def _not_run_groups(hosts: Sequence[Data]) -> list[Data]:
    """Return why components were not run, each reason once: {message, components, number of hosts}."""
    groups: dict[str, tuple[dict[str, None], set[str]]] = {}
    for document in hosts:
        for row in fleet_data.components(document):
            if row.get("status") == fleet_data.NOT_RUN:
                names, whose = groups.setdefault(str(row.get("message") or "no reason given"), ({}, set()))
                names[str(row.get("component"))] = None
                whose.add(document["host"])
    return [
        {"message": tidy(message), "components": ", ".join(map(tidy, names)), "hosts": _many(len(whose), "host")}
        for message, (names, whose) in groups.items()
    ]


def _classes(hosts: Sequence[Data]) -> list[Data]:
    """Return the platform classes of the fleet, each with a short label for the matrix."""
    rows: dict[str, Data] = {}
    for document in hosts:
        plan = document.get("plan") or {}
        if not plan.get("class_id"):
            continue
        platform = plan.get("platform") or {}
        row = rows.setdefault(str(plan["class_id"]), {"platforms": set(), "l4t": set(), "states": {}, "number": 0})
        row["number"] += 1
        row["platforms"].add(" ".join(str(platform[key]) for key in ("id",) if platform.get(key)))
        if plan.get("l4t"):
            row["l4t"].add(str(plan["l4t"]))
        row["states"][document["state"]] = row["states"].get(document["state"], 0) + 1
    return [
        {
            "id": name,
            "label": _label(index),
            "number": row["number"],
            "platforms": ", ".join(sorted(filter(None, row["platforms"]))),
            "l4t": ", ".join(sorted(row["l4t"])),
            "states": _count_states(row["states"]),
        }
        for index, (name, row) in enumerate(sorted(rows.items()))
    ]


def _label(index: int) -> str:
    """Return A to Z, then A1 to Z1, and so on."""
    return chr(ord("A") + index % 26) + (str(index // 26) if index >= 26 else "")


def _builds(hosts: Sequence[Data], labels: Mapping[str, str], anchors: Mapping[str, str]) -> list[Data]:
    return [
        {
            "what": tidy(f"{build['component']} {build['version']}"),
            "label": labels.get(str(build.get("class_id")), ""),
            "host": tidy(document["host"]),
            "anchor": anchors[document["host"]],
            "status": build["status"],
            "seconds": build["seconds"],
            "took": duration(build["seconds"]),
            "size": f"{build['size'] / 1e6:.1f} MB" if isinstance(build.get("size"), (int, float)) else "",
            "filename": tidy(build.get("filename") or ""),
        }
        for document in hosts
        for build in document["builds"]
    ]


def _times(hosts: Sequence[Data], anchors: Mapping[str, str]) -> list[Data]:
    """Return, for each role that changed something, how long its tasks took on the hosts that it changed."""
    spans: dict[str, list[tuple[float, str]]] = {}
    for document in hosts:
        for role in dict.fromkeys(change["role"] for change in document["changes"]):
            spans.setdefault(role, []).append((document["seconds"].get(role, 0.0), document["host"]))
    rows = []
    for role, found in spans.items():
        longest = max(found)
        rows.append(
            {
                "role": tidy(role) or "tasks of no role",
                "number": len(found),
                "least": duration(min(found)[0]),
                "median": duration(statistics.median(seconds for seconds, _host in found)),
                "most": duration(longest[0]),
                "slowest": tidy(longest[1]),
                "anchor": anchors[longest[1]],
            }
        )
    return rows


# --- one device --------------------------------------------------------------------------------------------------


def _device(document: Data, anchor: str, labels: Mapping[str, str], names: Sequence[str]) -> Data:
    state = document["state"]
    look, sign = LOOKS.get(state, UNKNOWN)
    plan = document.get("plan") or {}
    verification = document.get("verification") or {}
    rows = [_component(tidy(row)) for row in fleet_data.components(document)]
    by_name = {str(row.get("component")): row for row in fleet_data.components(document)}
    cells = []
    for name in names:
        status = by_name[name].get("status") if name in by_name else None
        cells.append(
            {
                "look": LOOKS.get(str(status), UNKNOWN)[0] if status else "",
                "words": tidy(str(status)) if status else "no result",
            }
        )
    return {
        "host": tidy(document["host"]),
        "anchor": anchor,
        "state": state,
        "look": look,
        "sign": sign,
        "summary": tidy(document["summary"]),
        "scope": document["scope"],
        "label": labels.get(str(plan.get("class_id")), ""),
        "facts": _facts(document, plan, verification),
        "cells": cells,
        "failures": tidy(list(fleet_data.failures(document))),
        "details": _details(document),
        "rows": rows,
        "reasons": _reasons(rows),
        "holders": [
            tidy(f"pid {item.get('pid')}: {item.get('command')}, {item.get('memory_mb')} MB")
            for item in verification.get("holders") or []
            if isinstance(item, dict)
        ],
        "changed": len(document["changes"]),
        "changes": [
            {"role": tidy(item["role"]), "task": tidy(item["task"]), "took": duration(item["seconds"])}
            for item in document["changes"]
        ],
        "seconds": round(sum(document["seconds"].values()), 1),
        "took": duration(sum(document["seconds"].values())) if document["seconds"] else "",
        "roles": [(tidy(role), duration(value)) for role, value in document["seconds"].items()],
        "work": [
            {
                "outcome": tidy(str(item.get("outcome") or "?")),
                "why": tidy(": ".join(str(item[key]) for key in ("what", "reason") if item.get(key))),
                "source": tidy(str(((document.get("choice") or {}).get("waits") or {}).get(item.get("outcome")) or "")),
            }
            for item in plan.get("work") or []
        ],
        "problems": tidy(plan.get("problems") or []),
        "projects": tidy(document["projects"]),
    }


def _facts(document: Data, plan: Data, verification: Data) -> list[tuple[str, str]]:
    """Return what is known of a device, as (name, value)."""
    platform, gpu, paths = plan.get("platform") or {}, verification.get("gpu") or {}, plan.get("paths") or {}
    device = verification.get("device")
    if verification.get("kernels") == "cpu":
        device = "cpu: cpu kernels, no GPU was tested"
    versions = verification.get("versions") or {}
    facts = [
        ("platform", " ".join(str(platform[key]) for key in ("id",) if platform.get(key))),
        ("L4T", plan.get("l4t")),
        ("class", plan.get("class_id")),
        ("tested on", device),
        ("GPU", gpu.get("name") if isinstance(gpu, dict) else None),
        ("environment", paths.get("env")),
        ("interpreter", verification.get("python")),
        ("versions", ", ".join(f"{name} {value}" for name, value in versions.items() if value)),
        ("dtypes", ", ".join(map(str, verification.get("dtypes") or []))),
        ("seed", verification.get("seed")),
        ("tests took", duration(verification.get("seconds"))),
    ]
    return [(name, tidy(str(value))) for name, value in facts if value not in (None, "")]


def _shapes(row: Data) -> str:
    shapes = [row.get("shapes_in"), row.get("shapes_out")]
    return " \u2192 ".join(f"({', '.join(map(str, shape))})" for shape in shapes if isinstance(shape, list))


def _component(row: Data) -> Data:
    """Return a row of a device's table."""
    status = str(row.get("status"))
    look, sign = LOOKS.get(status, UNKNOWN)
    error, allowed = row.get("max_error"), row.get("tolerance")
    known = isinstance(error, (int, float)) and isinstance(allowed, (int, float))
    share = error / allowed if known and allowed else None
    kernels = row.get("kernels")
    return {
        "name": str(row.get("component")),
        "status": status,
        "look": look,
        "sign": sign,
        "dtypes": " ".join(SHORT.get(name, str(name)) for name in row.get("dtypes") or []),
        "shapes": _shapes(row),
        "error": f"{error:.1e}" if known else "",
        "allowed": f"{allowed:.1e}" if known else "",
        "share": None if share is None else min(share, 1.0),
        "percent": f"{100 * share:.0f} %" if share is not None else "",
        "cases": str(row["cases"]) if row.get("cases") else "",
        "took": duration(row.get("seconds")) if status in ("passed", "failed") else "",
        "kernels": str(kernels) if kernels else "",
        "message": str(row.get("message") or ""),
        "failures": [str(item) for item in row.get("failures") or []],
    }


def _details(document: Data) -> list[Data]:
    """Return the failed components with every single failure, where there are more than their message tells."""
    return [
        {"name": tidy(str(row.get("component"))), "lines": [tidy(str(line)) for line in row["failures"]]}
        for row in fleet_data.components(document)
        if row.get("status") == fleet_data.FAILED and len(row.get("failures") or []) > 1
    ]


def _reasons(rows: Sequence[Data]) -> list[Data]:
    """Return why components have no result, and what is to be said of those that passed, each sentence once."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != fleet_data.FAILED and row["message"]:
            groups.setdefault((row["status"], row["message"]), []).append(row["name"])
        elif row["status"] not in (fleet_data.FAILED, fleet_data.PASSED):
            groups.setdefault((row["status"], "no reason given"), []).append(row["name"])
    order = {status: index for index, status in enumerate(fleet_data.STATUSES)}
    return [
        {"status": status, "look": LOOKS.get(status, UNKNOWN)[0], "message": message, "names": ", ".join(names)}
        for (status, message), names in sorted(groups.items(), key=lambda item: order.get(item[0][0], 0))
    ]
