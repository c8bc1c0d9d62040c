"""Patching installed files: every state that a device can be in, on a small package of its own."""

from __future__ import annotations

import base64
import csv
import difflib
import hashlib
import json
import os
import py_compile
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import files, patches, records
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

ONE = ["import sys\n", "\n", "def one():\n", "    return 1\n", "\n", "def other():\n", "    return 'o'\n"]
ONE_B = [line.replace("return 1", "return 11") for line in ONE]
ONE_C = [line.replace("return 'o'", "return 'oo'") for line in ONE_B]
TWO = ["def two():\n", "    return 2\n"]
TWO_B = ["def two():\n", "    return 22\n"]
TOOL = shutil.which("patch")


def digest(lines: list[str]) -> str:
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def step(file: str, target: str, before: list[str], after: list[str]) -> dict[str, Any]:
    diff = difflib.unified_diff(before, after, f"a/{target}", f"b/{target}")
    return {
        "file": file,
        "target": target,
        "sha256_before": digest(before),
        "sha256_after": digest(after),
        "diff": "".join(diff),
    }


SERIES = [
    step("0001-one.patch", "demo/one.py", ONE, ONE_B),
    step("0002-two.patch", "demo/deep/two.py", TWO, TWO_B),
    step("0003-one.patch", "demo/one.py", ONE_B, ONE_C),
]


class Device:
    """A site folder with demo 1.0 installed in it as pip leaves it, and a state folder."""

    def __init__(self, folder: Path) -> None:
        self.site = folder / "env" / "lib" / "python3.11" / "site-packages"
        self.state = folder / "state"
        self.info = self.site / "demo-1.0.dist-info"
        self.one = self.site / "demo" / "one.py"
        self.two = self.site / "demo" / "deep" / "two.py"
        self.site.mkdir(parents=True)

    def install(self, version: str = "1.0") -> None:
        self.info = self.site / f"demo-{version}.dist-info"
        self.info.mkdir(exist_ok=True)
        self.two.parent.mkdir(parents=True, exist_ok=True)
        self.one.write_text("".join(ONE))
        self.two.write_text("".join(TWO))
        (self.site / "demo" / "a,b.txt").write_text("x")
        rows: list[list[Any]] = [["../../../bin/demo", "", ""]]
        for path in (self.one, self.two, self.site / "demo" / "a,b.txt"):
            content = path.read_bytes()
            text = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            rows.append([str(path.relative_to(self.site)), f"sha256={text}", len(content)])
        rows.append([f"{self.info.name}/RECORD", "", ""])
        with open(self.info / "RECORD", "w", newline="") as stream:
            csv.writer(stream).writerows(rows)

    def run(self, series: Any = SERIES, check: bool = False, tool: str | None = TOOL, **other: Any) -> dict[str, Any]:
        request = patches.Request(str(self.site), str(self.state), "demo", "1.0", series, **other)
        return patches.realise(request, check, tool)

    def tree(self, folder: Path | None = None) -> dict[str, bytes]:
        top = folder or self.site.parents[3]
        return {str(path.relative_to(top)): path.read_bytes() for path in sorted(top.rglob("*")) if path.is_file()}

    def damage(self) -> str | None:
        (self.site.parents[2] / "bin").mkdir(exist_ok=True)
        (self.site.parents[2] / "bin" / "demo").touch()
        return records.find_damage(str(self.site), str(self.info), hashed=True)


@pytest.fixture
def device(tmp_path: Path) -> Device:
    assert TOOL, "GNU patch is needed: apt-get install patch"
    made = Device(tmp_path)
    made.install()
    return made


def statuses(result: dict[str, Any], key: str = "status") -> dict[str, str]:
    return {row["target"]: row[key] for row in result["files"]}


def test_applies_chains_and_keeps_record_true(device: Device) -> None:
    before = (device.info / "RECORD").read_bytes()
    result = device.run()
    assert result["changed"] is True
    assert statuses(result, "status_before") == {"demo/one.py": "pristine", "demo/deep/two.py": "pristine"}
    assert device.one.read_text() == "".join(ONE_C)
    assert device.two.read_text() == "".join(TWO_B)
    assert device.damage() is None
    after = (device.info / "RECORD").read_bytes()
    assert after.count(b"\r\n") == before.count(b"\r\n") == after.count(b"\n")
    assert b'"demo/a,b.txt",sha256=' in after
    changed = [old for old, new in zip(before.splitlines(), after.splitlines(), strict=True) if old != new]
    assert [line.split(b",")[0] for line in changed] == [b"demo/one.py", b"demo/deep/two.py"]


