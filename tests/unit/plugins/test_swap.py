"""A swap file for the time of a build; the programs that would change the whole machine are stand-ins with a memory."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.jetson.mamba.plugins.module_utils import build, swap
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.modules import build_swap

HEAD = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
PAGE = os.sysconf("SC_PAGE_SIZE")


class Machine:
    """A machine below a folder: its memory, its mounts, and mkswap, swapon and swapoff that keep their state there."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.calls: list[str] = []
        self.refused: dict[str, str] = {}
        (top / "proc" / "self").mkdir(parents=True)
        (top / "proc" / "self" / "cgroup").write_text("")
        (top / "proc" / "swaps").write_text(HEAD)
        self.memory(8000, 6000)
        self.mount("ext4")
        self.path = str(top / "build" / "build.swap")
        (top / "build").mkdir()

    def memory(self, total: int, available: int) -> None:
        text = f"MemTotal: {total << 10} kB\nMemAvailable: {available << 10} kB\n"
        (self.top / "proc" / "meminfo").write_text(text)

    def mount(self, kind: str, options: str = "rw") -> None:
        (self.top / "proc" / "self" / "mountinfo").write_text(
            "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
            f"22 21 8:2 / {self.top} rw,relatime shared:2 master:1 - {kind} /dev/x {options}\n"
            "23 21 8:3 / /elsewhere rw - tmpfs tmpfs rw\n"
        )

    def swaps(self, *rows: str) -> None:
        (self.top / "proc" / "swaps").write_text(HEAD + "".join(row + "\n" for row in rows))

    def run(self, argv: Sequence[str]) -> tuple[int, str, str]:
        self.calls.append(argv[0])
        path = argv[-1]
        listed = (self.top / "proc" / "swaps").read_text()
        if argv[0] in self.refused:
            return 255, "", self.refused[argv[0]]
        if argv[0] == "mkswap":
            with open(path, "r+b") as handle:
                handle.seek(1052)
                handle.write(argv[2].encode())
                handle.seek(PAGE - 10)
                handle.write(b"SWAPSPACE2")
        elif argv[0] == "swapon":
            size = os.path.getsize(path) >> 10
            (self.top / "proc" / "swaps").write_text(f"{listed}{path} file {size - PAGE // 1024} 0 -2\n")
        else:
            lines = [line for line in listed.splitlines(True) if not line.startswith(path + " ")]
            (self.top / "proc" / "swaps").write_text("".join(lines))
        return 0, "", ""

    def ask(self, check: bool = False, **more: Any) -> dict[str, Any]:
        values = {
            "path": self.path, "state": "present", "size_mb": 8, "job_memory_mb": 2600, "reserve_mb": 1,
            "build_root": str(self.top / "build"),
        }
        self.calls = []
        return build_swap.serve({**values, **more}, self.run, check, str(self.top))

    def active(self) -> list[str]:
        return [line.split()[0] for line in (self.top / "proc" / "swaps").read_text().splitlines()[1:]]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# ---------------------------------------------------------------- memory


def test_zram_is_memory_that_is_counted_already(machine: Machine) -> None:
    machine.swaps(
        "/dev/zram0 partition 4096000 1024 5", "/dev/nvme0n1p2 partition 2048000 1024000 -2",
        r"/my\040swap file 1024000 0 -3",
    )
    assert swap.free_memory(str(machine.top)) == swap.Memory(6000, 2000)
    assert swap.free_memory(str(machine.top), without="/my swap") == swap.Memory(6000, 1000)


