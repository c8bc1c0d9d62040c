"""The results of a run for other programs: JUnit XML for CI servers, CSV for spreadsheets."""

from __future__ import annotations

import csv
import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from typing import Any

from ansible_collections.jetson.mamba.plugins.plugin_utils import fleet_data, report

Data = dict[str, Any]

COLUMNS = (
    "host",
    "state",
    "class_id",
    "component",
    "status",
    "device",
    "kernels",
    "dtypes",
    "shapes_in",
    "shapes_out",
    "max_error",
    "tolerance",
    "cases",
    "seconds",
    "message",
)
# XML 1.0 forbids these however they are escaped; the others that it forbids are control characters
_NO_XML = re.compile("[\ufffe\uffff]")
# a cell that begins so is a formula to spreadsheets
_FORMULA = ("=", "+", "-", "@")


def plain_lines(text: Any) -> str:
    """Return text that a device supplied, line by line, without anything that steers a terminal or that XML forbids."""
    lines = [report.clean(line) for line in str(text).splitlines()]
    return _NO_XML.sub("", "\n".join(lines)).strip("\n")


# --- JUnit -------------------------------------------------------------------------------------------------------


def junit(fleet: Data, hosts: Sequence[Data]) -> bytes:
    """Return the results as JUnit XML: a suite for each host, a test case for each component.

    What could not be tested is `skipped` with its reason and never a pass. A host that was lost, or that failed outside
    of the tests, has an `error`.

    Args:
        fleet: the document of the fleet.
        hosts: those of its hosts (fleet_data.documents).
    """
    root = ElementTree.Element("testsuites", name=plain_lines(fleet["playbook"] or "jetson-mamba"))
    sums = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for document in hosts:
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=plain_lines(document["host"]),
            hostname=plain_lines(document["host"]),
            timestamp=str(document["made_at"]).partition("+")[0],
        )
        _properties(suite, document)
        counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
        for name, seconds, kind, message in _cases(document):
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=plain_lines(document["host"]).replace(".", "_"),  # dots are packages to CI servers
                name=plain_lines(name),
                time=f"{seconds:.3f}",
            )
            counts["tests"] += 1
            if kind:
                words = plain_lines(message)
                part = ElementTree.SubElement(case, kind, message=words.partition("\n")[0])
                part.text = words
                counts[{"failure": "failures", "error": "errors", "skipped": "skipped"}[kind]] += 1
        total = (document.get("verification") or {}).get("seconds")
        suite.attrib.update({key: str(value) for key, value in counts.items()}, time=f"{_float(total):.3f}")
        for key, value in counts.items():
            sums[key] += value
    root.attrib.update({key: str(value) for key, value in sums.items()}, time=f"{_float(fleet['seconds']):.3f}")
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _float(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _properties(suite: ElementTree.Element, document: Data) -> None:
    verification = document.get("verification") or {}
    facts = {
        "state": document["state"],
        "summary": document["summary"],
        "scope": document["scope"],
        "class_id": (document.get("plan") or {}).get("class_id"),
        "device": verification.get("device"),
        "seed": verification.get("seed"),
        **{f"version {name}": value for name, value in (verification.get("versions") or {}).items()},
    }
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in facts.items():
        if value not in (None, ""):
            ElementTree.SubElement(properties, "property", name=plain_lines(name), value=plain_lines(value))


def _cases(document: Data) -> Iterator[tuple[str, float, str, str]]:
    """Yield (name, seconds, failure or error or skipped or nothing, message)."""
    for row in fleet_data.components(document):
        status, message = row.get("status"), str(row.get("message") or "no reason given")
        kind = {fleet_data.PASSED: "", fleet_data.FAILED: "failure"}.get(str(status), "skipped")
        yield (
            str(row.get("component")),
            _float(row.get("seconds")),
            kind,
            message if kind != "skipped" else f"{status}: {message}",
        )
    wrong = [item for item in fleet_data.failures(document) if item["kind"] != "component"]
    for item in wrong:
        yield f"run: {item['title']}", 0.0, "error", item["message"]
    if document.get("verification") is None and not wrong:
        yield "verification", 0.0, "skipped", f"{document['state']}: {document['summary']}"
    elif document["state"] in ("incomplete", "busy"):
        yield "verification as a whole", 0.0, "skipped", f"{document['state']}: {document['summary']}"


# --- CSV ---------------------------------------------------------------------------------------------------------


def table(hosts: Sequence[Data]) -> bytes:
    """Return the results as CSV (UTF-8, a header, a row for each component; one without component for other hosts).

    Text that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for document in hosts:
        common = {
            "host": document["host"],
            "state": document["state"],
            "class_id": (document.get("plan") or {}).get("class_id"),
        }
        rows = fleet_data.components(document)
        for row in rows:
            writer.writerow([_cell({**row, **common}.get(name)) for name in COLUMNS])
        if not rows:
            wrong = [f"{item['title']}: {item['message']}" for item in fleet_data.failures(document)]
            message = "\n".join([document["summary"], *wrong])
            writer.writerow([_cell({**common, "message": message}.get(name)) for name in COLUMNS])
    return stream.getvalue().encode("utf-8")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        words = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        text = report.clean(words)
        return f"'{text}" if text.startswith(_FORMULA) else text
    return repr(value)
