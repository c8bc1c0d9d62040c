"""The memory that compilers may take, and a swap file for the time of a build where one compiler would not fit.

zram is memory that is counted already: what lies in it still takes room in the memory itself. Swap on a disk is more
memory, slow: one compiler may count on it, more than one would only push each other out.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ansible_collections.jetson.mamba.plugins.module_utils import build_runner, state
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

# what the system and Ansible need beside the compilers, MB
RESERVED_MB = 300
# as size: as much as one compiler lacks
AUTOMATIC = -1
# the mark by which a file is known as ours (16 bytes at most)
LABEL = "jetson-mamba"
# compilers' peaks differ between versions; a file of little more than was measured would end as none does
_SLACK_MB = 1024

_GOOD = ("ext4", "ext3", "ext2", "xfs")
_WHY_NOT = {
    "btrfs": "it copies on write; it holds swap only where it is mounted with nodatacow",
    "f2fs": "it moves blocks; it holds swap only without compression and in its adaptive mode",
    "zfs": "writing to it takes memory, so that swap on it stands still when memory is short",
    "bcachefs": "it cannot hold swap",
    "overlay": "it is layers over another file system, which the kernel does not swap to",
    "aufs": "it is layers over another file system, which the kernel does not swap to",
    "tmpfs": "it is memory itself",
    "ramfs": "it is memory itself",
    "nfs": "it is on the network",
    "nfs4": "it is on the network",
    "cifs": "it is on the network",
    "smb3": "it is on the network",
    "ceph": "it is on the network",
    "9p": "it belongs to another machine",
    "virtiofs": "it belongs to another machine",
    "vfat": "it keeps no owners, so that everybody could read what is swapped out",
    "exfat": "it keeps no owners, so that everybody could read what is swapped out",
    "ntfs3": "it keeps no owners, so that everybody could read what is swapped out",
    "squashfs": "it is read-only",
    "erofs": "it is read-only",
    "iso9660": "it is read-only",
    "ecryptfs": "it is layers over another file system, which the kernel does not swap to",
}


# runs a command; returns (exit status, output, errors)
Run = Callable[[Sequence[str]], Tuple[int, str, str]]


class Swap(NamedTuple):
    """One line of /proc/swaps."""

    path: str
    size_mb: int
    used_mb: int


class Memory(NamedTuple):
    """What is free, MB: memory (within the limit of a control group), and swap on disks."""

    available_mb: int
    swap_mb: int


class FileSystem(NamedTuple):
    """Where a path lies."""

    kind: str
    mount_point: str
    options: Tuple[str, ...]


def _unescape(text: str) -> str:
    """Return a path as it is; the kernel writes blanks and their like as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)


def active_swaps(top: str = "/") -> List[Swap]:
    """Return what the kernel swaps to now."""
    found = []
    with contextlib.suppress(OSError), open(
        os.path.join(top, "proc/swaps"), encoding="utf-8", errors="surrogateescape"
    ) as handle:
        for line in handle.readlines()[1:]:
            fields = line.split()
            if len(fields) >= 4:
                found.append(Swap(_unescape(fields[0]), int(fields[2]) >> 10, int(fields[3]) >> 10))
    return found


def _group_room_mb(proc: str) -> Optional[int]:
    """Return what the control groups above this process leave it, or None where they set no limit."""
    rooms = []
    for group in build_runner.memory_groups(proc):
        for limit_name, usage_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            with contextlib.suppress(OSError, ValueError):
                limit, usage = (_read_number(os.path.join(group, name)) for name in (limit_name, usage_name))
                # what the kernel may drop at once is free; without a limit the file holds "max", or all bits
                if limit < 1 << 60:
                    rooms.append(max(0, limit - max(0, usage - _cached_bytes(group))) >> 20)
    return min(rooms) if rooms else None


def _read_number(path: str) -> int:
    with open(path, encoding="ascii", errors="replace") as handle:
        return int(handle.read())


def _cached_bytes(group: str) -> int:
    found = {}
    with contextlib.suppress(OSError), open(os.path.join(group, "memory.stat"), encoding="ascii") as handle:
        found = dict(line.split(" ", 1) for line in handle if " " in line)
    return int(found.get("total_inactive_file", found.get("inactive_file", 0)))


