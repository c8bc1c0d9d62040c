"""Hosts as Linux namespaces, all inside a network namespace of the fleet's own.

What the kernel holds of a fleet has one name, `jetsim-<store>-<fleet>`: the control network namespace (with a bridge;
under /run/netns, so that `ip netns` knows it) and a cgroup, which every process of a host is in from before it
enters its first namespace. So whatever a crash leaves is found by that name alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from simulator import linux
from simulator.backend import Backend, Host, Network
from simulator.errors import Problem
from simulator.store import REPOSITORY, Store, read_json

NETNS = Path("/run/netns")
BRIDGE = "fleet0"
INSIDE = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}
# root's, of a host's systemd and logind; the kernel counts them per user, over all namespaces
INOTIFY_PER_HOST = 4
# systemd's own signal for: power off, in order
SIGRTMIN_POWEROFF = 4


class Namespaces(Backend):
    """The backend for a plain Linux machine and root.

    Args:
        store: where the hosts' files are.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    def check(self, hosts: int = 0) -> None:
        if os.geteuid() != 0:
            raise Problem(
                f"user id {os.geteuid()}", "root: namespaces, mounts and cgroups need it", "run it again with sudo"
            )
        if "\toverlay\n" not in Path("/proc/filesystems").read_text():
            if shutil.which("modprobe") is not None:
                subprocess.run(["modprobe", "overlay"], capture_output=True, check=False)
            if "\toverlay\n" not in Path("/proc/filesystems").read_text():
                raise Problem(
                    "this kernel has no overlay filesystem", "overlay in /proc/filesystems", "load or enable it"
                )
        self.store.root.mkdir(parents=True, exist_ok=True)
        kind = _filesystem(self.store.root)
        if kind in ("overlay", "nfs", "nfs4", "fuse", "fuseblk", "9p", "virtiofs"):
            raise Problem(
                f"{self.store.root} is on {kind}",
                "a local filesystem such as ext4, xfs or btrfs: the hosts' overlays keep their changes there",
                "set SIMULATOR_CACHE to a folder on one",
            )
        cgroups = _cgroup_mount()
        if not os.access(cgroups, os.W_OK):
            raise Problem(f"{cgroups} cannot be written", "a writable cgroup v2 mount", "run outside this container")
        limit = int(Path("/proc/sys/fs/inotify/max_user_instances").read_text())
        needed = hosts * INOTIFY_PER_HOST
        # counted only where it may matter: it looks at every open file
        if hosts and limit < 1024 and needed + _inotify_instances() > limit:
            raise Problem(
                f"fs.inotify.max_user_instances is {limit}, and other programs of root's use {_inotify_instances()}",
                f"room for {needed} more: {hosts} hosts, whose systemd watches files",
                "sysctl -w fs.inotify.max_user_instances=1024, or start fewer hosts",
            )

    def open_network(self, network: Network) -> None:
        path = NETNS / network.name
        if not _is_namespace(path):
            for _ in range(10):
                try:
                    NETNS.mkdir(mode=0o755, parents=True, exist_ok=True)
                    path.touch()
                    break
                except FileNotFoundError:  # another fleet's end just removed the empty folder
                    time.sleep(0.05)
            _run(["unshare", f"--net={path}", "true"])
        if not self._links(network.name, BRIDGE):
            _run([*_enter(network.name), "ip", "link", "add", BRIDGE, "type", "bridge"])
        _run([*_enter(network.name), "ip", "address", "replace", f"{network.gateway}/{network.prefix}", "dev", BRIDGE])
        for link in ("lo", BRIDGE):
            _run([*_enter(network.name), "ip", "link", "set", link, "up"])
        cgroup = _cgroup_mount() / network.name
        cgroup.mkdir(exist_ok=True)
        for controller in {"cpu", "io", "memory", "pids"} & set((cgroup / "cgroup.controllers").read_text().split()):
            # the hosts' systemd gives them to its units; without them it tracks processes only
            with contextlib.suppress(OSError):
                (cgroup / "cgroup.subtree_control").write_text(f"+{controller}")

    def close_network(self, network: str) -> None:
        _empty_cgroup(_cgroup_mount() / network)
        path = NETNS / network
        if _is_namespace(path):
            # ssh's proxies live in it for as long as a connection is kept
            _kill_all(_processes_in(path))
        for _ in range(8):
            try:
                linux.unmount(path, linux.MNT_DETACH)
            except OSError:
                break
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            NETNS.rmdir()  # refused unless empty and no mount: then someone else needs it

    def networks(self, prefix: str) -> list[str]:
        found: set[str] = set()
        for folder in (NETNS, _cgroup_mount()):
            if folder.is_dir():
                found.update(entry.name for entry in folder.iterdir() if entry.name.startswith(prefix))
        return sorted(found)

    def start(self, network: Network, host: Host) -> None:
        folder = self.store.root / host.folder
        config = {
            "store": str(self.store.root),
            "folder": host.folder,
            "layers": list(host.layers),
            "spec": host.spec.as_dict(),
            "address": f"{host.address}/{network.prefix}",
            "control": str(NETNS / network.name),
            "bridge": BRIDGE,
            "link": f"host{host.number}",
            # locally administered, the IPv4 address inside
            "mac": "02:00:" + ":".join(f"{int(octet):02x}" for octet in host.address.split(".")),
            "cgroup": str(self._cgroup(network, host)),
            "environment": {**INSIDE, "container": "jetson-simulator"},
        }
        _empty_cgroup(self._cgroup(network, host))
        self._cgroup(network, host).mkdir(parents=True, exist_ok=True)
        with self.log(host).open("ab") as log:
            done = subprocess.run(
                [sys.executable, "-m", "simulator.launch"],
                input=json.dumps(config).encode(),
                stdout=log,
                stderr=log,
                cwd=REPOSITORY,
                env={"PATH": INSIDE["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "LC_ALL": "C.UTF-8"},
                preexec_fn=linux.die_with_parent,
                check=False,
            )
        if done.returncode != 0:
            tail = self.log(host).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-4:]
            raise Problem(
                f"host {host.spec.name} did not start:\n  " + "\n  ".join(tail),
                "process 1 running in namespaces of its own",
                f"read {self.log(host)} ({folder} holds the host's files)",
            )

    def stop(self, network: Network, host: Host, graceful: bool = False) -> None:
        pid = self.pid(network, host)
        if graceful and pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGRTMIN + SIGRTMIN_POWEROFF)
            deadline = time.monotonic() + 30
            while self.pid(network, host) is not None and time.monotonic() < deadline:
                time.sleep(0.05)
        pid = self.pid(network, host)
        if pid is not None:
            _kill_all([pid])
        _empty_cgroup(self._cgroup(network, host))
        if _is_namespace(NETNS / network.name) and self._links(network.name, f"host{host.number}"):
            # its other end goes with the host's namespace, in the kernel's own time
            subprocess.run(
                [*_enter(network.name), "ip", "link", "delete", f"host{host.number}"], capture_output=True, check=False
            )

    def pid(self, network: Network, host: Host) -> int | None:
        running = read_json(self.store.root / host.folder / "running.json")
        if running is None:
            return None
        return running["pid"] if linux_start_time(running["pid"]) == running["started"] else None

    def command(self, network: Network, host: Host, argv: Sequence[str]) -> list[str]:
        pid = self.pid(network, host)
        if pid is None:
            raise Problem(
                f"host {host.spec.name} is off", "a running host", f"python -m simulator power-on {host.spec.name}"
            )
        enter = ["nsenter", f"--target={pid}", "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root"]
        variables = [f"{key}={value}" for key, value in {**INSIDE, "TERM": os.environ.get("TERM", "dumb")}.items()]
        return [*enter, "--wd=/", "env", "-i", *variables, *argv]

    def proxy_command(self, network: str) -> str:
        return f"nsenter --net={NETNS / network} socat - TCP:%h:%p"

    def banner(self, network: str, address: str, timeout_s: float) -> str:
        answer: list[str] = []

        def ask() -> None:
            # of this thread alone: the others stay where they are
            with contextlib.suppress(OSError):
                linux.setns(NETNS / network, linux.CLONE_NEWNET)
                with socket.create_connection((address, 22), timeout=timeout_s) as connection:
                    answer.append(connection.recv(256).decode("ascii", "replace").strip())

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        return answer[0] if answer else ""

    def log(self, host: Host) -> Path:
        return self.store.root / host.folder / "console.log"

    def _cgroup(self, network: Network, host: Host) -> Path:
        return _cgroup_mount() / network.name / host.spec.name

    def _links(self, network: str, link: str) -> bool:
        return (
            subprocess.run(
                [*_enter(network), "ip", "link", "show", "dev", link], capture_output=True, check=False
            ).returncode
            == 0
        )


