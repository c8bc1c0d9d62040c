"""The wheelhouse: what is verified before it is believed, and what many writers at once may not lose."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import plan
from ansible_collections.jetson.mamba.plugins.module_utils.build import RECIPE, build_key
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.plugin_utils import wheelhouse, wheelhouse_lock
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheel_inspection import Inspection
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheelhouse import Wheelhouse

ORIN = "aarch64-glibc2.35-cu12.6-cp310-torch2.5.0a0+872d972e41.nv24.8-cxx11-sm87"
CPU = "x86_64-glibc2.36-cu12.6-cp311-torch2.13.0+cpu-cxx11-cpu"
SOURCE = "5" * 64
FORK = multiprocessing.get_context("fork")
Row = dict[str, Any]


@pytest.fixture
def house(tmp_path: Path) -> Wheelhouse:
    return Wheelhouse(tmp_path / "wheelhouse")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheelhouse_lock, "POLL_SECONDS", 0.02)


def silent(_text: str) -> None:
    """Say nothing."""


def make_wheel(folder: Path, content: bytes = b"wheel", component: str = "mamba_ssm", version: str = "2.2.4") -> Path:
    """Write a file under a wheel's name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{component}-{version}-cp310-cp310-linux_aarch64.whl"
    path.write_bytes(content)
    return path


def make_row(wheel: Path, class_id: str = ORIN, **changes: Any) -> Row:
    """Return the row of a wheel that was built here."""
    name, version = wheel.name.split("-")[:2]
    row: Row = {
        "component": name,
        "version": version,
        "class_id": class_id,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "origin": "built on orin-a",
        "source": "mamba_ssm-2.2.4.tar.gz",
        "source_sha256": SOURCE,
        "sm": "87",
        "flags": ["B=2", "A=1"],
        "builder": "orin-a",
        "l4t": "36.4.4",
        "seconds": 737.5,
    } | changes
    source = row["source_sha256"] or ""
    key = build_key(row["component"], row["version"], source, class_id, row["sm"], row["flags"])
    return {"key": key, **row}


def added(house: Wheelhouse, folder: Path, content: bytes = b"wheel", **changes: Any) -> Row:
    """Put a wheel into the wheelhouse."""
    wheel = make_wheel(folder, content)
    return house.add(wheel, make_row(wheel, **changes))


# ---------------------------------------------------------------- classes


def test_a_class_id_as_the_plan_writes_it_is_read_back() -> None:
    row = {"machine": "aarch64", "cuda": "12.6", "python": "3.10", "sm": "87", "cxx11_abi": False}
    made = plan.class_id(row, {"glibc": "2.35"}, "2.5.0a0+872d972e41.nv24.8", "12.6")
    parts = wheelhouse.parse_class_id(made)
    assert parts == ("aarch64", "2.35", "12.6", "3.10", "2.5.0a0+872d972e41.nv24.8", False, "87")
    assert parts.target.abi == "cp310"
    assert wheelhouse.parse_class_id(CPU).sm == "cpu" and wheelhouse.parse_class_id(CPU).cxx11_abi
    assert wheelhouse.parse_class_id(CPU.replace("cu12.6", "cunone")).cuda == "none"


@pytest.mark.parametrize("text", ["", "aarch64", "../" + ORIN, ORIN + "/..", ORIN.replace("sm87", "sm"), "None"])
def test_what_is_no_class_id_is_refused(text: str, house: Wheelhouse) -> None:
    with pytest.raises(Problem, match="no platform class"):
        house.look(text, "0" * 64)


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        ("1.6.0+cu126torch2.5", "1.6.0", True),
        ("1.6.0", "1.6.0", True),
        ("1.6.0", "1.6.0+mine", False),
        ("1.6.0.post1", "1.6.0", False),
    ],
)
def test_a_local_part_that_nobody_asked_for(found: str, wanted: str, same: bool) -> None:
    assert wheelhouse.satisfies(found, wanted) is same


# ---------------------------------------------------------------- add and look


