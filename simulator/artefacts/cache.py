"""Prepared once: digests of inputs, records of outputs, and changes that happen whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20
TEMPORARY = ".tmp-"


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes as hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def digest_of(parts: Iterable[bytes | str]) -> str:
    """Return one sha256 over several parts, each with its length, so that no two lists look alike."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


def digest_of_tree(root: Path) -> str:
    """Return a sha256 over the names and contents of all files under a folder."""
    files = sorted(path for path in root.rglob("*") if path.is_symlink() or not path.is_dir())
    return digest_of(
        part
        for path in files
        for part in (
            path.relative_to(root).as_posix(),
            os.readlink(path) if path.is_symlink() else path.read_bytes(),
        )
    )


def read_record(path: Path) -> dict[str, Any]:
    """Return a record of what was prepared; empty when there is none, or none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give the path of a temporary file that becomes `path` when the block ends well, and vanishes otherwise."""
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder that takes the place of `path` when the block ends well, and vanishes otherwise."""
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
    fresh, old = temporary / "new", temporary / "old"
    try:
        fresh.mkdir()
        yield fresh
        if path.exists():
            os.replace(path, old)
        os.replace(fresh, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let only one process prepare in a folder; others wait. Removes what a killed one left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        # With the lock held, temporaries can only be what a killed process left.
        for left in folder.glob(f"**/{TEMPORARY}*"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
        yield
