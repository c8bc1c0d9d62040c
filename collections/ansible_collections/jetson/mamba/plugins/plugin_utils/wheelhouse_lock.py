"""One owner of a piece of work among all processes of this controller and all controllers that share a folder.

A lock is a small JSON file that says who holds it; its modification time is the owner's heartbeat.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import secrets
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.files import write_atomic

Report = Callable[[str], Any]

SCHEMA = 1
HEARTBEAT_SECONDS = 30.0
ANNOUNCE_SECONDS = 15.0
POLL_SECONDS = 0.5
# twenty heartbeats: a machine that is merely busy has made one of them
STALE_SECONDS = 600.0
_UNLOCK = "ansible-playbook playbooks/wheelhouse.yml -i localhost, -e wheelhouse_action=unlock"


class Unlocking(NamedTuple):
    """One lock that unlock met: its file, its owner in words, whether it goes, and why or why not."""

    path: Path
    owner: str
    removed: bool
    reason: str


def duration(seconds: float) -> str:
    """Return a duration as people write it: 45s, 1m20s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def now_text(moment: float | None = None) -> str:
    """Return a moment (seconds since the epoch; None for now) as UTC text."""
    when = datetime.now(timezone.utc) if moment is None else datetime.fromtimestamp(moment, timezone.utc)
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a file system refuses into a Problem that says what to do."""
    try:
        yield
    except OSError as error:
        raise Problem(
            f"{error.filename or path}: {error.strerror or error}",
            "a wheelhouse folder with room that this user may write",
            f"check df and the owner of {path}, or name another folder in wheelhouse_path",
        ) from error


@contextlib.contextmanager
def flock(path: Path) -> Iterator[None]:
    """Hold a short lock among all processes that see this file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:  # made by another user of a shared folder
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise Problem(
                f"{path} cannot be locked: {error.strerror}",
                "a file system with file locks",
                "mount the shared folder with locks, or name a folder on another file system in wheelhouse_path",
            ) from error
        yield
    finally:
        os.close(descriptor)