def test_an_added_wheel_is_found_and_its_row_says_everything(house: Wheelhouse, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("nvcc …\n")
    wheel = make_wheel(tmp_path)
    row = house.add(wheel, make_row(wheel), log)
    look = house.look(ORIN, row["key"])
    assert look.fault is None and look.row == row
    assert look.path is not None and look.path.read_bytes() == b"wheel" and wheel.exists()
    assert look.path.parent.name == f"mamba_ssm-{row['key'][:12]}"
    assert (house.root / ORIN / row["log"]).read_text() == "nvcc …\n"
    assert (row["size"], row["recipe"], row["flags"], row["needed"]) == (5, RECIPE, ["A=1", "B=2"], [])
    assert row["added"].endswith("Z") and list(house.rows()) == [row]
    assert not list((house.root / ORIN).rglob("*.tmp"))


def test_nothing_there_is_nothing_made(house: Wheelhouse) -> None:
    assert house.look(ORIN, "0" * 64) == (None, None, None)
    assert list(house.rows()) == [] and house.verify() == [] and house.prune() == [] and house.unlock() == []
    assert not house.root.exists()


def test_classes_do_not_see_each_other(house: Wheelhouse, tmp_path: Path) -> None:
    row = added(house, tmp_path)
    assert house.look(CPU, row["key"]) == (None, None, None)


def test_a_wheel_is_hashed_once_for_a_whole_fleet(
    house: Wheelhouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = added(house, tmp_path)["key"]
    hashed: list[str] = []
    real = wheelhouse.sha256_file
    monkeypatch.setattr(wheelhouse, "sha256_file", lambda path: hashed.append(path) or real(path))
    assert all(Wheelhouse(house.root).look(ORIN, key).path for _host in range(200))
    assert hashed == []
    path = house.look(ORIN, key).path
    assert path is not None
    os.utime(path, ns=(1, 1))
    assert all(house.look(ORIN, key).path for _host in range(200))
    assert len(hashed) == 1


def test_a_changed_byte_is_found(house: Wheelhouse, tmp_path: Path) -> None:
    key = added(house, tmp_path)["key"]
    path = house.look(ORIN, key).path
    assert path is not None
    path.write_bytes(b"wheeL")
    look = house.look(ORIN, key)
    assert look.path is None and look.row is not None and "sha256" in str(look.fault)
    path.write_bytes(b"longer than it was")
    assert "18 bytes, the manifest says 5" in str(house.look(ORIN, key).fault)
    path.unlink()
    assert "No such file" in str(house.look(ORIN, key).fault)


def change_manifest(house: Wheelhouse, change: Callable[[Row], Any], class_id: str = ORIN) -> None:
    """Change all rows of a class behind the wheelhouse's back."""
    path = house.root / class_id / "manifest.json"
    data = json.loads(path.read_text())
    for row in data["wheels"].values():
        change(row)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"flags": ["A=1"]}, "make the key"),
        ({"source_sha256": "6" * 64}, "make the key"),
        ({"source_sha256": None}, "make the key"),
        ({"sm": "72"}, "make the key"),
        ({"class_id": CPU}, "recorded for class x86_64"),
        ({"key": "0" * 64}, "says 000"),
        ({"filename": "../../x.whl"}, "../../x.whl"),
        ({"sha256": None}, "has no sha256"),
    ],
)
def test_a_row_that_contradicts_itself_is_a_fault(
    house: Wheelhouse, tmp_path: Path, change: Row, reason: str
) -> None:
    key = added(house, tmp_path)["key"]
    change_manifest(house, lambda row: row.update(change))
    look = house.look(ORIN, key)
    assert look.path is None and reason in str(look.fault)


