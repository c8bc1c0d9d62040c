"""The device's half of debian_packages: what it says of itself, what it waits for, and what it installs."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import apt_root, deb_install, debs
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

BEFORE = """\
Package: libc6
Status: install ok installed
Architecture: arm64
Version: 2.35
"""
AFTER = BEFORE + "\nPackage: gcc\nStatus: install ok installed\nArchitecture: arm64\nVersion: 12\n"
SIMULATED = "Inst libgcc (1 local [arm64])\nInst gcc (12 local [arm64])\nInst libc6 [2.35] (2.36 local [arm64])\n"


class Programs:
    """Stands for the programs of a device: answers by the words of a command, and notes every call."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.answers: dict[str, tuple[int, str, str]] = {
            "--print-architecture": (0, "arm64\n", ""),
            "--print-foreign-architectures": (0, "armhf\n", ""),
            "--simulate": (0, SIMULATED, ""),
            "showauto": (0, "libc6\n", ""),
            "Installed-Size": (0, "100\n", ""),
            "--compare-versions": (1, "", ""),
        }
        self.status = BEFORE
        self.install_status = 0
        self.present = False

    def __call__(self, argv: list[str]) -> tuple[int, str, str]:
        self.calls.append(argv)
        return next((answer for word, answer in self.answers.items() if word in argv), (0, "", ""))

    def call(self, argv: list[str], stdout: Any, **_options: Any) -> int:
        """Stand for apt-get's installing run."""
        self.calls.append(argv)
        self.present = os.path.isfile(argv[-1])
        stdout.write(b"Setting up gcc\nE: the last line\n")
        if self.install_status == 0:
            self.status = AFTER
        return self.install_status


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Programs:
    device = Programs()
    monkeypatch.setattr(apt_root, "run", device)
    monkeypatch.setattr(subprocess, "call", device.call)
    monkeypatch.setattr(deb_install, "read_status", lambda: list(debs.stanzas(device.status)))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "chown", lambda *_words: None)
    return device


@pytest.fixture
def delivery(tmp_path: Path) -> Path:
    return tmp_path / "delivery"


@pytest.fixture
def files(tmp_path: Path) -> list[dict[str, str]]:
    (tmp_path / "delivery").mkdir()
    (tmp_path / "delivery" / "gcc.deb").write_bytes(b"gcc")
    return [{"filename": "gcc.deb", "sha256": hashlib.sha256(b"gcc").hexdigest()}]


GCC = [debs.parse_wish("gcc")]


def test_a_question_has_a_short_answer(programs: Programs, tmp_path: Path) -> None:
    assert deb_install.query(GCC, str(tmp_path)) == {
        "missing": [{"name": "gcc", "installed": ""}],
        "unfinished": [],
        "architecture": "arm64",
        "architectures": ["arm64", "armhf"],
        "tmp": str(tmp_path),
    }
    assert deb_install.query(GCC, "/not/there/yet")["tmp"] == "/tmp"


def test_unfinished_work_is_told(programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deb_install, "UPDATES", str(tmp_path))
    (tmp_path / "0003").write_text("")
    programs.status = BEFORE.replace("ok installed", "ok half-configured")
    assert deb_install.query(GCC, "/tmp")["unfinished"] == ["dpkg was interrupted", "libc6 is half-configured"]


def test_only_the_files_that_came_are_installed(
    programs: Programs, delivery: Path, files: list[dict[str, str]]
) -> None:
    done = deb_install.install(GCC, files, str(delivery))
    assert [row["name"] for row in done["packages"]] == ["libgcc", "gcc", "libc6"]
    installing = next(argv for argv in programs.calls if argv[0] == "apt-get" and "--simulate" not in argv)
    assert installing[-3:-1] == ["install", "--"]
    # a link of root's, that the end of the delivery does not take away
    assert installing[-1].endswith("/gcc.deb")
    assert str(delivery) not in installing[-1]
    assert programs.present
    assert list(delivery.parent.iterdir()) == [delivery]
    assert "Dir::Etc::sourcelist=/dev/null" in installing
    assert "Dpkg::Options::=--force-confold" in installing
    assert "--no-install-recommends" in installing
    assert "--no-remove" in installing
    assert {"APT::Get::AutomaticRemove=false", "APT::Get::allow-downgrades=false"} <= set(installing)
    # asked for: gcc alone; libc6 was automatic and stays so
    assert programs.calls[-1] == ["apt-mark", "auto", "libgcc:arm64", "libc6:arm64"]