def test_second_run_changes_nothing(device: Device) -> None:
    device.run()
    tree = device.tree()
    result = device.run(tool=None)
    assert (result["changed"], result["diff"]) == (False, [])
    assert set(statuses(result, "status_before").values()) == {"patched"}
    assert device.tree() == tree


def test_absent_restores_every_byte(device: Device) -> None:
    pristine = device.tree()
    device.run()
    assert device.run(present=False, tool=None)["changed"] is True
    assert device.tree() == pristine
    assert not list(device.state.rglob("*"))
    assert device.run(present=False, tool=None)["changed"] is False


def test_absent_without_the_original_takes_the_patches_back(device: Device) -> None:
    pristine = device.tree()
    device.run()
    shutil.rmtree(device.state)
    result = device.run(present=False)
    assert statuses(result) == {"demo/one.py": "pristine", "demo/deep/two.py": "pristine"}
    assert device.tree() == pristine


def test_check_mode_shows_the_real_diff_and_writes_nothing(device: Device) -> None:
    tree = device.tree()
    result = device.run(check=True)
    assert result["changed"] is True
    assert device.tree() == tree
    entry = next(entry for entry in result["diff"] if entry["before_header"].endswith("one.py"))
    assert (entry["before"], entry["after"]) == ("".join(ONE), "".join(ONE_C))
    row = next(entry for entry in result["diff"] if entry["before_header"].endswith("RECORD"))
    assert row["before"].count("\n") == 2 and "a,b.txt" not in row["after"]
    assert [row["sha256"] for row in result["files"]] == [digest(ONE_C), digest(TWO_B)]


def test_one_unknown_file_stops_all(device: Device) -> None:
    device.two.write_bytes(device.two.read_bytes().replace(b"2", b"3", 1))
    found = hashlib.sha256(device.two.read_bytes()).hexdigest()
    tree = device.tree()
    with pytest.raises(Problem) as caught:
        device.run()
    assert str(device.two) in caught.value.found and found in caught.value.found
    assert digest(TWO) in caught.value.expected and digest(TWO_B) in caught.value.expected
    assert "demo_reinstall=true" in caught.value.next_step
    assert device.tree() == tree


def test_one_corrupt_byte_of_a_patched_file_is_named_and_left(device: Device) -> None:
    device.run()
    content = bytearray(device.one.read_bytes())
    content[5] ^= 1
    device.one.write_bytes(bytes(content))
    tree = device.tree()
    for present in (True, False):
        with pytest.raises(Problem, match=r"one\.py has sha256"):
            device.run(present=present)
    assert device.tree() == tree


def test_all_unknown_files_are_named_at_once(device: Device) -> None:
    device.one.write_text("x\n")
    device.two.unlink()
    with pytest.raises(Problem) as caught:
        device.run()
    assert "one.py has sha256" in caught.value.found and "two.py is missing" in caught.value.found


def test_reinstalled_package_is_patched_again(device: Device) -> None:
    device.run()
    patched = device.tree()
    device.install()
    result = device.run()
    assert result["changed"] is True
    assert device.tree() == patched


@pytest.mark.parametrize("crash_after", range(1, 7))
def test_a_crash_anywhere_is_mended_by_the_next_run(
    device: Device, monkeypatch: pytest.MonkeyPatch, crash_after: int
) -> None:
    write, done = files.write_atomic, []

    def crashing(path: str, data: bytes, mode: int) -> None:
        if len(done) == crash_after:
            raise KeyboardInterrupt
        done.append(path)
        write(path, data, mode)

    whole = Device(device.state.parent / "whole")
    whole.install()
    whole.run()
    monkeypatch.setattr(files, "write_atomic", crashing)
    if crash_after < 6:
        with pytest.raises(KeyboardInterrupt):
            device.run()
    else:
        device.run()
    assert len(done) == crash_after  # two originals, two files, RECORD, the memory
    monkeypatch.setattr(files, "write_atomic", write)
    assert device.run()["changed"] is (crash_after < 6)
    assert device.tree(device.site) == whole.tree(whole.site)
    assert device.tree(device.state) == whole.tree(whole.state)