def linux_start_time(pid: int) -> int | None:
    """Return when a process started, in the kernel's ticks; None if there is none or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _enter(network: str) -> list[str]:
    return ["nsenter", f"--net={NETNS / network}"]


def _run(argv: list[str]) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    except FileNotFoundError as error:
        raise Problem(f"no command {argv[0]}", "the simulator's system packages", _REQUIREMENTS) from error
    if done.returncode != 0:
        raise Problem(f"{' '.join(argv)}: {done.stderr.strip()}", "it to succeed", "are you root on a plain machine?")


_REQUIREMENTS = "python -m simulator requirements --install"


def _mounts() -> list[tuple[str, str]]:
    """Return (mount point, filesystem) of every mount, in the kernel's order."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        point = left.split(" ")[4].encode("utf-8", "surrogateescape").decode("unicode_escape")
        found.append((point, right.split(" ")[0]))
    return found


def _cgroup_mount() -> Path:
    for point, kind in _mounts():
        if kind == "cgroup2":
            return Path(point)
    raise Problem("no cgroup v2 mount", "one, as /sys/fs/cgroup or beside v1's", "mount -t cgroup2 cgroup2 FOLDER")


def _filesystem(path: Path) -> str:
    best = ("", "")
    for point, kind in _mounts():
        if Path(point) == path or Path(point) in path.parents:
            best = max(best, (point, kind), key=lambda item: len(item[0]))
    return best[1]


