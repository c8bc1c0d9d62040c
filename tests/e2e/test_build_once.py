"""Build once, install everywhere, without internet: twelve hosts of two platform classes, one wheelhouse.

These tests run in order, on one fleet. What a compiler was started for is counted on the hosts themselves.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.build_once import frozen
from tests.e2e.build_once.frozen import COMPONENTS, SOURCES
from tests.e2e.conftest import Fleet, Run, words
from tests.e2e.test_site import LISTING, aarch64_library, changed_files

# two runs of the tests beside each other, in one checkout, choose two names
NAME = f"{os.environ.get('E2E_FLEET', 'e2e')}-once"
A = [f"orin-a{number}" for number in range(1, 6)]
B = [f"orin-b{number}" for number in range(1, 6)]
TEN = A + B
LATE, SPARE = "orin-a6", "orin-b6"
ALL = [*TEN, LATE, SPARE]
# of class A, with the release before; an apt upgrade brings the other
UPGRADED = "orin-a5"
BEFORE, AFTER = "36.4.4", "36.4.7"
# the second of its class, so that it is no builder by its place
NAMED_BUILDER = "orin-b2"
BUILDERS = {"a": "orin-a1", "b": NAMED_BUILDER}
# A first run goes through in batches; what is built is built before any of them. Few at a time: all hosts share the
# processors of one machine, and torch's threads on many of them at once hinder each other.
BATCHES = ("-e", "jetson_mamba_serial=4", "--forks", "4")
BUILD_ROOT = "/opt/jetson-mamba/build"
# where this project, or Ansible, may forget something
LEFT = f"find {BUILD_ROOT} /opt/jetson-mamba/tmp /home/jetson/.ansible/tmp -mindepth 1 2>/dev/null || true"


@dataclass
class Once:
    """The fleet of these tests, its wheelhouse, and what has been compiled so far."""

    fleet: Fleet
    wheelhouse: Path
    counted: Counter[tuple[str, str]] = field(default_factory=Counter)

    def inventory(
        self, name: str, hosts: list[str], builders: list[str], of_hosts: dict[str, dict[str, Any]] | None = None
    ) -> Path:
        """Write an inventory of some hosts; the platform row of class A covers both of its releases."""
        rows = frozen.platform_rows(self.fleet, {AFTER: BEFORE})
        variables = {"jetson_platform_rows": rows, "wheelhouse_path": str(self.wheelhouse)}
        return frozen.write_inventory(self.fleet, self.fleet.scratch / name, hosts, builders, variables, of_hosts)

    def compiled(self) -> Counter[tuple[str, str]]:
        """Return what was compiled since this was asked last: {(host, file): times}."""
        now = frozen.compiled(self.fleet, ALL)
        new = now - self.counted
        self.counted = now
        return new

    def rows(self, wheelhouse: Path | None = None) -> list[dict[str, Any]]:
        """Return the rows of all manifests."""
        found: list[dict[str, Any]] = []
        for manifest in sorted((wheelhouse or self.wheelhouse).glob("*/manifest.json")):
            found += json.loads(manifest.read_text(encoding="utf-8"))["wheels"].values()
        return found

    def row(self, cuda: str, component: str) -> tuple[dict[str, Any], Path]:
        """Return the one row of a component and a class, and its wheel."""
        (row,) = [one for one in self.rows() if one["component"] == component and f"-cu{cuda}-" in one["class_id"]]
        folder = self.wheelhouse / row["class_id"] / f"{component}-{row['key'][:12]}"
        (wheel,) = folder.glob("*.whl")
        return row, wheel


def overall(run: Run, host: str) -> str:
    return str(run.report(host)["verification"]["overall"])


def changed(run: Run) -> dict[str, int]:
    return {host: counts["changed"] for host, counts in run.recap.items()}


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Once]:
    """Return the fleet: torch is installed on every host, nothing is built yet."""
    assert os.geteuid() == 0, "the simulated fleet needs root"
    scratch = tmp_path_factory.mktemp("once")
    made = Fleet(NAME, scratch)
    made.down()
    seeds = Fleet(f"{NAME}-seed", scratch)
    try:
        snapshots = frozen.freeze(seeds.name, scratch)
        hosts = {host: "a" if host in (*A, LATE) else "b" for host in ALL}
        made.up(frozen.describe(hosts, snapshots, scratch / "fleet.yml"))
        made.root(UPGRADED, "sed -i 's/REVISION: 4.7,/REVISION: 4.4,/' /etc/nv_tegra_release")
        yield Once(made, scratch / "wheelhouse")
    finally:
        made.down()
        frozen.forget(seeds)


@pytest.fixture(scope="module")
def first(once: Once) -> Run:
    return once.fleet.playbook("site.yml", *BATCHES, inventory=once.inventory("ten.yml", TEN, [NAMED_BUILDER]))


@pytest.fixture(scope="module")
def built(once: Once, first: Run) -> Once:
    assert first.status == 0, "the fleet could not be provisioned"
    return once


# --- one build a class ----------------------------------------------------------------------------------------------


def test_the_hosts_have_no_way_out(once: Once) -> None:
    connect = "import socket; s = socket.socket(); s.settimeout(5); print(s.connect_ex(('1.1.1.1', 443)))"
    script = f"ip route show table all; ip -6 route show default; python3 -c \"{connect}\""
    for host, text in once.fleet.roots(ALL, script).items():
        *routes, status = text.strip().splitlines()
        assert not [line for line in routes if line.startswith("default") or " via " in line], f"{host}: {routes}"
        # ENETUNREACH: the kernel knows no way, nobody was asked
        assert status == "101", f"{host}: connecting ended with {status}"


def test_ten_hosts_of_two_classes_need_two_builds_per_component(once: Once, first: Run) -> None:
    assert first.status == 0
    assert {host: overall(first, host) for host in TEN} == dict.fromkeys(TEN, "passed")
    assert len(re.findall(r"^PLAY \[Install\]", first.output, re.MULTILINE)) == 3, "it was one batch"
    assert once.compiled() == {(builder, source): 1 for builder in BUILDERS.values() for source in SOURCES}


def test_the_wheelhouse_says_what_it_holds(built: Once) -> None:
    rows = built.rows()
    assert len(rows) == len(BUILDERS) * len(COMPONENTS)
    for kind, (l4t, cuda) in frozen.PLATFORMS.items():
        for component in COMPONENTS:
            row, wheel = built.row(cuda, component)
            assert (row["builder"], row["l4t"]) == (BUILDERS[kind], l4t)
            assert hashlib.sha256(wheel.read_bytes()).hexdigest() == row["sha256"]
            assert wheel.stat().st_size == row["size"]
            assert row["seconds"] > 0
            assert row["source_sha256"]
            assert SOURCES[COMPONENTS.index(component)] in (wheel.parent / "build.log").read_text(encoding="utf-8")


# --- what is wrong is not installed ---------------------------------------------------------------------------------


def rewritten(wheel: Path, target: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """Write a wheel whose members went through `change`, with a RECORD that agrees with them."""
    with zipfile.ZipFile(wheel) as archive:
        members = {name: change(name, archive.read(name)) for name in archive.namelist()}
    (record,) = (name for name in members if name.endswith(".dist-info/RECORD"))
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    for name, content in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        writer.writerow((name, "", "") if name == record else (name, f"sha256={digest}", len(content)))
    members[record] = lines.getvalue().encode()
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target


def make_trap(wheel: Path, folder: Path) -> Path:
    """Write a wheel whose name says x86_64, while its library and its WHEEL file are for aarch64."""
    library = aarch64_library(folder).read_bytes()

    def change(name: str, content: bytes) -> bytes:
        if name.endswith(".so"):
            return library
        return content.replace(b"linux_x86_64", b"linux_aarch64") if name.endswith("/WHEEL") else content

    return rewritten(wheel, folder / "archive" / wheel.name, change)


def mix_classes(once: Once, house: Path, component: str) -> str:
    """Copy the wheelhouse, with class A's wheel and row in class B's place; returns class A."""
    shutil.copytree(once.wheelhouse, house)
    (theirs, other), (ours, _) = (once.row(frozen.PLATFORMS[kind][1], component) for kind in ("a", "b"))
    manifest = house / ours["class_id"] / "manifest.json"
    data = json.loads(manifest.read_text(encoding="utf-8"))
    data["wheels"][ours["key"]] = {**theirs, "key": ours["key"]}
    manifest.write_text(json.dumps(data), encoding="utf-8")
    shutil.copy(other, house / ours["class_id"] / f"{component}-{ours['key'][:12]}" / other.name)
    return str(theirs["class_id"])


def test_a_trap_wheel_and_a_wheel_of_another_class_are_refused(built: Once, tmp_path: Path) -> None:
    """One run, two hosts, each with a wheelhouse of its own in which something is wrong."""
    fleet = built.fleet
    trap = make_trap(built.row("12.6", "causal_conv1d")[1], tmp_path)
    class_a = mix_classes(built, tmp_path / "mixed", "mamba_ssm")
    settings = {
        LATE: {"wheelhouse_path": str(tmp_path / "empty"), "wheelhouse_sources": [{"folder": str(trap.parent)}]},
        SPARE: {"wheelhouse_path": str(tmp_path / "mixed")},
    }
    # otherwise both would be built, as the plan says beside the same reasons
    never = ("-e", json.dumps({"wheelhouse_build": False}))
    before = fleet.roots(settings, LISTING)
    inventory = built.inventory("refused.yml", [*TEN, LATE, SPARE], [NAMED_BUILDER], settings)
    run = fleet.playbook("site.yml", "--limit", f"{LATE},{SPARE}", *never, inventory=inventory)
    assert run.status != 0
    assert changed(run) == {LATE: 0, SPARE: 0}
    assert {host: run.recap[host]["failed"] for host in settings} == {LATE: 1, SPARE: 1}
    text = words(run.output)
    assert trap.name in text
    assert "its WHEEL file says" in text
    assert "linux_aarch64" in text
    assert f"recorded for class {class_a}" in text
    assert built.rows(tmp_path / "empty") == []
    after = fleet.roots(settings, LISTING)
    assert {host: changed_files(before[host], after[host]) for host in settings} == {LATE: [], SPARE: []}
    assert built.compiled() == {}


# --- what is there is not built again -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def second(built: Once) -> tuple[Run, dict[str, int], dict[str, list[str]]]:
    """Run the site again, one host upgraded, one new, and one new that is to be served by an archive folder.

    Returns:
        the run, {host: modules that it was sent}, and {host of the first run: files that differ after it}.
    """
    fleet = built.fleet
    fleet.root(UPGRADED, "sed -i 's/REVISION: 4.4,/REVISION: 4.7,/' /etc/nv_tegra_release")
    archive = fleet.scratch / "archive"
    archive.mkdir()
    for component in COMPONENTS:
        shutil.copy(built.row("12.2", component)[1], archive)
    own = {"wheelhouse_path": str(fleet.scratch / "served"), "wheelhouse_sources": [{"folder": str(archive)}]}
    # The kernels of the ten were proven a moment ago, and nobody touched them: here they only show their files, so that
    # eleven do not load torch again. No more is asserted of them below.
    known: dict[str, Any] = {"kernel_smoke_tests_components": ["installed_files", "binary_machine"]}
    inventory = built.inventory("all.yml", ALL, [NAMED_BUILDER], {SPARE: own, **dict.fromkeys(TEN, known)})
    before = fleet.roots(TEN, LISTING)
    run = fleet.playbook("site.yml", "-vvv", inventory=inventory)
    after = fleet.roots(TEN, LISTING)
    # a module is one command over ssh, for the interpreter; what finds the interpreter is none
    sent = Counter(re.findall(r"^<(\S+)> SSH: EXEC .*/python\S* && sleep 0", run.output, re.MULTILINE))
    text = inventory.read_text(encoding="utf-8")
    addresses = re.findall(r"^ +(orin-\S+):\n +ansible_host: (\S+)", text, re.MULTILINE)
    asked = {host: sent[address] for host, address in addresses}
    return run, asked, {host: changed_files(before[host], after[host]) for host in TEN}


def test_a_second_run_changes_nothing(second: tuple[Run, dict[str, int], dict[str, list[str]]]) -> None:
    run, asked, differing = second
    assert run.status == 0
    assert {host: run.recap[host]["changed"] for host in TEN} == dict.fromkeys(TEN, 0)
    assert differing == {host: [] for host in TEN}
    # the survey and the tests
    assert {host: asked[host] for host in TEN} == dict.fromkeys(TEN, 2)
    assert asked[LATE] > 2, "modules were not counted"


def test_an_upgraded_host_an_eleventh_and_an_archive_compile_nothing(
    built: Once, second: tuple[Run, dict[str, int], dict[str, list[str]]]
) -> None:
    run, _asked, _differing = second
    assert built.compiled() == {}
    assert {host: overall(run, host) for host in (LATE, SPARE)} == {LATE: "passed", SPARE: "passed"}
    assert AFTER in built.fleet.root(UPGRADED, "cat /etc/nv_tegra_release").replace("REVISION: ", "36.")
    served = built.rows(built.fleet.scratch / "served")
    assert sorted(row["component"] for row in served) == sorted(COMPONENTS)
    assert all(str(built.fleet.scratch / "archive") in row["origin"] for row in served)
    assert len(built.rows()) == len(BUILDERS) * len(COMPONENTS)


# --- builds that go wrong -------------------------------------------------------------------------------------------


def descendants(pid: int) -> list[int]:
    """Return a process and all that it has started, parents first."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(status.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Return what a process prints, up to and with the first line that holds a text."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"'{text}' was never printed:\n{''.join(lines)}")