def test_what_a_power_cut_left_beside_the_target_is_removed(device: Device) -> None:
    left = device.one.with_name(".one.py.abc123.tmp")
    left.write_text("half")
    device.run()
    assert not left.exists()


def test_partly_patched_file_gets_the_rest(device: Device) -> None:
    device.run(series=SERIES[:2])
    result = device.run()
    assert statuses(result, "status_before")["demo/one.py"] == "partial"
    assert device.one.read_text() == "".join(ONE_C)
    device.run(present=False)
    assert device.one.read_text() == "".join(ONE)


def test_an_earlier_series_of_ours_is_replaced(device: Device) -> None:
    older = [step("0001-one.patch", "demo/one.py", ONE, [*ONE, "# an older patch\n"])]
    device.run(series=older)
    result = device.run()
    assert statuses(result, "status_before")["demo/one.py"] == "outdated"
    assert device.one.read_text() == "".join(ONE_C)
    assert device.damage() is None


def test_a_patch_no_longer_needed_is_taken_back(device: Device) -> None:
    pristine = device.tree()
    device.run()
    result = device.run(series=SERIES[1:2])
    assert statuses(result) == {"demo/one.py": "pristine", "demo/deep/two.py": "patched"}
    assert device.one.read_text() == "".join(ONE)
    assert device.damage() is None
    assert device.run(series=SERIES[1:2])["changed"] is False
    assert device.run(series=[])["changed"] is True
    (device.site.parents[2] / "bin" / "demo").unlink()
    assert device.tree() == pristine


def test_a_file_that_nobody_asks_for_any_more_and_somebody_replaced_is_left(device: Device) -> None:
    device.run()
    device.one.write_text("# theirs\n")
    result = device.run(series=SERIES[1:2])
    assert statuses(result) == {"demo/deep/two.py": "patched"}
    assert device.one.read_text() == "# theirs\n"
    assert device.run(series=SERIES[1:2])["changed"] is False


def test_no_series_and_no_memory_is_no_work(device: Device) -> None:
    shutil.rmtree(device.site)
    assert device.run(series=[], tool=None)["changed"] is False


def test_not_installed_is_a_preview_in_check_mode_and_a_problem_else(tmp_path: Path) -> None:
    device = Device(tmp_path)
    result = device.run(check=True, tool=None)
    assert result["changed"] is True
    assert [entry["prepared"] for entry in result["diff"]] == [SERIES[0]["diff"], SERIES[2]["diff"], SERIES[1]["diff"]]
    assert set(statuses(result, "status_before").values()) == {"absent"}
    with pytest.raises(Problem, match="demo is not installed"):
        device.run()
    assert device.run(present=False)["changed"] is False


def test_another_version_is_refused(device: Device) -> None:
    shutil.rmtree(device.info)
    device.install("1.1")
    tree = device.tree()
    with pytest.raises(Problem, match=r"demo 1\.1 is installed"):
        device.run()
    assert device.run(check=True)["changed"] is True
    assert device.tree() == tree
    shutil.rmtree(device.info)
    device.install("1.0+cu126")
    assert device.run()["changed"] is True


def test_two_records_of_one_package_are_refused(device: Device) -> None:
    (device.site / "Demo-0.9.dist-info").mkdir()
    with pytest.raises(Problem, match="recorded 2 times"):
        device.run()


@pytest.mark.parametrize("damage", ["no RECORD", "no row"])
def test_record_that_cannot_be_kept_true_stops_all(device: Device, damage: str) -> None:
    record = device.info / "RECORD"
    lines = record.read_bytes().splitlines(keepends=True)
    record.unlink()
    if damage == "no row":
        record.write_bytes(b"".join(line for line in lines if b"two.py" not in line))
    tree = device.tree()
    with pytest.raises(Problem, match=r"RECORD (is missing|does not name demo/deep/two\.py)"):
        device.run()
    assert device.tree() == tree


