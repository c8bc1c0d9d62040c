"""From a root process to a host's process 1: run by the backend, one process a host, its orders as JSON on stdin.

Its steps, each in the namespace that the one before made: cgroup, network, overlay, identity, devices, a process
number 1, pivot_root, systemd. It ends once systemd has been executed; what fails is printed and ends with 1.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from simulator import identity, linux
from simulator.definition import HostSpec
from simulator.namespaces import linux_start_time
from simulator.store import remove, write_json

# rdev of the character devices that any Linux program may expect
DEVICES = {
    "null": (1, 3),
    "zero": (1, 5),
    "full": (1, 7),
    "random": (1, 8),
    "urandom": (1, 9),
    "tty": (5, 0),
    # systemd writes to it; a host has no terminal of its own
    "console": (1, 3),
}
LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}
# what the machine, not a host, owns: system requests, kernel settings
READ_ONLY = ("sys", "sysrq-trigger", "irq", "bus")
# modules, raw I/O, clock, MAC, kernel log, wake-ups, audit, perf and BPF: ways from a host to its machine
DROPPED_CAPABILITIES = (16, 17, 25, 32, 33, 34, 35, 36, 37, 38, 39)


def main() -> int:
    """Start the host that stdin describes; return the exit status."""
    orders = json.load(sys.stdin)
    os.umask(0o022)
    store = Path(orders["store"])
    folder = store / orders["folder"]
    # before anything else: from here on the host can be found and ended by its cgroup
    (Path(orders["cgroup"]) / "cgroup.procs").write_text(str(os.getpid()))
    linux.unshare(
        linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWUTS | linux.CLONE_NEWIPC | linux.CLONE_NEWCGROUP
    )
    linux.mount("none", "/", "", linux.MS_REC | linux.MS_PRIVATE)
    spec = HostSpec.from_dict(orders["spec"])
    socket.sethostname(spec.name)
    _connect(orders)
    # relative names: a mount's options have no room for long ones, and no way to write some characters
    os.chdir(store)
    root = _mount_overlay(orders, folder)
    first = not (folder / "created").exists()
    if first:
        _personalise(root, spec, folder, bare=len(orders["layers"]) == 1)
    _mount_devices(root)
    if first and spec.sudo_password is not None:
        subprocess.run(
            ["chroot", str(root), "chpasswd"],
            input=f"{identity.USER}:{spec.sudo_password}\n".encode(),
            env=orders["environment"],
            check=True,
        )
    if first:
        (folder / "created").touch()
    pid = _become_process_1(root, spec, orders["environment"])
    write_json(folder / "running.json", {"pid": pid, "started": linux_start_time(pid)})
    return 0


def _connect(orders: dict[str, Any]) -> None:
    """Give this network namespace an eth0 whose other end is at the fleet's bridge. No route leads out."""
    enter = ["nsenter", f"--net={orders['control']}"]
    link = orders["link"]
    subprocess.run([*enter, "ip", "link", "delete", link], capture_output=True, check=False)
    ours = str(os.getpid())
    # the same after a power cut: else its neighbours look for the old one half a minute
    mac = ["address", orders["mac"]]
    for argv in (
        [*enter, "ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", *mac, "netns", ours],
        [*enter, "ip", "link", "set", link, "master", orders["bridge"], "up"],
        ["ip", "address", "add", orders["address"], "dev", "eth0"],
        ["ip", "link", "set", "lo", "up"],
        ["ip", "link", "set", "eth0", "up"],
    ):
        subprocess.run(argv, check=True)


def _mount_overlay(orders: dict[str, Any], folder: Path) -> Path:
    if not (folder / "created").exists():
        for name in ("upper", "work"):  # of a start that was cut off
            remove(folder / name)
    for name in ("upper", "work", "root"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "upper").chmod(0o755)  # it is the host's /
    place = orders["folder"]
    options = f"lowerdir={':'.join(orders['layers'])},upperdir={place}/upper,workdir={place}/work"
    linux.mount("overlay", folder / "root", "overlay", 0, f"{options},index=off,metacopy=off,redirect_dir=off")
    return folder / "root"