def flip_a_byte(path: Path) -> str:
    """Corrupt one byte of a file; returns its sha256."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def logins(fleet: Fleet, host: str) -> int:
    return int(fleet.root(host, "journalctl --quiet -o cat -u ssh | grep -c Accepted || true"))


def test_a_corrupted_wheel_is_built_again_by_who_is_left_and_past_a_kill(built: Once, tmp_path: Path) -> None:
    """One corrupted byte; the named builder outside --limit, the next of the class lost, the build after it killed."""
    fleet = built.fleet
    outside, lost, left = A[0], A[1], A[2]
    row, wheel = built.row("12.6", "causal_conv1d")
    corrupted = flip_a_byte(wheel)
    inventory = built.inventory("builders.yml", TEN, [outside])
    before, met = fleet.root(outside, LISTING), {host: logins(fleet, host) for host in (outside, left)}
    # with connections of its own, every host that this run meets writes a login down
    sockets = {"ANSIBLE_SSH_CONTROL_PATH_DIR": str(tmp_path / "cp")}
    process, _reports = fleet.started(
        "playbooks/build_wheels.yml", "--limit", f"{lost},{left}", inventory=inventory, env=sockets
    )
    output = ""
    try:
        output += read_until(process, "PLAY [Fetch what the plan needs")
        # it was chosen a moment ago; it goes before it is asked to build
        os.kill(process.pid, signal.SIGSTOP)
        fleet.simulator("power-off", "--fleet", fleet.name, lost)
        os.kill(process.pid, signal.SIGCONT)
        output += read_until(process, f"{left} | causal_conv1d 1.6.0: build started")
        fleet.root(left, "for n in $(seq 300); do pgrep cc1plus > /dev/null && exit 0; sleep 0.1; done; exit 1")
        pid = json.loads(fleet.root(left, f"cat {BUILD_ROOT}/causal_conv1d-*/pid.json"))
    finally:
        for one in descendants(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        process.wait()
        print(output)
        fleet.simulator("power-on", "--fleet", fleet.name, lost)
    # the runner, and pip and the compiler that it has started
    fleet.root(left, f"pkill --signal KILL --session {pid['session']}")
    text = words(output)
    assert f"has sha256 {corrupted}, the manifest says {row['sha256']}; set aside as" in text

    again = fleet.playbook("playbooks/build_wheels.yml", "--limit", left, inventory=inventory, env=sockets)
    assert again.status == 0
    assert "goes on where it stopped" in again.output
    new, wheel = built.row("12.6", "causal_conv1d")
    assert (new["key"], new["builder"]) == (row["key"], left)
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == new["sha256"]
    assert len(list(built.wheelhouse.rglob("causal_conv1d-*/*.whl"))) == len(BUILDERS)
    (aside,) = built.wheelhouse.rglob("aside/*.whl")
    assert hashlib.sha256(aside.read_bytes()).hexdigest() == corrupted
    (note,) = built.wheelhouse.rglob("aside/*.json")
    assert corrupted in json.loads(note.read_text(encoding="utf-8"))["reason"]
    # once to be killed, once to its end; and nothing else anywhere
    assert changed_files(before, fleet.root(outside, LISTING)) == []
    assert logins(fleet, outside) == met[outside], "a host outside --limit was asked something"
    assert logins(fleet, left) > met[left], "logins were not counted"
    assert built.compiled() == {(left, "causal_conv1d.cpp"): 2}


# --- at the end -----------------------------------------------------------------------------------------------------


def test_no_copy_is_left_behind(built: Once) -> None:
    assert built.fleet.roots(ALL, LEFT) == dict.fromkeys(ALL, "")
    assert [str(path) for path in built.wheelhouse.rglob("locks/*.json")] == []


def test_the_wheelhouse_is_listed_and_verified(built: Once) -> None:
    words_of = ("-e", f"wheelhouse_path={built.wheelhouse}")
    for action, said in (("list", "built on"), ("verify", "4 wheels verified")):
        run = built.fleet.playbook(
            "playbooks/wheelhouse.yml", *words_of, "-e", f"wheelhouse_action={action}", inventory=Path("localhost,")
        )
        assert run.status == 0
        assert said in run.output
        for class_id in {row["class_id"] for row in built.rows()}:
            assert class_id in run.output
        assert run.recap["localhost"]["changed"] == 0