def _is_namespace(path: Path) -> bool:
    return any(Path(point) == path for point, _ in _mounts())


def _processes_in(namespace: Path) -> list[int]:
    try:
        wanted = namespace.stat()
    except FileNotFoundError:
        return []
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                there = (entry / "ns/net").stat()
                if (there.st_dev, there.st_ino) == (wanted.st_dev, wanted.st_ino):
                    found.append(int(entry.name))
    return found


def _inotify_instances() -> int:
    """Return how many inotify instances root's processes hold."""
    count = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if entry.stat().st_uid == 0:
                    handles = list((entry / "fd").iterdir())
                    count += sum(os.readlink(handle) == "anon_inode:inotify" for handle in handles)
    return count


def _kill_all(pids: list[int]) -> None:
    """Kill processes and wait until they are gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(linux_start_time(pid) is not None for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)


def _empty_cgroup(cgroup: Path) -> None:
    """Kill every process in a cgroup and below, and remove it; none there is fine. Raises Problem if one stays."""
    deadline = time.monotonic() + 20
    while cgroup.is_dir():
        killer = cgroup / "cgroup.kill"  # since Linux 5.14
        with contextlib.suppress(OSError):
            killer.write_text("1") if killer.exists() else None
        for name, _, _ in os.walk(cgroup, topdown=False):
            folder = Path(name)
            with contextlib.suppress(OSError):
                for pid in (folder / "cgroup.procs").read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
            with contextlib.suppress(OSError):
                folder.rmdir()
        if time.monotonic() > deadline:
            raise Problem(f"{cgroup} still has processes after 20 s", "none", f"look at {cgroup}/cgroup.procs")
        if cgroup.is_dir():
            time.sleep(0.02)
