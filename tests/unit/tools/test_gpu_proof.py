"""tools/gpu_proof.py: what it does without a GPU."""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import zipfile
from pathlib import Path

import pytest

import tools.gpu_proof as tool


def digest(content: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


def options(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(work=folder / "work", out=folder / "out", controller="", repeat=False)


def install(site: Path) -> Path:
    """Install a distribution as an installer would, with what no wheel holds."""
    info = site / "Some_Thing-1.2.dist-info"
    (site / "some_thing/__pycache__").mkdir(parents=True)
    info.mkdir()
    contents = {
        "some_thing/__init__.py": b"answer = 42\n",
        "some_thing/certificates.pem": b"one\n",
        "some_thing/__pycache__/__init__.pyc": b"bytecode",
        "Some_Thing-1.2.dist-info/METADATA": b"Metadata-Version: 2.1\nName: Some.Thing\nVersion: 1.2\n",
        "Some_Thing-1.2.dist-info/WHEEL": b"Wheel-Version: 1.0\nTag: cp312-cp312-b_x86_64\nTag: cp312-cp312-a_x86_64\n",
        "Some_Thing-1.2.dist-info/INSTALLER": b"uv",
    }
    rows = io.StringIO()
    writer = csv.writer(rows)
    for path, content in contents.items():
        (site / path).write_bytes(content)
        writer.writerow((path, digest(content), len(content)))
    writer.writerow(("../../../bin/some-thing", digest(b""), 0))
    writer.writerow(("Some_Thing-1.2.dist-info/RECORD", "", ""))
    (info / "RECORD").write_text(rows.getvalue())
    return info


def test_an_installed_distribution_becomes_a_wheel_again(tmp_path: Path) -> None:
    info = install(tmp_path / "site")
    # changed since it was installed, and longer
    (tmp_path / "site/some_thing/certificates.pem").write_bytes(b"one\ntwo\n")
    wheel = tool.pack_again(tmp_path / "site", info, tmp_path)
    assert wheel.name == "some_thing-1.2-cp312-cp312-a_x86_64.b_x86_64.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = {row[0]: row[1:] for row in csv.reader(archive.read(f"{info.name}/RECORD").decode().splitlines())}
        assert names == set(record)
        assert not any("__pycache__" in name or "INSTALLER" in name or name.startswith("..") for name in names)
        for name, (sum_, size) in record.items():
            if not name.endswith("/RECORD"):
                assert (sum_, size) == (digest(archive.read(name)), str(len(archive.read(name)))), name
        assert archive.read("some_thing/certificates.pem") == b"one\ntwo\n"


def test_exponents_are_slopes_in_logarithms() -> None:
    assert tool.fit_exponent([(length, 3.0 * length**2) for length in (1024, 2048, 4096)]) == 2.0
    assert tool.fit_exponent([(length, 0.5 * length) for length in (1024, 65536)]) == 1.0
    assert tool.fit_exponent([(1024, 5.0)]) is None
    assert tool.fit_exponent([(1024, 5.0), (1024, 6.0)]) is None


def test_steps_that_were_not_run_say_so(tmp_path: Path) -> None:
    proof = tool.Proof(options(tmp_path))
    proof.write("again", {"status": "passed"})
    found = json.loads((tmp_path / "out/gpu_proof.json").read_text())
    assert found["steps"].pop("again") == {"status": "passed"}
    assert set(found["steps"]) == set(tool.STEPS) - {"again"}
    assert {row["status"] for row in found["steps"].values()} == {"not run"}


def test_a_failed_step_is_kept_and_a_passed_one_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def failing(proof: object) -> dict[str, object]:
        calls.append("failing")
        raise tool.StepFailed("no such thing")

    def passing(proof: object) -> dict[str, object]:
        calls.append("passing")
        return {"number": 7}

    monkeypatch.setitem(tool.STEPS, "again", failing)
    monkeypatch.setitem(tool.STEPS, "vision", passing)
    proof = tool.Proof(options(tmp_path))
    assert [proof.step(name) for name in ("again", "vision", "again", "vision")] == [False, True, False, True]
    assert calls == ["failing", "passing", "failing"]
    assert proof.read("again")["message"] == "no such thing"
    assert proof.read("vision")["number"] == 7


def test_memory_of_a_build_that_outlasts_a_run_is_the_most_of_all_runs(tmp_path: Path) -> None:
    proof = tool.Proof(options(tmp_path))
    house = tmp_path / "work/wheelhouse/class"
    house.mkdir(parents=True)
    row = {"component": "mamba_ssm", "version": "2.2.4", "sm": "90", "seconds": 9}
    (house / "manifest.json").write_text(json.dumps({"wheels": {"key": row}}))
    proof._builds({"mamba_ssm": {"peak_mb": 800.0, "most_processes": 3}})
    found = proof._builds({"mamba_ssm": {"peak_mb": 500.0, "most_processes": 9}})
    assert (found["mamba_ssm"]["peak_mb"], found["mamba_ssm"]["most_processes"]) == (800.0, 9)
    assert found["mamba_ssm"]["seconds"] == 9


def test_recaps_are_read() -> None:
    text = "workstation                : ok=11   changed=0    unreachable=0    failed=1    skipped=2 \n"
    assert tool.RECAP.findall(text) == [("workstation", "11", "0", "0", "1")]