def _boot() -> str:
    """Return what tells one start of this machine, or of a container on it, from another."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """Return when a process began, in whatever unit the system has, or None where none lives under this number."""
    if Path("/proc/self/stat").exists():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in ("Z", "X", "x") else fields[19]
    done = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False,
        env={"LC_ALL": "C", "PATH": "/bin:/usr/bin"},
    )
    return " ".join(done.stdout.split()) or None


class Owner(NamedTuple):
    """Who holds a lock, as its file says; heartbeat is its modification time."""

    data: dict[str, Any]
    heartbeat: float

    def describe(self, now: float) -> str:
        """Return who, since when and the last sign of life, in words."""
        if not self.data:
            return f"an unknown owner (its file is damaged), last sign of life {duration(self.silence(now))} ago"
        started = str(self.data.get("started"))
        try:
            since = datetime.strptime(started, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc).timestamp()
            age = f", for {duration(max(0.0, time.time() - since))}"
        except ValueError:
            age = ""
        silence = self.silence(now)
        quiet = f", last sign of life {duration(silence)} ago" if silence > 2 * HEARTBEAT_SECONDS else ""
        return (
            f"{self.data.get('user')} on {self.data.get('controller')} (process {self.data.get('pid')}), "
            f"since {started}{age}{quiet}"
        )

    def silence(self, now: float) -> float:
        """Return the seconds since the last heartbeat."""
        return max(0.0, now - self.heartbeat)

    def state(self, now: float) -> str:
        """Return "alive", "dead" (here, certainly) or "stale" (elsewhere, probably dead)."""
        stale = self.silence(now) > STALE_SECONDS
        if self.data.get("controller") != socket.gethostname():
            return "stale" if stale else "alive"
        if self.data.get("boot") != _boot():
            # this machine before it was started anew, or a container of the same name
            return "dead" if stale else "alive"
        try:
            start = _process_start(int(self.data["pid"]))
        except (KeyError, TypeError, ValueError):
            return "stale" if stale else "alive"
        return "alive" if start is not None and start == self.data.get("pid_start") else "dead"


def _clock(folder: Path) -> float:
    """Return the time of the file system that heartbeats are written to: a file server has a clock of its own."""
    handle, path = tempfile.mkstemp(prefix=".clock.", suffix=".tmp", dir=folder)
    try:
        return os.fstat(handle).st_mtime
    finally:
        os.close(handle)
        os.unlink(path)


def _read_owner(path: Path) -> Owner | None:
    """Return who holds a lock, or None where nobody does."""
    try:
        with open(path, encoding="utf-8") as handle:
            heartbeat = os.fstat(handle.fileno()).st_mtime
            text = handle.read()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        return Owner({}, path.stat().st_mtime)
    try:
        data = json.loads(text)
    except ValueError:
        data = None
    return Owner(data if isinstance(data, dict) else {}, heartbeat)


def unlock(path: Path, check: bool) -> Unlocking | None:
    """Remove one lock unless its owner lives."""
    with writing(path.parent), flock(path.parent / ".guard"):
        owner = _read_owner(path)
        if owner is None:
            return None
        now = _clock(path.parent)
        state, words = owner.state(now), owner.describe(now)
        if state == "alive":
            return Unlocking(path, words, False, "its owner lives: end that run first")
        if not check:
            path.unlink(missing_ok=True)
        reason = "its process is gone" if state == "dead" else "another machine's, silent for too long"
        return Unlocking(path, words, True, reason)


class Lock:
    """A lock file that one process holds, with a heartbeat. Not to be used twice."""

    def __init__(self, path: Path, what: str, say: Report) -> None:
        self.path = path
        self._what = what
        self._say = say
        self._token = secrets.token_hex(16)
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None

    def acquire(self, patience: float) -> float:
        """Take the lock; returns the seconds waited, 0 where it was free.

        Raises:
            Problem: the owner outlasts the patience, or is a stale one of another machine.
        """
        with writing(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            begin = time.monotonic()
            announced: float | None = None
            while True:
                owner = _read_owner(self.path)
                if owner is None:
                    if self._create():
                        break
                    continue
                now, waited = _clock(self.path.parent), time.monotonic() - begin
                state = owner.state(now)
                if state == "dead":
                    if self._take_over(owner):
                        self._say(f"took over {self._what}: its owner is gone ({owner.describe(now)})")
                        break
                    continue
                if state == "stale":
                    raise self._stale(owner, now)
                if waited >= patience:
                    raise self._outlasted(owner, now, patience)
                if announced is None or time.monotonic() - announced >= ANNOUNCE_SECONDS:
                    announced = time.monotonic()
                    self._say(f"waiting for {self._what}: held by {owner.describe(now)}; {self.path}")
                time.sleep(max(0.0, min(POLL_SECONDS, patience - waited)))
        self._heart = threading.Thread(target=self._beat, name="wheelhouse-heartbeat", daemon=True)
        self._heart.start()
        return 0.0 if announced is None else time.monotonic() - begin

    def _stale(self, owner: Owner, now: float) -> Problem:
        silence = duration(owner.silence(now))
        return Problem(
            f"{self.path} is held by {owner.describe(now)}, and there was no sign of life for {silence}",
            f"a living owner of {self._what} (it touches that file every {HEARTBEAT_SECONDS:g} s), or none",
            f"make sure that no run is going on at {owner.data.get('controller') or 'the other controllers'}, then "
            f"remove the lock: {_UNLOCK}",
        )

    def _outlasted(self, owner: Owner, now: float, patience: float) -> Problem:
        return Problem(
            f"{self.path} is held by {owner.describe(now)}",
            f"{self._what} to be done within {duration(patience)} of waiting",
            "let that run end and run again, or wait longer: -e wheelhouse_patience_minutes=MINUTES",
        )

    def _temporary(self) -> Path:
        """Write who we are beside the lock, whole."""
        pid = os.getpid()
        try:
            user = getpass.getuser()
        except (KeyError, OSError):
            user = str(os.getuid())
        data = {
            "schema": SCHEMA,
            "token": self._token,
            "controller": socket.gethostname(),
            "boot": _boot(),
            "pid": pid,
            "pid_start": _process_start(pid),
            "user": user,
            "started": now_text(),
            "what": self._what,
        }
        path = self.path.with_name(f".{self.path.name}.{self._token}.tmp")
        write_atomic(str(path), (json.dumps(data, indent=2, sort_keys=True) + "\n").encode("utf-8"), 0o644)
        return path

    def _create(self) -> bool:
        """Make the lock file where there is none; atomic also on network file systems."""
        temporary = self._temporary()
        try:
            os.link(temporary, self.path)
            return True
        except FileExistsError:
            return False
        except OSError:
            # a file system without hard links
            try:
                descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            except FileExistsError:
                return False
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(temporary.read_bytes())
                handle.flush()
                os.fsync(handle.fileno())
            return True
        finally:
            temporary.unlink(missing_ok=True)

    def _take_over(self, dead: Owner) -> bool:
        """Put ourselves in the place of a dead owner, unless another waiter was quicker."""
        with flock(self.path.parent / ".guard"):
            owner = _read_owner(self.path)
            if owner is None or owner.data.get("token") != dead.data.get("token"):
                return False
            os.replace(self._temporary(), self.path)
            return True

    def _is_ours(self) -> bool:
        owner = _read_owner(self.path)
        return owner is not None and owner.data.get("token") == self._token

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                if not self._is_ours():
                    self._say(f"the lock {self.path} was removed by somebody while this run holds it")
                    return
                os.utime(self.path)
            except OSError:
                continue  # a file server that comes back

    def release(self) -> None:
        """Give the lock back; one that was taken away stays with who has it now."""
        self._stop.set()
        if self._heart is not None:
            self._heart.join(5)
        with contextlib.suppress(OSError, Problem), flock(self.path.parent / ".guard"):
            if self._is_ours():
                self.path.unlink(missing_ok=True)