def free_memory(top: str = "/", without: str = "") -> Memory:
    """Return what compilers may take now.

    Args:
        top: folder that holds proc.
        without: path of a swap file that is not to be counted.
    """
    whole = state.read_memory(top)
    available, room = whole["available_mb"], _group_room_mb(os.path.join(top, "proc"))
    own = sum(one.size_mb - one.used_mb for one in active_swaps(top) if one.path == without)
    return Memory(available if room is None else min(available, room), max(0, whole["swap_free_mb"] - own))


def wanted_size(size_mb: int, job_memory_mb: int, memory: Memory) -> int:
    """Return how large a swap file to make, MB; 0 for none.

    Args:
        size_mb: the setting: a size, 0, or AUTOMATIC.
        job_memory_mb: what one compiler can take.
        memory: what is free without the file.
    """
    if size_mb != AUTOMATIC:
        return size_mb
    lacking = job_memory_mb + RESERVED_MB - memory.available_mb - memory.swap_mb
    return -(-(lacking + _SLACK_MB) // 1024) * 1024 if lacking > 0 else 0


# ---------------------------------------------------------------- file systems


def file_system(path: str, top: str = "/") -> FileSystem:
    """Return the file system of an existing folder.

    Raises:
        Problem: the kernel does not tell.
    """
    real = os.path.realpath(path)
    best: Optional[FileSystem] = None
    with contextlib.suppress(OSError), open(
        os.path.join(top, "proc/self/mountinfo"), encoding="utf-8", errors="surrogateescape"
    ) as handle:
        for line in handle:
            fields = line.split()
            if "-" not in fields[6:]:
                continue
            dash = fields.index("-", 6)
            place = _unescape(fields[4])
            inside = place == "/" or real == place or real.startswith(place + "/")
            # a later line lies over an earlier one
            if inside and (best is None or len(place) >= len(best.mount_point)):
                options = (fields[5] + "," + fields[-1]).split(",")
                best = FileSystem(fields[dash + 1], place, tuple(options))
    if best is None:
        raise Problem(
            f"the kernel does not tell the file system of {real}",
            "a line of /proc/self/mountinfo",
            "set wheelhouse_swap_mb: 0, and add swap yourself where memory is short",
        )
    return best


def unfit(where: FileSystem) -> Optional[str]:
    """Return why a file system cannot hold swap, or None where it can."""
    options = set(where.options)
    if "ro" in options:
        return "it is mounted read-only"
    if where.kind in _GOOD:
        return None
    if where.kind == "btrfs" and "nodatacow" in options:
        return None
    if where.kind == "f2fs" and not any(one.startswith("compress_algorithm=") for one in options):
        modes = [one for one in options if one.startswith("mode=")]
        if modes in ([], ["mode=adaptive"]):
            return None
    if where.kind.startswith("fuse"):
        return "a program of its own serves it, which may need the memory that it is to bring"
    return _WHY_NOT.get(where.kind, "it is not known to hold swap")


# ---------------------------------------------------------------- one file


def describe(path: str, top: str = "/") -> Dict[str, Any]:
    """Return what is there: {path, size_mb (0: no file), active}.

    Raises:
        Problem: something else than a swap file of ours is there.
    """
    active = any(one.path == os.path.realpath(path) for one in active_swaps(top))
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return {"path": path, "size_mb": 0, "active": active}
    except OSError as error:
        raise Problem(
            f"{path} cannot be looked at: {error.strerror}",
            "a folder on the device",
            "correct the path (wheelhouse: jetson_platform_build_root)",
        ) from error
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or not _is_ours(path):
        raise Problem(
            f"{path} is there, and is no swap file of this project",
            "no file, or one that an earlier run made",
            f"look at it (file {path}) and move it away",
        )
    return {"path": path, "size_mb": found.st_size >> 20, "active": active}


def _is_ours(path: str) -> bool:
    """Return whether a file has the header that mkswap wrote with our label."""
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except PermissionError:
        # asked by somebody who may only look: it is root's own, as ours are, and root will read it before it acts
        found = os.lstat(path)
        return found.st_uid == 0 and stat.S_IMODE(found.st_mode) == 0o600
    except OSError:
        return False
    with os.fdopen(descriptor, "rb") as handle:
        header = handle.read(page)
    return header[-10:] == b"SWAPSPACE2" and header[1052:1068].rstrip(b"\0") == LABEL.encode("ascii")


def check(path: str, size_mb: int, reserve_mb: int, top: str = "/", ahead: bool = False) -> None:
    """Check that a swap file can be made.

    Args:
        path: of the file.
        size_mb: of the file.
        reserve_mb: what must stay free on the disk.
        top: folder that holds proc.
        ahead: the file's folder may be absent yet; the one that it will be made in is looked at.

    Raises:
        Problem: the first thing that forbids it.
    """
    folder = os.path.dirname(os.path.abspath(path))
    while ahead and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise Problem(f"there is no folder {folder}", "a folder for the swap file", "make it, or correct the path")
    where = file_system(folder, top)
    reason = unfit(where)
    if reason:
        raise Problem(
            f"{folder} is on {where.kind} (mounted at {where.mount_point}): {reason}",
            "a file system that can hold swap, such as {}".format(", ".join(_GOOD[:1] + _GOOD[-1:])),
            "set jetson_platform_build_root to a folder on such a disk, or wheelhouse_swap_mb: 0 to build without",
        )
    usage = os.statvfs(folder)
    free_mb = usage.f_bavail * usage.f_frsize >> 20
    if free_mb < size_mb + reserve_mb:
        raise Problem(
            f"{folder} has {free_mb} MB free",
            f"{size_mb} MB for the swap file of the build and {reserve_mb} MB that stay free",
            "make room, set jetson_platform_build_root to a folder on another disk, or set wheelhouse_swap_mb smaller "
            "(0: build without)",
        )


def make(path: str, size_mb: int, run: Run, top: str = "/") -> None:
    """Make a swap file and have the kernel use it; whole or not at all.

    Raises:
        Problem: the disk is full, or a program refuses.
    """
    partial = path + ".partial"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(partial)
    try:
        _allocate(partial, size_mb)
        _do(run, ["mkswap", "-L", LABEL, partial], "util-linux's mkswap")
        os.replace(partial, path)
        _do(run, ["swapon", path], "a kernel that may be given swap (no container, and root)")
    except BaseException:
        for name in (partial, path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        raise
    if not describe(path, top)["active"]:
        raise Problem(
            f"swapon {path} said nothing, and the kernel does not use it",
            f"{path} in /proc/swaps",
            "set wheelhouse_swap_mb: 0, and add swap yourself where memory is short",
        )


def _allocate(path: str, size_mb: int) -> None:
    """Write a file without holes that only root can read."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        os.posix_fallocate(descriptor, 0, size_mb << 20)
        os.fsync(descriptor)
        holes = os.fstat(descriptor).st_blocks * 512 < size_mb << 20
    except OSError as error:
        raise Problem(
            f"{path} cannot be made {size_mb} MB large: {error.strerror}",
            "room for the swap file of the build",
            "make room, or set wheelhouse_swap_mb smaller (0: build without)"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            else "look at the device's storage (dmesg)",
        ) from error
    finally:
        os.close(descriptor)
    if holes:
        raise Problem(
            f"the file system gave {path} less room than its size",
            "a file without holes",
            "set jetson_platform_build_root to a folder on ext4, or wheelhouse_swap_mb: 0",
        )


def remove(path: str, run: Run, top: str = "/") -> None:
    """Have the kernel leave a swap file, and remove it.

    Raises:
        Problem: what lies in it does not fit into the memory.
    """
    if describe(path, top)["active"]:
        _do(run, ["swapoff", path], "memory that holds what lies in the swap file")
    for name in (path, path + ".partial"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def is_left(path: str, top: str = "/") -> bool:
    """Return whether anything of a swap file is there, a half-made one too."""
    found = describe(path, top)
    return bool(found["active"] or found["size_mb"] or os.path.lexists(path) or os.path.lexists(path + ".partial"))


def _do(run: Run, argv: Sequence[str], expected: str) -> None:
    status, output, errors = run(argv)
    if status:
        said = " ".join((errors or output).split()) or f"exit status {status}"
        raise Problem(
            "{} failed: {}".format(" ".join(argv), said),
            expected,
            "end what takes the memory (look with free -m), then run again"
            if argv[0] == "swapoff"
            else "set wheelhouse_swap_mb: 0, and add swap yourself where memory is short",
        )
