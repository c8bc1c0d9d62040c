"""The few system calls that Python's standard library lacks before 3.12, through libc."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG = 1
PR_CAPBSET_DROP = 24

_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Leave the namespaces named by flags (CLONE_NEW…) for new ones. Raises OSError."""
    _check(_libc.unshare(flags), "unshare")


def setns(path: str | Path, kind: int) -> None:
    """Enter the namespace behind path with the calling thread only. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(handle, kind), f"setns {path}")
    finally:
        os.close(handle)


def mount(source: str, target: str | Path, kind: str, flags: int = 0, options: str = "") -> None:
    """Mount source on target. Raises OSError with the target and the options in its message."""
    done = _libc.mount(
        source.encode(),
        os.fsencode(target),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        options.encode() if options else None,
    )
    _check(done, f"mount {kind or 'bind'} on {target} ({options})")


def unmount(target: str | Path, flags: int = 0) -> None:
    """Unmount target (flags: MNT_DETACH). Raises OSError."""
    _check(_libc.umount2(os.fsencode(target), flags), f"umount {target}")


def pivot_root(root: str) -> None:
    """Make root the root of this mount namespace and let the old one go. Raises OSError."""
    os.chdir(root)
    number = _PIVOT_ROOT[platform.machine()]
    # new root and put-old may be one folder: the old root then lies on top of it, to be detached
    _check(_libc.syscall(ctypes.c_long(number), b".", b"."), f"pivot_root {root}")
    unmount(".", MNT_DETACH)
    os.chdir("/")


def die_with_parent() -> None:
    """Have the kernel kill the calling process when its parent ends."""
    _libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)


def drop_capability(number: int) -> None:
    """Drop a capability from the bounding set; one that this kernel or process lacks is no matter."""
    _libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0)