def test_links_are_refused(device: Device, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.move(str(device.site / "demo"), elsewhere)
    (device.site / "demo").symlink_to(elsewhere)
    tree = device.tree(elsewhere)
    with pytest.raises(Problem, match="through a link"):
        device.run()
    assert device.tree(elsewhere) == tree


def test_a_site_folder_reached_through_a_link_is_fine(device: Device) -> None:
    (device.site.parents[1] / "lib64").mkdir()
    link = device.site.parents[1] / "lib64" / "site"
    link.symlink_to(device.site)
    request = patches.Request(str(link), str(device.state), "demo", "1.0", SERIES)
    assert patches.realise(request, False, TOOL)["changed"] is True
    assert device.damage() is None


def test_the_state_folder_stays_outside(device: Device) -> None:
    device.state = device.site / "state"
    with pytest.raises(Problem, match="originals would be kept"):
        device.run()


def test_missing_tool_names_the_package_before_anything_is_touched(device: Device) -> None:
    tree = device.tree()
    with pytest.raises(Problem) as caught:
        device.run(tool=None)
    assert "apt-get install patch" in caught.value.next_step
    assert device.tree() == tree


def test_a_series_that_promises_another_checksum_changes_nothing(device: Device) -> None:
    tree = device.tree()
    with pytest.raises(Problem, match=r"0003-one\.patch leads to"):
        device.run(series=[*SERIES[:2], dict(SERIES[2], sha256_after="0" * 64)])
    assert device.tree() == tree


def test_a_diff_that_needs_fuzz_is_refused(device: Device) -> None:
    drifted = [line.replace("import sys", "import os") for line in ONE]
    device.one.write_text("".join(drifted))
    loose = dict(SERIES[0], sha256_before=digest(drifted))
    with pytest.raises(Problem, match="does not apply"):
        device.run(series=[loose])


def test_mode_is_kept_and_stale_byte_code_goes(device: Device) -> None:
    device.one.chmod(0o640)
    cache = py_compile.compile(
        str(device.one), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    other = device.one.parent / "__pycache__" / "one_more.cpython-311.pyc"
    other.write_bytes(b"")
    device.run()
    assert stat.S_IMODE(device.one.stat().st_mode) == 0o640
    assert cache is not None and not os.path.exists(cache)
    assert other.exists()


def test_hard_link_to_a_cache_is_not_written_through(device: Device, tmp_path: Path) -> None:
    os.link(device.one, tmp_path / "cached.py")
    device.run()
    assert (tmp_path / "cached.py").read_text() == "".join(ONE)


def test_damaged_memory_is_no_obstacle(device: Device) -> None:
    device.run()
    memory = Path(patches.memory_path(str(device.state), "demo"))
    outside = {"files": {"../../x": {"pristine": "0" * 64, "patched": "1" * 64}}}
    for text in ("{", "[]", json.dumps(outside)):
        memory.write_text(text)
        assert device.run()["changed"] is True
        assert set(json.loads(memory.read_text())["files"]) == {"demo/one.py", "demo/deep/two.py"}


def test_source_tree_needs_no_record(device: Device) -> None:
    shutil.rmtree(device.info)
    assert device.run(tracked=False)["changed"] is True
    assert device.run(tracked=False)["changed"] is False
    assert device.run(tracked=False, present=False)["changed"] is True
    assert device.one.read_text() == "".join(ONE)
    shutil.rmtree(device.site)
    assert device.run(tracked=False, check=True)["changed"] is True
    with pytest.raises(Problem, match="not installed"):
        device.run(tracked=False)


def test_hashes_for_the_planner() -> None:
    assert patches.pristine_hashes(SERIES) == {"demo/one.py": digest(ONE), "demo/deep/two.py": digest(TWO)}
    assert patches.expected_hashes(SERIES) == {"demo/one.py": digest(ONE_C), "demo/deep/two.py": digest(TWO_B)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "/etc/passwd"}, "has the target"),
        ({"target": "demo/../../x.py"}, "has the target"),
        ({"target": "demo//one.py"}, "has the target"),
        ({"target": "demo\\one.py"}, "has the target"),
        ({"sha256_before": "ABC"}, "has sha256_before: ABC"),
        ({"sha256_after": SERIES[0]["sha256_before"]}, "same checksum"),
        ({"diff": ""}, "has no diff"),
    ],
)
def test_malformed_series_is_refused(device: Device, change: dict[str, str], message: str) -> None:
    with pytest.raises(Problem, match=message):
        device.run(series=[dict(SERIES[0], **change)])


def test_broken_chain_is_refused() -> None:
    with pytest.raises(Problem, match=r"0003-one\.patch starts from"):
        patches.chains([SERIES[0], dict(SERIES[2], sha256_before="0" * 64)])
