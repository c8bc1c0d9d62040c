"""Where the simulator keeps its files, and who may touch them at a time.

::

    <cache>/bases/<digest>/rootfs      Debian, shared read-only by all hosts (beside it: made.json)
    <cache>/snapshots/<name>/layer     a frozen host (beside it: snapshot.json)
    <cache>/fleets/<fleet>/            fleet.json, key, key.pub, known_hosts, inventory.yml, hosts/<host>/
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simulator.progress import say

REPOSITORY = Path(__file__).resolve().parent.parent


def cache_root() -> Path:
    """Return the folder of all that the simulator keeps: $SIMULATOR_CACHE, else .cache/simulator in the repository."""
    named = os.environ.get("SIMULATOR_CACHE")
    return Path(named).expanduser().resolve() if named else REPOSITORY / ".cache" / "simulator"


class Store:
    """The simulator's files below one root.

    Args:
        root: the folder; made when first written to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def tag(self) -> str:
        """A short digest of this store's place: two checkouts of the repository never share a kernel object."""
        return hashlib.sha256(os.fsencode(self.root)).hexdigest()[:6]

    @property
    def bases(self) -> Path:
        """The folder of the bases."""
        return self.root / "bases"

    @property
    def snapshots(self) -> Path:
        """The folder of the snapshots."""
        return self.root / "snapshots"

    @property
    def fleets(self) -> Path:
        """The folder of the fleets."""
        return self.root / "fleets"

    def names(self, folder: Path) -> list[str]:
        """Return the finished entries of bases, snapshots or fleets, sorted."""
        if not folder.is_dir():
            return []
        return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))

    @contextlib.contextmanager
    def lock(self, name: str, waiting_for: str) -> Iterator[None]:
        """Hold the lock of that name; the lock file goes with its last holder.

        Args:
            name: what is locked.
            waiting_for: said every ten seconds while another process holds it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / f".lock-{name}"
        said = 0.0
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same(handle, path):
                    break
            except BlockingIOError:
                if time.monotonic() - said > 10:
                    say(f"waiting for {waiting_for} (another process is at it)")
                    said = time.monotonic()
                time.sleep(0.2)
            os.close(handle)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(handle)

    def drop_stale_locks(self) -> None:
        """Remove the lock files of killed processes; what is held stays."""
        for path in self.root.glob(".lock-*"):
            with contextlib.suppress(OSError):
                handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _same(handle, path):
                        path.unlink()
                finally:
                    os.close(handle)


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, data: Any) -> None:
    """Write plain data whole or not at all."""
    write_text(path, json.dumps(data, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Return the data of a file that write_json wrote, None if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def remove(path: Path) -> None:
    """Remove a file or folder; nothing there is fine. Raises OSError if something stays."""
    for _ in range(20):
        # a dying process of a host may still write for a moment
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.1)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _same(handle: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    held = os.fstat(handle)
    return (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino)