def test_a_control_groups_limit_is_a_limit(machine: Machine) -> None:
    proc = machine.top / "proc"
    group = machine.top / "fs" / "box"
    group.mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/box\n")
    (proc / "self" / "mountinfo").write_text(f"30 2 0:1 / {machine.top}/fs rw - cgroup2 cgroup2 rw\n")
    (group / "memory.events").write_text("oom_kill 0\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text(f"{900 << 20}\n")
    assert swap.free_memory(str(machine.top)).available_mb == 6000
    (group / "memory.max").write_text(f"{2000 << 20}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {400 << 20}\n")
    assert swap.free_memory(str(machine.top)).available_mb == 1500


@pytest.mark.parametrize(
    ("setting", "need", "available", "disk", "expected"),
    [
        (0, 2600, 100, 0, 0),
        (4096, 2600, 99999, 0, 4096),
        (-1, 2600, 2900, 0, 0),
        (-1, 2600, 1000, 1900, 0),
        (-1, 2600, 2899, 0, 2048),
        (-1, 2600, 1000, 0, 3072),
        (-1, 2600, 0, 0, 4096),
    ],
)
def test_the_size_is_what_one_compiler_lacks(setting: int, need: int, available: int, disk: int, expected: int) -> None:
    assert swap.wanted_size(setting, need, swap.Memory(available, disk)) == expected


# ---------------------------------------------------------------- the file


def test_it_is_made_used_found_again_and_removed(machine: Machine) -> None:
    made = machine.ask()
    assert made["changed"] and made["diff"] == {
        "before": {"path": machine.path, "size_mb": 0, "active": False},
        "after": {"path": machine.path, "size_mb": 8, "active": True},
    }
    assert machine.calls == ["mkswap", "swapon"]
    found = os.stat(machine.path)
    assert stat.S_IMODE(found.st_mode) == 0o600 and found.st_size == 8 << 20 == found.st_blocks * 512
    assert os.listdir(machine.top / "build") == ["build.swap"]
    again = machine.ask()
    assert not again["changed"] and machine.calls == [] and again["swap"] == made["swap"]
    gone = machine.ask(state="absent")
    assert gone["changed"] and machine.calls == ["swapoff"] and gone["swap"]["size_mb"] == 0
    assert not os.path.exists(machine.path) and machine.active() == []
    assert not machine.ask(state="absent")["changed"]


def test_check_mode_changes_nothing_and_says_the_same(machine: Machine) -> None:
    for state in ("present", "absent"):
        would = machine.ask(check=True, state=state)
        assert machine.calls == []
        did = machine.ask(state=state)
        assert {**would, "swap": 0} == {**did, "swap": 0} and did["changed"]


def test_a_larger_one_replaces_it_and_a_smaller_wish_is_met_by_it(machine: Machine) -> None:
    machine.ask()
    assert not machine.ask(size_mb=4)["changed"]
    assert machine.ask(size_mb=16)["changed"]
    assert machine.calls == ["swapoff", "mkswap", "swapon"] and os.path.getsize(machine.path) == 16 << 20
    assert machine.active() == [machine.path]


def test_what_a_killed_run_left_is_used_or_cleared(machine: Machine) -> None:
    machine.ask()
    machine.swaps()
    assert machine.ask()["changed"] and machine.active() == [machine.path]
    machine.swaps()
    (machine.top / "build" / "build.swap.partial").write_bytes(b"half")
    assert machine.ask(size_mb=0)["changed"] and os.listdir(machine.top / "build") == []
    # killed while it was being written: nothing but the half file
    (machine.top / "build" / "build.swap.partial").write_bytes(b"half")
    assert machine.ask()["changed"] and os.listdir(machine.top / "build") == ["build.swap"]


def test_automatically_there_is_none_where_memory_does_not_lack(machine: Machine) -> None:
    assert machine.ask(size_mb=-1) == {
        "changed": False, "due": False, "kept": "", "swap": {"path": machine.path, "size_mb": 0, "active": False},
        "diff": {"before": {"path": machine.path, "size_mb": 0, "active": False},
                 "after": {"path": machine.path, "size_mb": 0, "active": False}},
    }
    machine.memory(4000, 1000)
    assert machine.ask(check=True, size_mb=-1)["swap"]["size_mb"] == 3072
    with pytest.raises(Problem, match="size_mb is -2"):
        machine.ask(size_mb=-2)


def test_it_can_be_asked_ahead_and_without_being_root(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    os.rmdir(machine.top / "build")
    assert machine.ask(check=True)["due"]
    os.mkdir(machine.top / "build")
    machine.ask()

    def refused(*_words: Any, **_more: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    asked = machine.ask(check=True)
    assert not asked["due"] and asked["swap"] == {"path": machine.path, "size_mb": 8, "active": True}
    os.chmod(machine.path, 0o640)
    with pytest.raises(Problem, match="is no swap file"):
        machine.ask(check=True)


def test_while_a_build_runs_its_swap_stays(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.ask()
    monkeypatch.setattr(build, "job_state", lambda folder: "running" if folder.endswith("mamba_ssm-ab") else "done")
    for name in ("mamba_ssm-ab", "causal_conv1d-cd"):
        (machine.top / "build" / name).mkdir()
    kept = machine.ask(state="absent")
    assert not kept["changed"] and kept["kept"] == "mamba_ssm-ab is being built" and machine.active() == [machine.path]
    monkeypatch.setattr(build, "job_state", lambda folder: "done")
    assert machine.ask(state="absent")["changed"] and machine.active() == []


def test_somebody_elses_file_is_never_touched(machine: Machine, tmp_path: Path) -> None:
    Path(machine.path).write_bytes(b"photos")
    for state in ("present", "absent"):
        with pytest.raises(Problem, match="is no swap file of this project"):
            machine.ask(state=state)
    assert Path(machine.path).read_bytes() == b"photos"
    os.unlink(machine.path)
    other = tmp_path / "other"
    other.write_bytes(b"x")
    os.symlink(other, machine.path)
    with pytest.raises(Problem, match="is no swap file"):
        machine.ask()
    # of another label
    os.unlink(machine.path)
    Path(machine.path).write_bytes(b"\0" * (PAGE - 10) + b"SWAPSPACE2")
    with pytest.raises(Problem, match="is no swap file"):
        machine.ask(state="absent")


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("btrfs", "rw,ssd", "nodatacow"),
        ("zfs", "rw", "takes memory"),
        ("overlay", "rw,lowerdir=/a", "layers"),
        ("tmpfs", "rw", "memory itself"),
        ("nfs4", "rw", "network"),
        ("f2fs", "rw,mode=lfs", "moves blocks"),
        ("f2fs", "rw,mode=adaptive,compress_algorithm=lz4", "compression"),
        ("vfat", "rw", "no owners"),
        ("fuse.sshfs", "rw", "a program of its own"),
        ("ext4", "ro", "read-only"),
        ("brandnewfs", "rw", "not known"),
    ],
)
def test_file_systems_that_cannot_hold_it_are_named(machine: Machine, kind: str, options: str, words: str) -> None:
    machine.mount(kind, options)
    with pytest.raises(Problem) as caught:
        machine.ask(check=True)
    assert f"is on {kind} (mounted at {machine.top})" in caught.value.found and words in caught.value.found
    assert "wheelhouse_swap_mb: 0" in caught.value.next_step
    assert os.listdir(machine.top / "build") == []


@pytest.mark.parametrize(
    ("kind", "options"), [("xfs", "rw"), ("btrfs", "rw,nodatacow"), ("f2fs", "rw,mode=adaptive"), ("ext3", "rw")]
)
def test_file_systems_that_can_hold_it(machine: Machine, kind: str, options: str) -> None:
    machine.mount(kind, options)
    assert machine.ask()["changed"]


def test_the_innermost_and_latest_mount_counts(machine: Machine) -> None:
    path = machine.top / "proc" / "self" / "mountinfo"
    path.write_text(
        rf"22 21 8:2 / {machine.top}/build rw - ext4 /dev/x rw" "\n"
        rf"24 21 8:2 / {machine.top}/buil rw - nfs /dev/x rw" "\n"
        rf"23 21 8:2 / {machine.top}/build rw - tmpfs /dev/x rw" "\n"
        r"21 1 8:1 / / rw - zfs pool rw" "\n"
    )
    assert swap.file_system(str(machine.top / "build"), str(machine.top)).kind == "tmpfs"
    (machine.top / "a b").mkdir()
    path.write_text(rf"22 21 8:2 / {machine.top}/a\040b rw - xfs /dev/x rw" "\n")
    assert swap.file_system(str(machine.top / "a b"), str(machine.top)).kind == "xfs"
    with pytest.raises(Problem, match="does not tell"):
        swap.file_system("/elsewhere", str(machine.top))


def test_a_full_disk_is_refused_before_anything_is_written(machine: Machine) -> None:
    with pytest.raises(Problem, match=r"MB free") as caught:
        machine.ask(reserve_mb=1 << 40)
    assert "make room" in caught.value.next_step and machine.calls == []
    with pytest.raises(Problem, match="no folder"):
        machine.ask(path=str(machine.top / "absent" / "file"))


@pytest.mark.parametrize("program", ["mkswap", "swapon"])
def test_a_program_that_refuses_leaves_nothing(machine: Machine, program: str) -> None:
    machine.refused[program] = f"{program}: Operation not permitted"
    with pytest.raises(Problem, match="Operation not permitted"):
        machine.ask()
    assert os.listdir(machine.top / "build") == [] and machine.active() == []


def test_what_does_not_fit_into_memory_stays_and_is_said(machine: Machine) -> None:
    machine.ask()
    machine.refused["swapoff"] = "swapoff: Cannot allocate memory"
    with pytest.raises(Problem, match="Cannot allocate memory") as caught:
        machine.ask(state="absent")
    assert "free -m" in caught.value.next_step and os.path.exists(machine.path)


def test_a_write_that_fails_leaves_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int, _offset: int, _size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(Problem, match="No space left") as caught:
        machine.ask()
    assert "smaller" in caught.value.next_step and os.listdir(machine.top / "build") == []


# ---------------------------------------------------------------- for real


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system of its own, in a file."""
    image, place = tmp_path / "image", tmp_path / "mount"
    place.mkdir()
    with open(image, "wb") as handle:
        handle.truncate(96 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
    yield place
    subprocess.run(["swapoff", str(place / "build.swap")], check=False, capture_output=True)
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.skipif(os.environ.get("JETSON_MAMBA_TEST_SWAP") != "1", reason="JETSON_MAMBA_TEST_SWAP=1: swaps for real")
def test_for_real_on_a_file_system_of_its_own(loop: Path) -> None:
    def run(argv: Sequence[str]) -> tuple[int, str, str]:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
        return done.returncode, done.stdout, done.stderr

    path = str(loop / "build.swap")
    wish = {"path": path, "state": "present", "size_mb": 32, "job_memory_mb": 1, "reserve_mb": 1, "build_root": ""}
    before = swap.active_swaps()
    assert build_swap.serve(wish, run, True)["changed"] and not os.path.exists(path)
    assert build_swap.serve(wish, run, False)["changed"]
    assert [one.path for one in swap.active_swaps()] == [*(one.path for one in before), path]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert not build_swap.serve(wish, run, False)["changed"]
    assert build_swap.serve({**wish, "size_mb": 48}, run, False)["changed"]
    # swapped off by somebody, as by a restart of the device: the file is ours, and is used again
    subprocess.run(["swapoff", path], check=True)
    assert build_swap.serve(wish, run, False)["changed"]
    with pytest.raises(Problem, match="MB free"):
        build_swap.serve({**wish, "size_mb": 512}, run, False)
    assert build_swap.serve({**wish, "state": "absent"}, run, False)["changed"]
    assert swap.active_swaps() == before and os.listdir(loop) == ["lost+found"]


def test_what_the_module_takes_is_what_it_documents() -> None:
    documented = yaml.safe_load(build_swap.DOCUMENTATION)["options"]
    spec = build_swap.argument_spec()
    assert set(spec) == set(documented)
    for name, option in spec.items():
        for word in ("type", "default", "choices", "required"):
            assert option.get(word) == documented[name].get(word), name