def installs(programs: Programs) -> list[list[str]]:
    return [argv for argv in programs.calls if argv[:1] == ["apt-get"] and "--simulate" not in argv]


@pytest.mark.parametrize(
    ("printed", "named"),
    [
        ("Inst gcc (12 x [arm64])\nRemv less [590]\n", "less 590 removed"),
        ("Inst nvidia-l4t-core [36.4] (36.5 x [arm64])\n", "nvidia-l4t-core"),
        ("Inst nvidia-l4t-core:arm64 [36.4] (36.5 x [arm64])\n", "part of L4T"),
        ("Remv nvidia-l4t-core:arm64 [36.4]\n", "nvidia-l4t-core 36.4 removed"),
        ("Inst gcc (12 x [arm64])\nConf nvidia-l4t-bootloader:arm64 (36.4 x [arm64])\n", "part of L4T"),
        ("Inst gcc (12 x [arm64])\nConf gcc broken\n", "not understood: 'Conf gcc broken'"),
        ("Inst gcc (12 x [arm64])\nInst odd in another way\n", "not understood: 'Inst odd in another way'"),
    ],
)
def test_a_change_that_nobody_asked_for_is_refused_on_the_device_too(
    programs: Programs, delivery: Path, files: list[dict[str, str]], printed: str, named: str
) -> None:
    programs.answers["--simulate"] = (0, printed, "")
    with pytest.raises(Problem, match=named):
        deb_install.install(GCC, files, str(delivery))
    assert not installs(programs)


def test_another_file_than_was_sent_is_refused(programs: Programs, delivery: Path, files: list[dict[str, str]]) -> None:
    (delivery / "gcc.deb").write_bytes(b"another")
    with pytest.raises(Problem, match="sha256"):
        deb_install.install(GCC, files, str(delivery))
    assert not installs(programs)