def _personalise(root: Path, spec: HostSpec, folder: Path, bare: bool) -> None:
    fleet = folder.parent.parent
    if bare:
        identity.apply_platform(root, spec)
    identity.apply_person(
        root,
        spec,
        (fleet / "key.pub").read_text(encoding="ascii"),
        (folder / "host_key").read_text(encoding="ascii"),
        (folder / "host_key.pub").read_text(encoding="ascii"),
    )


def _mount_devices(root: Path) -> None:
    devices = root / "dev"
    linux.mount("tmpfs", devices, "tmpfs", linux.MS_NOSUID, "mode=755,size=1m")
    for name, (major, minor) in DEVICES.items():
        os.mknod(devices / name, stat.S_IFCHR | 0o666, os.makedev(major, minor))
        (devices / name).chmod(0o666)
    for name, target in LINKS.items():
        (devices / name).symlink_to(target)
    for name in ("pts", "shm", "mqueue"):
        (devices / name).mkdir()
    terminals = "newinstance,ptmxmode=0666,mode=0620,gid=5"
    linux.mount("devpts", devices / "pts", "devpts", linux.MS_NOSUID | linux.MS_NOEXEC, terminals)
    linux.mount("tmpfs", devices / "shm", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=1777")


def _mount_kernel(root: Path, spec: HostSpec) -> None:
    """Mount /proc and /sys of this process's namespaces, with a Jetson's device tree."""
    quiet = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    linux.mount("proc", root / "proc", "proc", quiet)
    for name in READ_ONLY:
        path = root / "proc" / name
        if path.exists():
            linux.mount(str(path), path, "", linux.MS_BIND | linux.MS_REC)
            linux.mount("none", path, "", linux.MS_BIND | linux.MS_REMOUNT | linux.MS_RDONLY | quiet)
    linux.mount("sysfs", root / "sys", "sysfs", quiet | linux.MS_RDONLY)
    linux.mount("cgroup2", root / "sys/fs/cgroup", "cgroup2", quiet)
    linux.mount("tmpfs", root / "sys/firmware", "tmpfs", quiet, "mode=755,size=1m")
    tree = root / "sys" / identity.DEVICE_TREE
    tree.mkdir(parents=True)
    for name, content in identity.device_tree(spec).items():
        (tree / name).write_bytes(content)
        (tree / name).chmod(0o444)
    linux.mount("none", root / "sys/firmware", "", linux.MS_REMOUNT | linux.MS_RDONLY | quiet)


def _become_process_1(root: Path, spec: HostSpec, environment: dict[str, str]) -> int:
    """Fork the host's process 1 and return its number on the machine once it is systemd. Raises RuntimeError."""
    linux.unshare(linux.CLONE_NEWPID)
    told, tell = os.pipe()  # closed by exec
    pid = os.fork()
    if pid == 0:
        os.close(told)
        _process_1(root, spec, environment, tell)
    os.close(tell)
    with os.fdopen(told, "rb") as channel:
        failure = channel.read().decode("utf-8", "replace")
    if failure:
        os.waitpid(pid, 0)
        raise RuntimeError(failure)
    return pid


def _process_1(root: Path, spec: HostSpec, environment: dict[str, str], tell: int) -> NoReturn:
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        # pivot_root moves every process of the mount namespace that has the old root: be alone in it
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount("none", "/", "", linux.MS_REC | linux.MS_PRIVATE)
        _mount_kernel(root, spec)
        for number in DROPPED_CAPABILITIES:
            linux.drop_capability(number)
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        linux.pivot_root(str(root))
        os.execve("/lib/systemd/systemd", ["/sbin/init", "--show-status=no", "--log-target=journal"], environment)
    except BaseException:
        os.write(tell, traceback.format_exc().encode())
    os._exit(1)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as problem:
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr, flush=True)
        sys.exit(1)
