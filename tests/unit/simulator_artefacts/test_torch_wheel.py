"""Repackaging a made-up torch wheel, and finding the real one."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import types
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from simulator.artefacts import cache, torch_wheel
from simulator.errors import Problem

INIT = b'"""torch"""\nfrom torch._C import *\n\nfrom torch import _C as _C\n\nAFTER = 1\n'
FILES = {
    "torch/__init__.py": INIT,
    "torch/lib/libtorch.so": b"\x7fELF" + b"x" * 5000,
    "torch/bin/torch_shm_manager": b"needed",
    "torch/bin/test_api": b"a test program",
    "torch/bin/FileStoreTest": b"another",
    "torch/test/basic": b"a third",
    "torch/testing/__init__.py": b"needed too",
    "torch/odd, name.py": b"quoted in RECORD",
    "torch-2.13.0+cpu.dist-info/METADATA": b"Name: torch\nVersion: 2.13.0+cpu\n",
}
RECORD = "torch-2.13.0+cpu.dist-info/RECORD"
DROPPED = {"torch/bin/test_api", "torch/bin/FileStoreTest", "torch/test/basic"}


def wheel_hash(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def make_wheel(path: Path, files: dict[str, bytes]) -> Path:
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    for name, data in files.items():
        writer.writerow([name, wheel_hash(data), len(data)])
    writer.writerow([RECORD, "", ""])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**files, RECORD: rows.getvalue().encode()}.items():
            entry = zipfile.ZipInfo(name, (2026, 1, 2, 3, 4, 6))
            entry.external_attr = (0o755 if name.endswith("manager") else 0o644) << 16
            archive.writestr(entry, data)
    return path


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    return make_wheel(tmp_path / "upstream.whl", FILES)


@pytest.fixture
def repacked(upstream: Path, tmp_path: Path) -> zipfile.ZipFile:
    torch_wheel.repackage(upstream, tmp_path / "new.whl")
    return zipfile.ZipFile(tmp_path / "new.whl")


def test_hides_distributed_once_c_is_loaded(repacked: zipfile.ZipFile) -> None:
    c_module = types.ModuleType("torch._C")
    for name in ("_c10d_init", "_rpc_init", "_dist_autograd_init", "_initExtension"):
        setattr(c_module, name, lambda: True)
    hidden = repacked.read("torch/__init__.py").decode().split("from torch import _C as _C\n")[1]
    exec(compile(hidden, "torch/__init__.py", "exec"), {"_C": c_module})
    assert [name for name in dir(c_module) if name.endswith("_init")] == []
    assert hasattr(c_module, "_initExtension")


def test_hiding_stands_a_build_that_has_none_of_the_names(repacked: zipfile.ZipFile) -> None:
    hidden = repacked.read("torch/__init__.py").decode().split("from torch import _C as _C\n")[1]
    exec(compile(hidden, "torch/__init__.py", "exec"), {"_C": types.ModuleType("torch._C")})


def test_record_names_exactly_the_files_with_their_hashes(repacked: zipfile.ZipFile) -> None:
    rows = list(csv.reader(io.StringIO(repacked.read(RECORD).decode())))
    assert [row[0] for row in rows] == repacked.namelist()
    for name, digest, size in rows:
        if name == RECORD:
            assert (digest, size) == ("", "")
        else:
            data = repacked.read(name)
            assert (digest, size) == (wheel_hash(data), str(len(data)))


def test_only_test_programs_are_dropped(repacked: zipfile.ZipFile) -> None:
    assert set(FILES) - set(repacked.namelist()) == DROPPED
    for name, data in FILES.items():
        if name not in DROPPED | {"torch/__init__.py"}:
            assert repacked.read(name) == data


def test_modes_and_times_are_kept(repacked: zipfile.ZipFile) -> None:
    entry = repacked.getinfo("torch/bin/torch_shm_manager")
    assert entry.external_attr >> 16 == 0o755
    assert entry.date_time == (2026, 1, 2, 3, 4, 6)


def test_the_same_input_gives_the_same_bytes(upstream: Path, tmp_path: Path) -> None:
    for name in ("one.whl", "two.whl"):
        torch_wheel.repackage(upstream, tmp_path / name)
        os.utime(upstream, (1, 1))
    assert (tmp_path / "one.whl").read_bytes() == (tmp_path / "two.whl").read_bytes()


@pytest.mark.parametrize("init", [INIT.replace(b"_C as _C", b"_C"), INIT + INIT])
def test_an_unknown_torch_is_refused_and_nothing_is_left(init: bytes, tmp_path: Path) -> None:
    source = make_wheel(tmp_path / "upstream.whl", {**FILES, "torch/__init__.py": init})
    with pytest.raises(Problem, match="times"):
        torch_wheel.repackage(source, tmp_path / "new.whl")
    assert [path.name for path in tmp_path.iterdir()] == ["upstream.whl"]


def test_something_else_than_torch_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(Problem, match="no torch/__init__"):
        torch_wheel.repackage(tmp_path / "other.whl", tmp_path / "new.whl")


class Sources:
    """Stands for pip: one answer a source, either a file's content or what pip said."""

    def __init__(self, *answers: bytes | str) -> None:
        self.answers = list(answers)
        self.asked: list[list[str]] = []

    def __call__(self, requirement: str, folder: Path, arguments: Sequence[str]) -> tuple[Path | None, str]:
        assert requirement == "torch==2.13.0+cpu"
        self.asked.append(list(arguments))
        answer = self.answers.pop(0)
        if isinstance(answer, str):
            return None, answer
        (folder / torch_wheel.FILE_NAME).write_bytes(answer)
        return folder / torch_wheel.FILE_NAME, ""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_pips_own_sources_come_first(tmp_path: Path) -> None:
    pip = Sources(b"wheel")
    assert torch_wheel.find(tmp_path, sha256(b"wheel"), pip).read_bytes() == b"wheel"
    assert pip.asked == [[]]


