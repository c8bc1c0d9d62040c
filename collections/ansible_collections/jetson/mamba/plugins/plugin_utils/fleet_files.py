"""Write what a run learned: JSON, JUnit XML, CSV and the page. A file that cannot be made costs no other."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ansible_collections.jetson.mamba.plugins.module_utils import files
from ansible_collections.jetson.mamba.plugins.plugin_utils import fleet_data, fleet_page, report, results


class Written(NamedTuple):
    """What came of writing.

    Args:
        lines: a line for each file that a person may open, with its path.
        troubles: what could not be written, and what was done instead; one sentence each.
    """

    lines: list[str]
    troubles: list[str]


def new_folder(base: Path, now: datetime) -> Path:
    """Make a folder named by the time, which no other run has, and return it.

    Raises:
        OSError: it cannot be made.
    """
    name = now.strftime("%Y%m%dT%H%M%SZ")
    base.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = base / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:  # two runs in one second
            number += 1
        else:
            return folder


def write(fleet: fleet_data.Data, hosts: Sequence[fleet_data.Data], base: Path, variable: str) -> Written:
    """Write all files of a run.

    The results of an hour's work are not lost for want of a folder: where base cannot be written, they go to a new
    folder among the temporary files.

    Args:
        fleet: the document of the fleet.
        hosts: those of its hosts (fleet_data.documents).
        base: the folder of all reports; this run's folder in it is named by its time.
        variable: the environment variable that names another base, for the message.

    Raises:
        OSError: nothing can be written anywhere.
    """
    troubles = []
    try:
        folder = new_folder(base, datetime.fromisoformat(fleet["made_at"]))
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="jetson-mamba-reports-"))
        troubles.append(
            f"the folder {base} cannot be written ({error.strerror or error}); this run's reports are in {folder} "
            f"instead; for the next run correct its rights, or name another folder with {variable}=…"
        )
    made: list[tuple[str, str]] = []

    def put(name: str, make: Callable[[], bytes], what: str) -> None:
        path = folder / name
        try:
            files.write_atomic(str(path), make(), 0o644)
        except Exception as error:  # whatever it is, the other files and the run go on
            reason = error.strerror if isinstance(error, OSError) and error.strerror else report.clean(error)
            troubles.append(f"{path} could not be written: {type(error).__name__}: {reason}")
        else:
            if what:
                made.append((str(path), what))

    for document in hosts:
        put(fleet["hosts"][document["host"]]["file"], partial(to_json, document), "")
    put("fleet.json", partial(to_json, fleet), "JSON, one file for each host beside it")
    put("fleet.html", lambda: fleet_page.render(fleet, hosts).encode("utf-8"), "a page for any browser")
    put("junit.xml", lambda: results.junit(fleet, hosts), "JUnit XML")
    put("results.csv", lambda: results.table(hosts), "CSV")
    order = ("fleet.html", "fleet.json", "junit.xml", "results.csv")
    made.sort(key=lambda item: order.index(os.path.basename(item[0])))
    rows = [["reports:" if index == 0 else "", path, what] for index, (path, what) in enumerate(made)]
    return Written(report.columns(rows, gap=" "), troubles)


def to_json(document: fleet_data.Data) -> bytes:
    """Return a document as JSON in ASCII: a file that somebody prints must not steer the terminal either."""
    return (json.dumps(document, indent=2, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")