def test_what_an_older_release_built_is_no_fault(
    house: Wheelhouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = added(house, tmp_path)["key"]
    monkeypatch.setattr(wheelhouse, "RECIPE", RECIPE + 1)
    assert house.look(ORIN, key).fault is None
    wanted = {"key": "0" * 64, "source_sha256": SOURCE, "flags": ["A=1", "B=2"], "sm": "87"}
    assert house.explain(ORIN, "mamba_ssm", "2.2.4", wanted) == "this release builds wheels in another way"


DAMAGES = ["", "{", "[]", '{"schema": 2}', '{"schema": 1}', '{"schema": 1, "class_id": "x", "wheels": {}}', "\xff"]


@pytest.mark.parametrize("text", DAMAGES)
def test_a_damaged_manifest_is_never_an_empty_one(house: Wheelhouse, tmp_path: Path, text: str) -> None:
    key = added(house, tmp_path)["key"]
    path = house.root / ORIN / "manifest.json"
    path.write_bytes(text.encode("latin-1"))
    look = house.look(ORIN, key)
    assert look.row is None and look.path is None and str(path) in str(look.fault) and "mv '" in str(look.fault)
    for call in (
        lambda: list(house.rows()),
        lambda: added(house, tmp_path),
        lambda: house.set_aside(ORIN, key, "bad"),
        house.prune,
        house.verify,
        lambda: house.find_imported(ORIN, "mamba_ssm", "2.2.4"),
    ):
        with pytest.raises(Problem, match="cannot be read"):
            call()
    assert path.read_bytes() == text.encode("latin-1")
    assert len(list((house.root / ORIN).rglob("*.whl"))) == 1 and not list(house.root.rglob("*.tmp"))


def test_a_wheel_that_is_not_the_announced_one_does_not_come_in(house: Wheelhouse, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    row = make_row(wheel)
    with pytest.raises(Problem, match="has sha256") as refusal:
        house.add(wheel, {**row, "sha256": "0" * 64})
    assert row["sha256"] in refusal.value.found and "0" * 64 in refusal.value.expected
    with pytest.raises(Problem, match="comes with key"):
        house.add(wheel, {**row, "flags": []})
    with pytest.raises(Problem, match=r"\.\./x\.whl"):
        house.add(wheel, {**row, "filename": "../x.whl"})
    assert list(house.rows()) == [] and not list(house.root.rglob("*.whl"))


def test_a_folder_that_may_not_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "wheelhouse").write_text("a file")
    with pytest.raises(Problem, match=r"wheelhouse") as refusal:
        added(Wheelhouse(tmp_path / "wheelhouse"), tmp_path)
    assert "wheelhouse_path" in refusal.value.next_step


# ---------------------------------------------------------------- crashes and what they leave


def _crash_while_adding(root: Path, folder: Path) -> None:
    def die(*_arguments: Any) -> None:
        os._exit(9)

    wheelhouse.Wheelhouse._write_manifest = die  # type: ignore[method-assign] # only in this forked process
    added(Wheelhouse(root), folder, b"new")


@pytest.mark.parametrize("cure", ["add", "prune"])
def test_a_crash_between_wheel_and_manifest_leaves_nothing_for_ever(
    house: Wheelhouse, tmp_path: Path, cure: str
) -> None:
    child = FORK.Process(target=_crash_while_adding, args=(house.root, tmp_path))
    child.start()
    child.join(30)
    assert child.exitcode == 9
    left = list(house.root.rglob("*.whl"))
    assert len(left) == 1 and list(house.rows()) == []
    if cure == "add":
        wheel = make_wheel(tmp_path, b"new").rename(tmp_path / "mamba_ssm-2.2.4-2-cp310-cp310-linux_aarch64.whl")
        row = house.add(wheel, make_row(wheel))
        assert [path.name for path in house.root.rglob("*.whl")] == [wheel.name]
        assert house.look(ORIN, row["key"]).path
    else:
        going = house.prune(check=True)
        assert left[0].exists() and str(left[0].relative_to(house.root)) in [one.path for one in going]
        assert house.prune() == going
        assert not left[0].exists() and not left[0].parent.exists()
    assert house.strays(ORIN) == []


def test_a_row_goes_before_its_file_when_pruning_crashes(
    house: Wheelhouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        added(house, tmp_path, source_sha256=str(number) * 64)
    monkeypatch.setattr(wheelhouse, "_clear", lambda *_arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        house.prune(keep=1)
    assert [house.look(ORIN, row["key"]).fault for row in house.rows()] == [None]
    monkeypatch.undo()
    house.prune(keep=1)
    assert len(list(house.root.rglob("*.whl"))) == 1


# ---------------------------------------------------------------- many writers


def _add_many(root: Path, folder: Path, number: int) -> None:
    house = Wheelhouse(root)
    for turn in range(5):
        added(house, folder / str(number), f"{number} {turn}".encode(), source_sha256=f"{number * 100 + turn:064d}")
        if number == 0:
            house.prune(keep=1000)


def test_no_row_is_lost_when_many_processes_write(house: Wheelhouse, tmp_path: Path) -> None:
    children = [FORK.Process(target=_add_many, args=(house.root, tmp_path, number)) for number in range(6)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 6
    rows = list(house.rows())
    assert len({row["key"] for row in rows}) == 30
    assert [house.look(ORIN, row["key"]).fault for row in rows] == [None] * 30
    assert house.strays(ORIN) == []


# ---------------------------------------------------------------- why it is built anew


def test_explain_names_what_differs(house: Wheelhouse, tmp_path: Path) -> None:
    row = added(house, tmp_path)
    same = {"key": row["key"], "source_sha256": SOURCE, "flags": ["A=1", "B=2"], "sm": "87"}
    other = {**same, "key": "0" * 64}
    assert house.explain(ORIN, "mamba_ssm", "2.2.4", same) is None
    assert house.explain(ORIN, "causal_conv1d", "1.6.0", other) is None
    assert house.explain(CPU, "mamba_ssm", "2.2.4", other) is None
    assert house.explain(ORIN, "mamba_ssm", "2.2.5", other) == "version 2.2.5 wanted, 2.2.4 in the wheelhouse"
    changed = house.explain(ORIN, "mamba_ssm", "2.2.4", {**other, "source_sha256": "6" * 64})
    assert changed == "its source changed (sha256 555555555555 became 666666666666)"
    flags = house.explain(ORIN, "mamba_ssm", "2.2.4", {**other, "flags": []})
    assert flags == "other flags (none wanted, built with A=1 B=2)"
    assert "other GPU" in str(house.explain(ORIN, "mamba_ssm", "2.2.4", {**other, "sm": "72"}))


def test_explain_compares_with_the_newest(
    house: Wheelhouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(f"2026-01-0{day}T00:00:00Z" for day in range(1, 9))
    monkeypatch.setattr(wheelhouse, "now_text", lambda: next(clock))
    added(house, tmp_path)
    added(house, tmp_path, flags=[])
    wanted = {"key": "0" * 64, "source_sha256": "6" * 64, "flags": [], "sm": "87"}
    assert "other flags" not in str(house.explain(ORIN, "mamba_ssm", "2.2.4", wanted))


# ---------------------------------------------------------------- set aside, verify


def test_a_bad_wheel_is_set_aside_with_its_reason_and_can_be_built_anew(house: Wheelhouse, tmp_path: Path) -> None:
    row = added(house, tmp_path)
    (house.path_of(row)).write_bytes(b"wheeL")
    fault = house.look(ORIN, row["key"]).fault
    place = house.set_aside(ORIN, row["key"], str(fault))
    assert place.read_bytes() == b"wheeL" and place.parent == house.root / ORIN / "aside"
    note = json.loads(Path(f"{place}.json").read_text())
    assert note["reason"] == fault and note["row"] == row
    assert house.look(ORIN, row["key"]) == (None, None, None) and not house.path_of(row).parent.exists()
    assert house.set_aside(ORIN, row["key"], "again") == place.parent
    assert house.look(ORIN, added(house, tmp_path)["key"]).path


def test_setting_aside_spares_what_took_the_bad_ones_place(house: Wheelhouse, tmp_path: Path) -> None:
    seen = added(house, tmp_path)
    newer = added(house, tmp_path, b"built anew")
    assert seen["key"] == newer["key"]
    house.set_aside(ORIN, seen["key"], "bad", seen=seen)
    assert house.look(ORIN, newer["key"]).row == newer


def test_a_missing_file_is_set_aside_as_a_note(house: Wheelhouse, tmp_path: Path) -> None:
    row = added(house, tmp_path)
    house.path_of(row).unlink()
    place = house.set_aside(ORIN, row["key"], "gone")
    assert place.suffix == ".json" and json.loads(place.read_text())["reason"] == "gone"
    assert list(house.rows()) == []


def test_verify_believes_no_memory_and_sets_aside(house: Wheelhouse, tmp_path: Path) -> None:
    good = added(house, tmp_path)
    bad = added(house, tmp_path, source_sha256="6" * 64)
    path = house.path_of(bad)
    status = path.stat()
    path.write_bytes(b"wheeL")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a failing disk changes it
    assert house.look(ORIN, bad["key"]).fault is None
    checked = house.verify(check=True)
    assert [bool(one.fault) for one in checked if one.row["key"] == bad["key"]] == [True]
    assert len(list(house.rows())) == 2
    found = {one.row["key"]: one for one in house.verify()}
    assert found[good["key"]].fault is None and "sha256" in str(found[bad["key"]].fault)
    assert found[bad["key"]].aside is not None and [row["key"] for row in house.rows()] == [good["key"]]


def test_verify_sets_aside_what_inspection_refuses(house: Wheelhouse, tmp_path: Path) -> None:
    row = added(house, tmp_path)

    def refuse(_path: Path, _row: Row) -> Inspection:
        raise Problem("an x86-64 library", "aarch64", "build it")

    def warn(_path: Path, _row: Row) -> Inspection:
        return Inspection({}, ["many GPUs"], [])

    assert [(one.fault, one.warnings) for one in house.verify(warn)] == [(None, ["many GPUs"])]
    (finding,) = house.verify(refuse)
    assert "x86-64" in str(finding.fault) and list(house.rows()) == []
    assert finding.row["key"] == row["key"]


def test_a_row_s_expectation_comes_from_its_class() -> None:
    row = {"class_id": ORIN, "component": "causal_conv1d", "version": "1.6.0"}
    expected = wheelhouse.expectation_of(row)
    assert expected[:7] == (
        *("aarch64", "3.10", "2.35", "87", "causal_conv1d", "1.6.0"),
        ("causal_conv1d_cuda",),
    )
    assert expected.cxx11 is True


# ---------------------------------------------------------------- what others built


def test_an_imported_wheel_is_found_by_its_version(house: Wheelhouse, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, version="2.2.4+cu126torch2.5")
    seen: list[Row] = []

    def inspect(_path: Path, row: Row) -> Inspection:
        seen.append(dict(row))
        return Inspection({}, [], ["libcudart.so.12"])

    planned, changes = house.import_wheel(wheel, ORIN, "mamba_ssm", check=True)
    assert changes and not house.root.exists()
    row, changed = house.import_wheel(wheel, ORIN, "mamba_ssm", inspect=inspect)
    assert changed and row["key"] == planned["key"] and row["source_sha256"] is None
    assert row["needed"] == ["libcudart.so.12"] and seen[0]["class_id"] == ORIN and str(wheel) in row["origin"]
    assert house.import_wheel(wheel, ORIN, "mamba_ssm") == (row, False)
    assert house.find_imported(ORIN, "mamba_ssm", "2.2.4") == [row["key"]]
    assert house.look(ORIN, row["key"]).path == house.path_of(row)
    assert house.find_imported(ORIN, "mamba_ssm", "2.2.5") == []
    assert house.find_imported(ORIN, "causal_conv1d", "2.2.4") == []
    wanted = {"key": "0" * 64, "source_sha256": SOURCE, "flags": [], "sm": "87"}
    assert house.explain(ORIN, "mamba_ssm", "2.2.4", wanted) is None
    assert "2.2.5 wanted" in str(house.explain(ORIN, "mamba_ssm", "2.2.5", wanted))


def test_what_others_built_gets_a_key_of_its_own_whatever_was_asked_for(house: Wheelhouse, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    row = house.add(wheel, make_row(wheel, source_sha256=None, key="0" * 64, origin="index http://x"))
    assert row["key"] != "0" * 64 and house.look(ORIN, row["key"]).path
    change_manifest(house, lambda one: one.update(sha256="1" * 64))
    assert "make the key" in str(house.look(ORIN, row["key"]).fault)


def test_a_built_wheel_is_no_imported_one(house: Wheelhouse, tmp_path: Path) -> None:
    added(house, tmp_path)
    assert house.find_imported(ORIN, "mamba_ssm", "2.2.4") == []


def test_an_import_replaces_what_rotted_in_silence(house: Wheelhouse, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    row, _changed = house.import_wheel(wheel, ORIN, "mamba_ssm")
    path = house.path_of(row)
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert house.import_wheel(wheel, ORIN, "mamba_ssm")[1] and path.read_bytes() == wheel.read_bytes()


def test_an_import_is_refused_where_it_cannot_be_right(house: Wheelhouse, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    for problem, arguments, options in [
        ("not for x86_64|not for Python 3.11", (wheel, CPU, "mamba_ssm"), {}),
        ("is mamba_ssm", (wheel, ORIN, "causal_conv1d"), {}),
        ("has sha256", (wheel, ORIN, "mamba_ssm"), {"sha256": "0" * 64}),
        ("no file", (tmp_path / "mamba_ssm-1-cp310-cp310-linux_aarch64.whl", ORIN, "mamba_ssm"), {}),
        ("not a wheel's", (tmp_path / "mamba.whl", ORIN, "mamba_ssm"), {}),
    ]:
        with pytest.raises(Problem, match=problem):
            house.import_wheel(*arguments, **options)
    assert not house.root.exists()


# ---------------------------------------------------------------- prune


def test_the_newest_of_each_class_and_component_stay(
    house: Wheelhouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(f"2026-01-{day:02d}T00:00:00Z" for day in range(1, 20))
    monkeypatch.setattr(wheelhouse, "now_text", lambda: next(clock))
    old, middle, new = (added(house, tmp_path, source_sha256=str(number) * 64) for number in range(3))
    conv = make_wheel(tmp_path, component="causal_conv1d", version="1.6.0")
    house.add(conv, make_row(conv))
    cpu = make_wheel(tmp_path)
    house.add(cpu, make_row(cpu, CPU, sm="cpu"))
    going = house.prune(check=True)
    assert [one.path for one in going] == [f"{ORIN}/mamba_ssm-{old['key'][:12]}"] and "2 are newer" in going[0].reason
    assert going[0].size >= 5 and house.look(ORIN, old["key"]).path
    assert house.prune() == going and house.prune() == []
    assert house.look(ORIN, old["key"]) == (None, None, None) and not house.path_of(old).parent.exists()
    assert house.look(ORIN, middle["key"]).path and house.look(ORIN, new["key"]).path
    assert len(list(house.rows())) == 4
    # somebody wants another build of it, and may be about to take what is here
    for key in (middle["key"], "ab" * 32):
        with house.locked(ORIN, "mamba_ssm", key, silent, 1):
            left = house.path_of(middle).with_name("left")
            left.write_text("")
            assert house.prune(keep=1) == [] and left.exists()
            left.unlink()
    assert len(house.prune(keep=1)) == 1


def test_what_was_set_aside_goes_after_its_time(house: Wheelhouse, tmp_path: Path) -> None:
    place = house.set_aside(ORIN, added(house, tmp_path)["key"], "bad")
    assert house.prune() == []
    old = [path.rename(path.with_name("20200101T000000.000000Z-" + path.name)) for path in place.parent.iterdir()]
    assert len(old) == 2
    assert len(house.prune(aside_days=36500)) == 0
    assert sorted(one.path for one in house.prune()) == sorted(str(path.relative_to(house.root)) for path in old)
    assert not list(place.parent.iterdir())


def test_prune_leaves_what_is_being_written_and_what_a_person_put_there(house: Wheelhouse, tmp_path: Path) -> None:
    row = added(house, tmp_path)
    folder = house.path_of(row).parent
    (folder / ".new.whl.abc.tmp").write_bytes(b"half")
    (folder / ".old.whl.abc.tmp").write_bytes(b"half")
    os.utime(folder / ".old.whl.abc.tmp", (1, 1))
    mine = house.root / ORIN / "my.whl"
    mine.write_bytes(b"mine")
    assert house.strays(ORIN) == [folder / ".old.whl.abc.tmp", mine]
    assert [Path(one.path).name for one in house.prune()] == [".old.whl.abc.tmp"]
    assert mine.exists() and (folder / ".new.whl.abc.tmp").exists() and house.look(ORIN, row["key"]).path


@pytest.mark.parametrize(("keep", "days"), [(0, 30), (2, -1)])
def test_prune_refuses_senseless_settings(house: Wheelhouse, keep: int, days: float) -> None:
    with pytest.raises(Problem, match="wheelhouse_keep"):
        house.prune(keep, days)


# ---------------------------------------------------------------- the lock

KEY = "ab" * 32


def lock_file(house: Wheelhouse) -> Path:
    """Return where the lock of KEY lies."""
    return house.root / ORIN / "locks" / f"mamba_ssm-{KEY[:12]}.json"


def write_owner(house: Wheelhouse, **changes: Any) -> Path:
    """Write the lock of an owner; by default this very process."""
    with house.locked(ORIN, "mamba_ssm", KEY, silent, 1):
        data = json.loads(lock_file(house).read_text())
    path = lock_file(house)
    path.write_text(json.dumps({**data, "token": "of another", **changes}))
    return path


def test_the_lock_says_who_holds_it_and_goes_afterwards(house: Wheelhouse) -> None:
    with house.locked(ORIN, "mamba_ssm", KEY, silent, 1) as waited:
        data = json.loads(lock_file(house).read_text())
        assert waited == 0.0
    assert data["controller"] == socket.gethostname() and data["pid"] == os.getpid()
    assert data["user"] and data["started"].endswith("Z") and "mamba_ssm" in data["what"] and data["pid_start"]
    assert [path.name for path in lock_file(house).parent.iterdir()] == [".guard"]
    with pytest.raises(RuntimeError), house.locked(ORIN, "mamba_ssm", KEY, silent, 1):
        raise RuntimeError
    assert not lock_file(house).exists()


def _compete(root: Path, counter: Path, number: int) -> None:
    wheelhouse_lock.POLL_SECONDS = 0.01
    house = Wheelhouse(root)
    for _turn in range(4):
        with house.locked(ORIN, "mamba_ssm", KEY, silent, 60):
            inside = counter / "inside"
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # FileExistsError: two are inside
            time.sleep(0.01)
            (counter / f"{number}-{_turn}").write_text("")
            inside.unlink()


def run_all(children: list[Any]) -> list[int | None]:
    """Run processes to their end; returns their exit codes."""
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    return [child.exitcode for child in children]


@pytest.mark.parametrize("start", ["free", "held by a dead one"])
def test_exactly_one_process_holds_the_lock(house: Wheelhouse, tmp_path: Path, start: str) -> None:
    counter = tmp_path / "counter"
    counter.mkdir()
    if start != "free":
        write_owner(house, pid_start="another time")
    children = [FORK.Process(target=_compete, args=(house.root, counter, number)) for number in range(6)]
    assert run_all(children) == [0] * 6
    assert len(list(counter.iterdir())) == 24


def _take_over(root: Path, gate: Any, winners: Path, number: int) -> None:
    wheelhouse_lock.POLL_SECONDS = 0.01
    real = wheelhouse_lock.Lock._take_over

    def together(lock: Any, dead: Any) -> bool:
        if not getattr(lock, "met", False):
            lock.met = True
            gate.wait(30)  # all have judged the same owner dead before one acts
        return real(lock, dead)

    wheelhouse_lock.Lock._take_over = together  # type: ignore[method-assign] # only in this forked process
    said: list[str] = []
    try:
        with Wheelhouse(root).locked(ORIN, "mamba_ssm", KEY, said.append, 0.5):
            (winners / str(number)).write_text("\n".join(said))
            time.sleep(1.5)
    except Problem:
        os._exit(3)


def test_two_waiters_never_both_replace_a_dead_owner(house: Wheelhouse, tmp_path: Path) -> None:
    winners = tmp_path / "winners"
    winners.mkdir()
    write_owner(house, pid_start="another time")
    gate = FORK.Barrier(5)
    children = [FORK.Process(target=_take_over, args=(house.root, gate, winners, number)) for number in range(5)]
    codes = run_all(children)
    assert sorted(codes) == [0, 3, 3, 3, 3]
    (winner,) = winners.iterdir()
    assert "took over" in winner.read_text()


def _hold(root: Path, ready: Any) -> None:
    with Wheelhouse(root).locked(ORIN, "mamba_ssm", KEY, silent, 1):
        ready.set()
        time.sleep(60)


@pytest.fixture
def holder(house: Wheelhouse) -> Iterator[Any]:
    """Run a process that holds the lock."""
    ready = FORK.Event()
    child = FORK.Process(target=_hold, args=(house.root, ready))
    child.start()
    assert ready.wait(30)
    yield child
    child.kill()
    child.join(30)


def test_a_living_owner_is_waited_for_and_named(
    house: Wheelhouse, holder: Any, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheelhouse_lock, "ANNOUNCE_SECONDS", 0.1)
    said: list[str] = []
    begin = time.monotonic()
    with pytest.raises(Problem) as refusal, house.locked(ORIN, "mamba_ssm", KEY, said.append, 1):
        pass
    assert 1 <= time.monotonic() - begin < 5
    assert f"process {holder.pid}" in refusal.value.found and str(lock_file(house)) in refusal.value.found
    assert socket.gethostname() in refusal.value.found and "wheelhouse_patience_minutes" in refusal.value.next_step
    assert 2 <= len(said) <= 11 and "waiting for mamba_ssm" in said[0] and str(lock_file(house)) in said[0]
    assert lock_file(house).exists()
    (kept,) = house.unlock()
    assert not kept.removed and lock_file(house).exists()


def test_a_killed_owner_is_replaced_though_nobody_has_reaped_it(house: Wheelhouse, holder: Any, quick: None) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while wheelhouse_lock._process_start(holder.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    said: list[str] = []
    with house.locked(ORIN, "mamba_ssm", KEY, said.append, 5):
        assert json.loads(lock_file(house).read_text())["pid"] == os.getpid()
    assert len(said) == 1 and "took over" in said[0] and str(holder.pid) in said[0]


def test_a_process_id_that_came_again_is_another_owner(house: Wheelhouse, quick: None) -> None:
    write_owner(house, pid_start="1")
    with house.locked(ORIN, "mamba_ssm", KEY, silent, 5):
        pass


def test_another_machine_is_believed_alive_until_it_is_silent_for_ten_minutes(house: Wheelhouse, quick: None) -> None:
    path = write_owner(house, controller="other", user="ada", pid=1, started="2026-01-01T00:00:00Z")
    with pytest.raises(Problem, match="ada on other"), house.locked(ORIN, "mamba_ssm", KEY, silent, 0.1):
        pass
    old = time.time() - 700
    os.utime(path, (old, old))
    with pytest.raises(Problem) as refusal, house.locked(ORIN, "mamba_ssm", KEY, silent, 100):
        pass
    assert "ada on other" in refusal.value.found and str(path) in refusal.value.found
    assert "11m" in refusal.value.found and "wheelhouse_action=unlock" in refusal.value.next_step
    (going,) = house.unlock(check=True)
    assert going.removed and path.exists() and "ada on other" in going.owner
    (gone,) = house.unlock()
    assert gone.removed and not path.exists()


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_lock_is_nobody_s_to_take_but_can_be_unlocked(house: Wheelhouse, quick: None, text: str) -> None:
    path = write_owner(house)
    path.write_text(text)
    with pytest.raises(Problem, match="unknown owner"), house.locked(ORIN, "mamba_ssm", KEY, silent, 0.1):
        pass
    os.utime(path, (1, 1))
    with pytest.raises(Problem, match="no sign of life"), house.locked(ORIN, "mamba_ssm", KEY, silent, 0.1):
        pass
    assert [one.removed for one in house.unlock()] == [True] and not path.exists()


def test_a_restarted_machine_gets_its_own_lock_back_once_it_is_silent(house: Wheelhouse, quick: None) -> None:
    path = write_owner(house, boot="an earlier start")
    with pytest.raises(Problem, match="is held by"), house.locked(ORIN, "mamba_ssm", KEY, silent, 0.1):
        pass
    os.utime(path, (1, 1))
    with house.locked(ORIN, "mamba_ssm", KEY, silent, 0.1):
        pass


def test_the_heart_beats_and_stops(house: Wheelhouse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheelhouse_lock, "HEARTBEAT_SECONDS", 0.05)
    said: list[str] = []
    with house.locked(ORIN, "mamba_ssm", KEY, said.append, 1):
        os.utime(lock_file(house), (1, 1))
        deadline = time.monotonic() + 10
        while lock_file(house).stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lock_file(house).stat().st_mtime > 2
        lock_file(house).unlink()
        write = json.dumps({"token": "of another"})
        lock_file(house).write_text(write)
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "was removed by somebody" in said[0]
    assert lock_file(house).read_text() == write  # what another holds stays


def test_a_file_system_without_hard_links(house: Wheelhouse, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(wheelhouse_lock.os, "link", refuse)
    with house.locked(ORIN, "mamba_ssm", KEY, silent, 1):
        assert json.loads(lock_file(house).read_text())["pid"] == os.getpid()
        with pytest.raises(Problem, match="is held by"), house.locked(ORIN, "mamba_ssm", KEY, silent, 0.1):
            pass
    assert not lock_file(house).exists()


def test_locks_of_other_keys_do_not_wait(house: Wheelhouse) -> None:
    with (
        house.locked(ORIN, "mamba_ssm", KEY, silent, 0),
        house.locked(ORIN, "mamba_ssm", "cd" * 32, silent, 0),
        house.locked(CPU, "mamba_ssm", KEY, silent, 0),
    ):
        pass
