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
from typing import Any, Dict, List, Optional

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
    write_json(
        os.path.join(folder, "pid.json"),
        {
            "pid": os.getpid(),
            "start_ticks": start_ticks(os.getpid()),
            "session": os.getsid(0),
            "boot_id": boot_id(),
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
    write_json(
        os.path.join(folder, "rc.json"),
        {"rc": status, "seconds": round(time.time() - began, 1), "ended_at": time.time()},
    )
    return status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1]))
