"""The root filesystem that all hosts share: Debian bookworm, made once by mmdebstrap and kept."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from pathlib import Path

from simulator import linux
from simulator.errors import Problem
from simulator.identity import USER, USER_ID
from simulator.progress import Waiting
from simulator.store import Store, remove, write_json

SUITE = "bookworm"
PACKAGES = (
    "ca-certificates",
    "dbus",
    "file",
    "g++",
    "gcc",
    "iproute2",
    "less",
    "libpam-systemd",
    "make",
    "openssh-server",
    "patch",
    "procps",
    "python3",
    "python3-apt",
    "python3-dev",
    "python3-pip",
    "python3-venv",
    "sudo",
    "systemd",
    "systemd-sysv",
)
# nothing to do on a host without internet, console or disks of its own
MASKED = (
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "console-getty.service",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@tty1.service",
    "systemd-ask-password-console.path",
    "systemd-ask-password-wall.path",
    "systemd-pstore.service",
)
# raised when finish() changes
RECIPE = 1


def digest() -> str:
    """Return the key of the base that this code makes on this machine."""
    made_of = {
        "suite": SUITE,
        "packages": PACKAGES,
        "masked": MASKED,
        "recipe": RECIPE,
        "machine": platform.machine(),
        "user": [USER, USER_ID],
    }
    return f"{SUITE}-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]}"


def ensure(store: Store) -> str:
    """Return the key of a base that is there, making it first if need be (about a minute). Raises Problem."""
    key = digest()
    if (store.bases / key).is_dir():
        return key
    with store.lock(f"base-{key}", "the Debian base"):
        if not (store.bases / key).is_dir():
            _build(store, key)
    return key


def sweep(store: Store) -> None:
    """Remove what builds left that were cut off."""
    store.drop_stale_locks()
    for left in store.bases.glob(".*"):
        if not Path("/proc", left.name.rpartition(".")[2]).exists():
            remove(left)


def rootfs(key: str) -> str:
    """Return the place of a base's root filesystem, relative to the store."""
    return f"bases/{key}/rootfs"


def _build(store: Store, key: str) -> None:
    store.bases.mkdir(parents=True, exist_ok=True)
    for left in store.bases.glob(f".{key}.*"):
        remove(left)
    temporary = store.bases / f".{key}.{os.getpid()}"
    temporary.mkdir()
    root = temporary / "rootfs"
    log = store.root / f"base-{key}.log"
    # apt cannot verify signatures below a folder with blanks or the like in its name, so it sees a plain one;
    # that mount, and whatever mmdebstrap has started, are in namespaces that end with this process
    plain = 'mount --bind "$1" /mnt && shift && "$@"'
    argv = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc"]
    argv += ["sh", "-c", plain, "sh", str(temporary)]
    argv += ["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, "/mnt/rootfs"]
    try:
        with Waiting("building the Debian base, once", "1 to 3 minutes"), log.open("wb") as output:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "LC_ALL": "C"},
                preexec_fn=linux.die_with_parent,
                check=False,
            )
            if done.returncode != 0:
                tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-8:]
                raise Problem(
                    f"mmdebstrap ended with {done.returncode}:\n  " + "\n  ".join(tail),
                    f"a Debian {SUITE} root filesystem",
                    f"read {log}; is the package archive reachable, and debian-archive-keyring installed?",
                )
            _finish(root)
        write_json(temporary / "made.json", {"suite": SUITE, "packages": PACKAGES, "machine": platform.machine()})
        os.rename(temporary, store.bases / key)
    except BaseException:
        remove(temporary)
        raise
    log.unlink(missing_ok=True)


def _finish(root: Path) -> None:
    """Make of what mmdebstrap leaves a root filesystem that many hosts can start from."""
    for key in (root / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    # mmdebstrap copies these two from the machine it runs on
    (root / "etc/hostname").write_text("simulated\n", encoding="ascii")
    (root / "etc/resolv.conf").write_text("# a simulated host has no internet\n", encoding="ascii")
    for name in ("etc/hostname", "etc/resolv.conf"):
        (root / name).chmod(0o644)
    (root / "etc/default/locale").write_text("LANG=C.UTF-8\n", encoding="ascii")
    bus_id = root / "var/lib/dbus/machine-id"
    bus_id.unlink(missing_ok=True)
    bus_id.symlink_to("/etc/machine-id")
    for unit in MASKED:
        link = root / "etc/systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    default = root / "etc/systemd/system/default.target"
    default.unlink(missing_ok=True)
    default.symlink_to("/lib/systemd/system/multi-user.target")
    subprocess.run(
        ["chroot", str(root), "useradd", "--uid", str(USER_ID), "--create-home", "--user-group",
         "--groups", "sudo,video", "--shell", "/bin/bash", USER],
        check=True, stdin=subprocess.DEVNULL,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
    )  # fmt: skip
