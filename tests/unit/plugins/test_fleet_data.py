"""Documents of a run, the files made of them, and the schemas that promise their shape."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.plugin_utils import fleet_data, fleet_files, fleet_page, report, results
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from tests.unit.plugins import fleet_kit

ROOT = Path(__file__).resolve().parents[3]
SCHEMAS = {path.name: json.loads(path.read_text()) for path in (ROOT / "docs" / "schema").glob("*.json")}
REGISTRY: Any = Registry().with_resources([(name, Resource.from_contents(body)) for name, body in SCHEMAS.items()])
HOSTILE = "</script><script>alert(1)</script>\x1b[2J\x00\u202e\ufffe=1+1"


def faults(name: str, document: Any) -> list[str]:
    validator = Draft202012Validator(SCHEMAS[f"{name}.schema.json"], registry=REGISTRY)
    return [f"{list(error.absolute_path)}: {error.message}" for error in validator.iter_errors(document)]


def hostile_run() -> fleet_data.Run:
    run = fleet_kit.every_kind()
    hosts: dict[str, fleet_data.HostRun] = dict(run.hosts)
    found = fleet_kit.verification(
        "failed", {"device": {"status": "failed", "message": HOSTILE, "failures": [HOSTILE]}}
    )
    found["versions"] = {HOSTILE: HOSTILE}
    found["components"].append(fleet_kit.row(HOSTILE, "not run", message=HOSTILE, dtypes=[HOSTILE]))
    bad = fleet_data.HostRun(
        outcome=report.Outcome(found, failed_at=HOSTILE, failed_after=True),
        plan={**fleet_kit.plan(), "class_id": HOSTILE, "l4t": HOSTILE},
        failure={"task": HOSTILE, "message": HOSTILE, "problem": dict.fromkeys(("found", "expected", "next"), HOSTILE)},
        changes=[{"role": HOSTILE, "task": HOSTILE, "seconds": 1.0}],
        projects=[{"path": HOSTILE, "message": HOSTILE}],
    )
    hosts[f"../{HOSTILE}"] = bad
    return fleet_data.Run(run.made_at, run.seconds, HOSTILE, hosts)


# --- documents and schemas ---------------------------------------------------------------------------------------


def test_the_schemas_are_schemas() -> None:
    assert sorted(SCHEMAS) == ["fleet.schema.json", "host.schema.json", "verification.schema.json"]
    for schema in SCHEMAS.values():
        Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("run", [fleet_kit.every_kind(), hostile_run()], ids=["every kind", "hostile"])
def test_documents_are_as_published(run: fleet_data.Run) -> None:
    fleet, hosts = fleet_data.documents(run)
    assert faults("fleet", fleet) == []
    assert {document["host"]: faults("host", document) for document in hosts} == {name: [] for name in run.hosts}


@pytest.mark.parametrize(
    "change",
    [
        {"state": "fine"},
        {"extra": 1},
        {"failure": {"task": "x"}},
        {"verification": {"overall": "passed"}},
        {"verification": None},
        {"failure": {"task": "x", "message": "y", "problem": None}},
    ],
)
def test_the_schema_of_a_host_refuses_what_is_not_promised(change: dict[str, Any]) -> None:
    _fleet, (document,) = fleet_data.documents(fleet_data.Run(fleet_kit.MADE_AT, hosts={"a": fleet_kit.passed()}))
    assert faults("host", document) == [] and faults("host", {**document, **change})


def test_a_component_without_reason_is_refused() -> None:
    found = fleet_kit.verification()
    assert faults("verification", found) == []
    found["components"][0]["status"] = "not run"
    assert faults("verification", found)


def test_counts_and_states_of_the_fleet() -> None:
    fleet, hosts = fleet_data.documents(fleet_kit.every_kind())
    assert fleet["counts"] == {"passed": 2, "failed": 3, "busy": 1, "not verified": 3, "builder": 1}
    assert sum(fleet["counts"].values()) == len(hosts) == len(fleet["hosts"])
    assert fleet["hosts"]["orin-0"]["class_id"] == fleet_kit.CLASSES[0] and fleet["hosts"]["orin-0"]["changes"] == 1


def test_what_was_proven_is_said_exactly() -> None:
    fleet, _hosts = fleet_data.documents(fleet_kit.every_kind())
    scopes = {name: row["scope"] for name, row in fleet["hosts"].items()}
    assert scopes["orin-0"] == "kernels verified, projects not tested"
    assert scopes["thor-cpu"] == "cpu kernels verified, projects not tested"
    assert scopes["orin-1"] == "kernels not verified: failed, projects not tested"
    assert scopes["xavier-idle"] == "kernels not verified, projects not tested"
    assert scopes["builder-1"] == "nothing is tested on a builder"
    run = fleet_kit.passed()
    run.projects = [{"path": "/srv/vmamba", "message": "nothing to fix"}]
    assert fleet_data.scope_of("passed", run) == (
        "kernels verified, sources of 1 project(s) examined, their models not tested"
    )
    assert fleet_data.proven(fleet) == [(1, scopes["orin-0"]), (1, scopes["thor-cpu"])]


@pytest.mark.parametrize(
    ("run", "kinds"),
    [
        (fleet_kit.passed(), []),
        (fleet_kit.failed(), ["component"]),
        (fleet_kit.lost(), ["unreachable"]),
        (fleet_kit.blocked(), ["task"]),
        (fleet_kit.late(), ["task"]),
        (fleet_kit.busy(), []),
        (fleet_data.HostRun(), []),
        (fleet_data.HostRun(outcome=report.Outcome(failed_at="Build")), ["task"]),
    ],
)
def test_failures_of_a_host_name_the_cause_once(run: fleet_data.HostRun, kinds: list[str]) -> None:
    _fleet, (document,) = fleet_data.documents(fleet_data.Run(fleet_kit.MADE_AT, hosts={"a": run}))
    assert [item["kind"] for item in fleet_data.failures(document)] == kinds


def test_no_password_and_no_nan_reach_a_document() -> None:
    run = fleet_kit.failed(float("nan"))
    assert run.plan is not None and run.failure is not None
    run.plan["wheelhouse"] = {"sources": [{"index": "https://me:geheim@wheels.example.org/jp6"}]}
    run.failure["message"] = "GET https://me:geheim@wheels.example.org/jp6: 403"
    fleet, hosts = fleet_data.documents(fleet_data.Run(fleet_kit.MADE_AT, hosts={"a": run}))
    written = fleet_files.to_json(hosts[0]) + fleet_files.to_json(fleet)
    assert b"geheim" not in written and b"NaN" not in written and b"https://***@wheels" in written
    assert "geheim" not in fleet_page.render(fleet, hosts)


def test_each_host_has_its_own_file_whatever_its_name() -> None:
    names = ["a/b", "a_b", "A_B", "fleet", "Fleet", "../fleet", "::1", ""]
    fleet, _hosts = fleet_data.documents(
        fleet_data.Run(fleet_kit.MADE_AT, hosts={name: fleet_data.HostRun() for name in names})
    )
    stems = [row["file"].lower() for row in fleet["hosts"].values()]
    assert len({*stems, "fleet.json"}) == len(names) + 1
    assert not any("/" in stem or stem.startswith(".") for stem in stems)


# --- JUnit -------------------------------------------------------------------------------------------------------


def suites(run: fleet_data.Run) -> dict[str, ElementTree.Element]:
    root = ElementTree.fromstring(results.junit(*fleet_data.documents(run)))
    assert root.tag == "testsuites"
    return {str(suite.get("name")): suite for suite in root}


def outcome(suite: ElementTree.Element, name: str) -> tuple[str, str]:
    (case,) = [case for case in suite.iter("testcase") if case.get("name") == name]
    parts = [(part.tag, str(part.get("message"))) for part in case]
    return parts[0] if parts else ("passed", "")


def test_junit_says_what_each_component_came_to() -> None:
    found = suites(fleet_kit.every_kind())
    kind, message = outcome(found["orin-1"], "selective_scan_fn")
    assert kind == "failure" and "error 0.0413 where 0.005" in message
    assert outcome(found["orin-1"], "mamba2_module") == ("skipped", f"not run: {fleet_kit.TRITON}")
    assert outcome(found["orin-1"], "device") == ("passed", "")
    kind, message = outcome(found["orin-busy"], "mamba_module")
    assert kind == "skipped" and message.startswith("not tested: busy: memory")
    assert outcome(found["orin-busy"], "verification as a whole")[0] == "skipped"


def test_junit_shows_hosts_without_results_as_errors_or_skipped() -> None:
    found = suites(fleet_kit.every_kind())
    assert (
        found["orin-gone"].get("errors") == found["orin-full"].get("errors") == found["orin-late"].get("errors") == "1"
    )
    kind, message = outcome(found["orin-late"], "run: Switch to the verified environment")
    assert (kind, message) == ("error", "No space left on device")
    assert outcome(found["xavier-idle"], "verification") == ("skipped", "not verified: no verification was run")
    assert outcome(found["builder-1"], "verification")[0] == "skipped"


def test_junit_counts_add_up() -> None:
    root = ElementTree.fromstring(results.junit(*fleet_data.documents(hostile_run())))
    for suite in root:
        cases = list(suite.iter("testcase"))
        assert suite.get("tests") == str(len(cases))
        for tag, key in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            assert suite.get(key) == str(sum(case.find(tag) is not None for case in cases))
    for key in ("tests", "failures", "errors", "skipped"):
        assert root.get(key) == str(sum(int(str(suite.get(key))) for suite in root))


def test_no_device_makes_the_xml_unreadable() -> None:
    text = results.junit(*fleet_data.documents(hostile_run())).decode("utf-8")
    ElementTree.fromstring(text)
    assert not set(text) & {"\x00", "\x1b", "\u202e", "\ufffe"} and "<script" not in text


# --- CSV ---------------------------------------------------------------------------------------------------------


def csv_rows(run: fleet_data.Run) -> list[dict[str, str]]:
    _fleet, hosts = fleet_data.documents(run)
    return list(csv.DictReader(io.StringIO(results.table(hosts).decode("utf-8"), newline="")))


def test_csv_has_a_row_for_each_component_and_for_each_host_without() -> None:
    rows = csv_rows(fleet_kit.every_kind())
    (row,) = [row for row in rows if row["host"] == "orin-1" and row["component"] == "selective_scan_fn"]
    assert row["status"] == "failed" and float(row["max_error"]) == 0.0413 and row["shapes_in"] == "2 64 67"
    assert row["class_id"] == fleet_kit.CLASSES[0] and row["kernels"] == "cuda"
    (gone,) = [row for row in rows if row["host"] == "orin-gone"]
    assert gone["component"] == "" and "No route to host" in gone["message"]
    assert {row["host"] for row in rows} == set(fleet_kit.every_kind().hosts)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\x1b[1m=1", " =1", "\t=1"])
def test_csv_holds_no_formula(text: str) -> None:
    found = fleet_kit.verification("failed", {"device": {"status": "failed", "message": text}})
    rows = csv_rows(fleet_data.Run(fleet_kit.MADE_AT, hosts={text: fleet_data.HostRun(outcome=report.Outcome(found))}))
    assert {row["host"][0] for row in rows} == {"'"}
    assert [row["message"][0] for row in rows if row["component"] == "device"] == ["'"]


# --- files -------------------------------------------------------------------------------------------------------


def write(run: fleet_data.Run, base: Path) -> fleet_files.Written:
    return fleet_files.write(*fleet_data.documents(run), base, "JETSON_MAMBA_REPORTS")


def test_all_files_are_written_and_said(tmp_path: Path) -> None:
    run = fleet_kit.every_kind()
    written = write(run, tmp_path / "new" / "reports")
    (folder,) = (tmp_path / "new" / "reports").iterdir()
    assert written.troubles == [] and folder.name == "20260201T102030Z"
    names = {path.name for path in folder.iterdir()}
    assert names == {"fleet.html", "fleet.json", "junit.xml", "results.csv", *(f"{host}.json" for host in run.hosts)}
    said = [line.replace("reports:", "").split()[0] for line in written.lines]
    assert said == [str(folder / name) for name in ("fleet.html", "fleet.json", "junit.xml", "results.csv")]
    assert written.lines[0].startswith("  reports: ")
    fleet = json.loads((folder / "fleet.json").read_text())
    assert all((folder / row["file"]).is_file() for row in fleet["hosts"].values())
    assert all((folder / name).read_bytes().isascii() for name in names if name.endswith(".json"))


def test_two_runs_in_one_second_have_two_folders(tmp_path: Path) -> None:
    for _ in range(3):
        assert write(fleet_kit.every_kind(), tmp_path).troubles == []
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_that_cannot_be_made_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_documents: Any) -> str:
        raise KeyError("x\x1b[2J")

    monkeypatch.setattr(fleet_page, "render", broken)
    written = write(fleet_kit.every_kind(), tmp_path)
    (trouble,) = written.troubles
    assert "fleet.html could not be written: KeyError" in trouble and "\x1b" not in trouble
    (folder,) = tmp_path.iterdir()
    assert {"fleet.json", "junit.xml", "results.csv", "orin-1.json"} <= {path.name for path in folder.iterdir()}
    assert "fleet.html" not in "".join(written.lines) and written.lines[0].startswith("  reports: ")


def test_without_a_folder_the_results_are_kept_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    written = write(fleet_kit.every_kind(), tmp_path / "file")
    (trouble,) = written.troubles
    (folder,) = (tmp_path / "temporary").iterdir()
    assert str(tmp_path / "file") in trouble and str(folder) in trouble and "JETSON_MAMBA_REPORTS" in trouble
    assert (folder / "fleet.html").is_file() and folder.stat().st_mode & 0o077 == 0
    assert str(folder) in written.lines[0]


def test_files_are_readable_by_others_and_nothing_is_left_behind(tmp_path: Path) -> None:
    write(fleet_kit.every_kind(), tmp_path)
    (folder,) = tmp_path.iterdir()
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