@pytest.mark.parametrize("first", ["No matching distribution found", b"another wheel"])
def test_pytorchs_index_comes_next(first: bytes | str, tmp_path: Path) -> None:
    pip = Sources(first, b"wheel")
    assert torch_wheel.find(tmp_path, sha256(b"wheel"), pip).read_bytes() == b"wheel"
    assert pip.asked[1] == ["--index-url", "https://download.pytorch.org/whl/cpu"]


def test_when_no_source_answers_the_message_says_what_each_said(tmp_path: Path) -> None:
    with pytest.raises(Problem) as caught:
        torch_wheel.find(tmp_path, sha256(b"wheel"), Sources(b"another", "No matching distribution found"))
    text = caught.value.render()
    assert f"has sha256 {sha256(b'another')}" in text
    assert "No matching distribution found" in text
    assert f"{torch_wheel.FILE_NAME} with sha256 {sha256(b'wheel')}" in caught.value.expected
    assert "PIP_FIND_LINKS" in caught.value.next_step


@pytest.fixture
def prepared(upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Path]]:
    calls: list[Path] = []

    def find(folder: Path) -> Path:
        calls.append(folder)
        return upstream

    monkeypatch.setattr(torch_wheel, "find", find)
    out = tmp_path / "out"
    out.mkdir()
    return out, calls


def test_prepared_once(prepared: tuple[Path, list[Path]]) -> None:
    out, calls = prepared
    first = torch_wheel.prepare(out)
    assert first == torch_wheel.prepare(out)
    assert len(calls) == 1
    assert first.path.name == "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl"
    assert first.sha256 == cache.sha256_file(first.path)
    assert sorted(path.name for path in out.iterdir()) == [".state", first.path.name]


def test_a_touched_wheel_is_kept_and_a_changed_one_made_again(prepared: tuple[Path, list[Path]]) -> None:
    out, calls = prepared
    first = torch_wheel.prepare(out)
    os.utime(first.path, (1, 1))
    assert torch_wheel.prepare(out) == first
    assert len(calls) == 1
    first.path.write_bytes(b"cut short")
    assert torch_wheel.prepare(out) == first
    assert len(calls) == 2
    assert cache.sha256_file(first.path) == first.sha256


def test_a_real_pip_reports_that_a_source_has_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "dest").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    path, reason = torch_wheel.pip_download("torch==2.13.0+cpu", tmp_path / "dest", [])
    assert path is None
    assert "No matching distribution" in reason
