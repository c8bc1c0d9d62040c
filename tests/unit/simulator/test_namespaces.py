"""What the namespace backend reads of its machine, and what a host's command looks like."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulator import namespaces
from simulator.backend import Host, Network
from simulator.definition import HostSpec
from simulator.errors import Problem
from simulator.namespaces import Namespaces
from simulator.store import Store, write_json

NETWORK = Network("jetsim-x-f", "198.18.0.1", 24)
HOST = Host(HostSpec("one", "36.4.7", "12.6"), "198.18.0.10", 1, "fleets/f/hosts/one", ("base",))


@pytest.fixture
def backend(tmp_path: Path) -> Namespaces:
    (tmp_path / HOST.folder).mkdir(parents=True)
    return Namespaces(Store(tmp_path))


def test_a_process_is_known_by_its_number_and_its_start(backend: Namespaces) -> None:
    assert backend.pid(NETWORK, HOST) is None
    started = namespaces.linux_start_time(os.getpid())
    record = backend.store.root / HOST.folder / "running.json"
    write_json(record, {"pid": os.getpid(), "started": started})
    assert backend.pid(NETWORK, HOST) == os.getpid()
    assert started is not None
    write_json(record, {"pid": os.getpid(), "started": started - 1})  # the number was given to another
    assert backend.pid(NETWORK, HOST) is None


def test_a_zombie_is_no_process() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.DEVNULL) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert namespaces.linux_start_time(child.pid) is None


def test_a_command_needs_a_host_that_is_on(backend: Namespaces) -> None:
    with pytest.raises(Problem, match="host one is off"):
        backend.command(NETWORK, HOST, ["true"])
    started = namespaces.linux_start_time(os.getpid())
    write_json(backend.store.root / HOST.folder / "running.json", {"pid": os.getpid(), "started": started})
    command = backend.command(NETWORK, HOST, ["echo", "a b"])
    assert command[:2] == ["nsenter", f"--target={os.getpid()}"]
    assert command[-2:] == ["echo", "a b"]
    assert "-i" in command  # nothing of the caller's environment


def test_without_root_nothing_is_tried(backend: Namespaces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Problem) as caught:
        backend.check()
    assert caught.value.found == "user id 1000"


@pytest.mark.parametrize("kind", ["overlay", "nfs4"])
def test_a_cache_that_cannot_hold_an_overlays_changes_is_named(
    backend: Namespaces, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(namespaces, "_mounts", lambda: [("/", kind), ("/sys/fs/cgroup", "cgroup2")])
    with pytest.raises(Problem) as caught:
        backend.check()
    assert caught.value.found.endswith(f"is on {kind}")
    assert "SIMULATOR_CACHE" in caught.value.next_step


def test_a_machine_without_room_for_so_many_hosts_is_told_the_setting(
    backend: Namespaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = int(Path("/proc/sys/fs/inotify/max_user_instances").read_text())
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(namespaces, "_filesystem", lambda path: "ext4")
    monkeypatch.setattr(namespaces, "_cgroup_mount", lambda: tmp_path)
    monkeypatch.setattr(namespaces, "_inotify_instances", lambda: limit - namespaces.INOTIFY_PER_HOST)
    backend.check(1)
    if limit < 1024:
        with pytest.raises(Problem, match=r"max_user_instances is \d+"):
            backend.check(2)


def test_a_machine_without_cgroup_v2_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "_mounts", lambda: [("/", "ext4"), ("/sys/fs/cgroup/memory", "cgroup")])
    with pytest.raises(Problem, match="no cgroup v2 mount"):
        namespaces._cgroup_mount()


def test_the_nearest_mount_tells_the_filesystem(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [("/", "overlay"), ("/data", "ext4"), ("/data/a", "xfs"), ("/dat", "nfs")]
    monkeypatch.setattr(namespaces, "_mounts", lambda: mounts)
    assert namespaces._filesystem(Path("/data/b/c")) == "ext4"
    assert namespaces._filesystem(Path("/data/a/c")) == "xfs"
    assert namespaces._filesystem(Path("/elsewhere")) == "overlay"


def test_the_proxy_leaves_host_and_port_to_ssh(backend: Namespaces) -> None:
    assert backend.proxy_command("jetsim-x-f") == "nsenter --net=/run/netns/jetsim-x-f socat - TCP:%h:%p"
