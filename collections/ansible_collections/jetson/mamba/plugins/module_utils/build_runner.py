"""The process that stays with a build after its connection has gone: starts it, waits, and writes down the end.

The text of this file is put into the job's folder and run there by itself, so that nothing it needs vanishes with
the module that started it. Standard library only; no other file of the project.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any, Dict, List, Optional, Tuple

NICENESS = 10
OOM_SCORE_ADJ = "500"


def write_json(path: str, data: Dict[str, Any]) -> None:
    """Write data so that a reader, or a power cut, meets the whole file or none."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as handle:
        json.dump(data, handle, indent=1, sort_keys=True)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def start_ticks(pid: int) -> Optional[int]:
    """Return when a process started, in clock ticks since boot, or None where there is none.

    A process id comes again; a process id together with this number does not.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as handle:
            return int(handle.read().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def boot_id() -> str:
    """Return what names this run of the kernel: process ids of an earlier one mean nothing."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as handle:
        return handle.read().strip()
    return ""


def memory_groups(proc: str = "/proc") -> List[str]:
    """Return the folders of the control groups that account for this process's memory, its own first, then those above.

    Empty where the kernel has none, or does not show them here.
    """
    try:
        with open(os.path.join(proc, "self/cgroup"), encoding="utf-8") as handle:
            lines = [line.rstrip("\n").split(":", 2) for line in handle]
        with open(os.path.join(proc, "self/mountinfo"), encoding="utf-8", errors="surrogateescape") as handle:
            mounts = [line.split() for line in handle]
    except OSError:
        return []
    for kind, named in (("cgroup", True), ("cgroup2", False)):
        lists = [line for line in lines if len(line) == 3]
        paths = [line[2] for line in lists if ("memory" in line[1].split(",") if named else not line[1])]
        places = [_mount_of(fields, kind) for fields in mounts]
        for path in paths:
            for place in places:
                if place is None or (named and "memory" not in place[2]):
                    continue
                inside = path[len(place[1]) :] if place[1] != "/" and path.startswith(place[1]) else path
                folder = os.path.normpath(place[0] + "/" + inside)
                found = _upwards(folder, os.path.normpath(place[0]))
                if any(os.path.exists(os.path.join(one, name)) for one in found for name in _GROUP_FILES):
                    return found
    return []


_GROUP_FILES = ("memory.events", "memory.oom_control")


def _mount_of(fields: List[str], kind: str) -> Optional[Tuple[str, str, List[str]]]:
    """Return (where it is mounted, what of it, its options) where a line of mountinfo is of a kind."""
    if "-" not in fields:
        return None
    dash = fields.index("-")
    if fields[dash + 1] != kind:
        return None
    return fields[4], fields[3], fields[-1].split(",")


def _upwards(folder: str, top: str) -> List[str]:
    found = []
    while folder == top or folder.startswith(top + "/"):
        found.append(folder)
        folder = os.path.dirname(folder)
    return found


def oom_kills(proc: str = "/proc") -> Optional[int]:
    """Return how many processes the kernel has killed for want of memory, or None where it doesn't count them.

    Those of this process's own control group alone, where there is one; else those of the whole machine.
    """
    counters = [os.path.join(group, name) for group in memory_groups(proc)[:1] for name in _GROUP_FILES]
    for path in [*counters, os.path.join(proc, "vmstat")]:
        with contextlib.suppress(OSError, ValueError), open(path, encoding="ascii", errors="replace") as handle:
            for line in handle:
                name, _blank, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return None


def _be_modest() -> None:
    """Let everything else on the device go first, and let the kernel take the compiler before anything of the user."""
    os.nice(NICENESS)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as handle:
        handle.write(OOM_SCORE_ADJ)


def run(folder: str) -> int:
    """Run the job described by <folder>/job.json and write <folder>/rc.json; returns the exit status."""
    with open(os.path.join(folder, "job.json"), encoding="utf-8") as handle:
        job: Dict[str, Any] = json.load(handle)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    kills = oom_kills()
    write_json(
        os.path.join(folder, "pid.json"),
        {
            "pid": os.getpid(),
            "start_ticks": start_ticks(os.getpid()),
            "session": os.getsid(0),
            "boot_id": boot_id(),
            "oom_kills": kills,
            "started_at": time.time(),
        },
    )
    argv: List[str] = job["argv"]
    began = time.time()
    try:
        # the lock is inherited on purpose: while pip lives, the job counts as running, even without its runner
        process = subprocess.Popen(
            argv, cwd=job["cwd"], env=job["env"], stdin=subprocess.DEVNULL, close_fds=False, preexec_fn=_be_modest
        )
        returncode = process.wait()
    except OSError as error:
        print(f"{argv[0]}: {error}", flush=True)
        returncode = 127
    status = 128 - returncode if returncode < 0 else returncode
    now = oom_kills()
    write_json(
        os.path.join(folder, "rc.json"),
        {
            "rc": status,
            "seconds": round(time.time() - began, 1),
            "ended_at": time.time(),
            "oom_kills": None if kills is None or now is None else max(0, now - kills),
        },
    )
    return status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1]))