def test_what_a_killed_run_left_is_removed_in_time(
    programs: Programs, delivery: Path, files: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", os.getuid)
    monkeypatch.setattr(deb_install, "_require_root", lambda: None)
    for name, age in (("jetson-mamba-debs.old", 13 * 3600), ("jetson-mamba-debs.new", 60), ("other", 13 * 3600)):
        (delivery.parent / name).mkdir()
        os.utime(delivery.parent / name, (time.time() - age,) * 2)
    deb_install.install(GCC, files, str(delivery))
    assert sorted(path.name for path in delivery.parent.iterdir()) == ["delivery", "jetson-mamba-debs.new", "other"]


def test_a_disk_that_is_too_small_is_met_first(programs: Programs, delivery: Path, files: list[dict[str, str]]) -> None:
    programs.answers["Installed-Size"] = (0, str(1 << 50), "")
    with pytest.raises(Problem, match="MB free for /usr"):
        deb_install.install(GCC, files, str(delivery))
    assert not installs(programs)


def test_only_root_installs(
    programs: Programs, delivery: Path, files: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Problem, match="user id 1000") as caught:
        deb_install.install(GCC, files, str(delivery))
    assert "become: true" in caught.value.next_step
    with pytest.raises(Problem):
        deb_install.wait([], 0)


def test_a_failure_shows_apts_last_lines(programs: Programs, delivery: Path, files: list[dict[str, str]]) -> None:
    programs.install_status = 100
    with pytest.raises(Problem) as caught:
        deb_install.install(GCC, files, str(delivery))
    assert "ended with 100" in caught.value.found
    assert "E: the last line" in caught.value.found


def test_success_that_brought_nothing_is_none(programs: Programs, delivery: Path, files: list[dict[str, str]]) -> None:
    with pytest.raises(Problem, match="yet the device lacks g"):
        deb_install.install([debs.parse_wish("g++")], files, str(delivery))


def test_the_devices_own_apt_is_asked_by_name_after_an_update(programs: Programs) -> None:
    deb_install.install(GCC, [], None)
    assert [argv[-1] for argv in installs(programs)] == ["update", "gcc"]
    assert not any("/dev/null" in word for argv in installs(programs) for word in argv)


def test_an_update_that_failed_is_told_where_apt_finds_no_way(programs: Programs) -> None:
    programs.answers["update"] = (0, "", "W: Failed to fetch http://a/\n")
    programs.answers["--simulate"] = (100, "", "E: Unable to locate package gcc\n")
    with pytest.raises(Problem) as caught:
        deb_install.install(GCC, [], None)
    assert caught.value.found.splitlines()[-1] == "Failed to fetch http://a/"
    assert "debian_packages_source=controller" in caught.value.next_step


def test_a_provided_name_leaves_all_packages_manual(
    programs: Programs, delivery: Path, files: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "AFTER", AFTER + "Provides: c-compiler\n")
    deb_install.install([debs.parse_wish("c-compiler")], files, str(delivery))
    assert not [argv for argv in programs.calls if argv[:2] == ["apt-mark", "auto"]]


# ---------------------------------------------------------------- locks


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[[], tuple[str, subprocess.Popen[str]]]]:
    """Return a function that has another process hold a lock as dpkg does."""
    children = []

    def start() -> tuple[str, subprocess.Popen[str]]:
        path = tmp_path / "lock"
        code = f"import fcntl, sys; h = open({str(path)!r}, 'w'); fcntl.lockf(h, fcntl.LOCK_EX); "
        code += "print(1, flush=True); sys.stdin.read()"
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout is not None
        child.stdout.readline()
        return str(path), child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def test_the_holder_of_a_lock_is_named(hold: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    path, child = hold()
    holder = deb_install.wait([path + ".absent", path], 0)
    assert holder is not None
    assert holder.endswith(f"(pid {child.pid})")
    child.kill()
    child.wait()
    assert deb_install.wait([path], 5) is None
    with open(path) as handle:  # looking takes nothing
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---------------------------------------------------------------- description


def test_a_description_holds_what_apt_needs_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    put("var/lib/dpkg/status", BEFORE)
    put("etc/apt/sources.list", "deb [signed-by=/usr/share/keyrings/a.gpg] http://a/ jammy main\n")
    stanza = "Types: deb\nURIs: http://b/\nSuites: /\nSigned-By: /usr/share/keyrings/none.gpg\n"
    put("etc/apt/sources.list.d/b.sources", stanza)
    put("etc/apt/sources.list.d/c.list.save", "deb http://c/ jammy main\n")
    put("etc/apt/trusted.gpg.d/jetson.asc", "a key")
    put("etc/apt/preferences.d/nvidia", "Package: *")
    put("usr/share/keyrings/a.gpg", "its key")
    monkeypatch.setattr(apt_root, "run", Programs())
    description = deb_install.describe(str(tmp_path))
    assert [row["URIs"] for row in description["sources"]] == ["http://a/", "http://b/"]
    assert list(description["keys"]) == ["/usr/share/keyrings/a.gpg"]
    assert base64.b64decode(description["keys"]["/usr/share/keyrings/a.gpg"]) == b"its key"
    assert list(description["trusted"]) == ["jetson.asc"]
    assert description["preferences"] == "Package: *"
    assert description["status"].startswith("Package: libc6\n")
    assert (description["architecture"], description["foreign"], description["unread"]) == ("arm64", ["armhf"], [])


def test_what_is_no_debian_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"no .*status"):
        deb_install.read_status(str(tmp_path / "status"))


def test_a_packed_description_comes_back() -> None:
    description = {"status": "Package: é\udce9", "keys": {"/a": "YQ=="}}
    assert deb_install.unpack(deb_install.pack(description)) == description
