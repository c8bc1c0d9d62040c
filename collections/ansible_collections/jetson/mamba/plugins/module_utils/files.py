"""Small text and binary files: digests, atomic writes, and a set of files brought to what is wanted."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from typing import Mapping, NamedTuple

from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

_BLOCK_BYTES = 1 << 20


class FileSpec(NamedTuple):
    """A text file that is wanted: its whole content and its permission bits."""

    content: str
    mode: int = 0o644


def sha256_file(path: str) -> str | None:
    """Return the sha256 of a file as lower-case hex, or None where no regular file is (links are followed)."""
    if not os.path.isfile(path):
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for block in iter(lambda: handle.read(_BLOCK_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()


def write_atomic(path: str, data: bytes, mode: int) -> None:
    """Put data at path so that a reader, or a power cut, meets the old file or the new one and nothing between.

    Missing parent folders are made. Where root replaces somebody's file, the file keeps its owner.

    Args:
        path: where the file shall be. A link is followed, so that the link itself stays.
        data: the whole content.
        mode: permission bits, independent of the umask.

    Raises:
        OSError: the folder cannot be written; nothing is left behind.
    """
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    os.makedirs(folder, mode=0o755, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(target)}.", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fchmod(stream.fileno(), mode)
            _keep_owner(target, stream.fileno())
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(folder)


def _keep_owner(target: str, descriptor: int) -> None:
    """Give the new file the owner of the file that it replaces (only root can, and only root needs to)."""
    if os.geteuid() != 0:
        return
    with contextlib.suppress(FileNotFoundError):
        old = os.stat(target)
        os.fchown(descriptor, old.st_uid, old.st_gid)


def sync_folder(folder: str) -> None:
    """Make a rename or removal in folder survive a power cut; file systems that cannot do it are left as they are."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_text(path: str) -> str | None:
    """Return a file's text, or None where there is no file; bytes that are not UTF-8 are kept as escapes.

    Raises:
        Problem: something that is no regular file is in the way, or it cannot be read.
    """
    try:
        with open(path, "rb") as handle:
            return handle.read().decode("utf-8", "surrogateescape")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Problem(
            f"{path} cannot be read as a file: {error.strerror}",
            "a regular file that this user may read, or none",
            f"look at it with 'ls -ld {path}' and move it away, or run the task with become",
        ) from error


def differs(path: str, spec: FileSpec | None) -> bool:
    """Return whether the file at path is other than wanted (spec None: it shall be absent)."""
    text = read_text(path)
    if spec is None:
        return text is not None or os.path.islink(path)
    return text != spec.content or _mode(path) != spec.mode


def ensure_files(wanted: Mapping[str, FileSpec | None], check: bool) -> tuple[bool, list[dict[str, str]]]:
    """Bring files to what is wanted, touching only those that differ.

    Args:
        wanted: path to FileSpec, or to None for a file that shall be absent.
        check: True to say what would change and write nothing.

    Returns:
        Whether anything changed (or would), and Ansible's diff entries, one for each file that differs.

    Raises:
        Problem: a file cannot be read, written or removed.
    """
    diffs: list[dict[str, str]] = []
    for path, spec in wanted.items():
        if not differs(path, spec):
            continue
        diffs.append(_diff(path, spec))
        if check:
            continue
        try:
            if spec is None:
                os.unlink(path)
                sync_folder(os.path.dirname(path))
            else:
                write_atomic(path, spec.content.encode("utf-8", "surrogateescape"), spec.mode)
        except OSError as error:
            raise Problem(
                f"{path} cannot be written: {error.strerror}",
                "a folder that the connecting user, or root through become, may write",
                f"check the owner and the free space of {os.path.dirname(path)}",
            ) from error
    return bool(diffs), diffs


def _diff(path: str, spec: FileSpec | None) -> dict[str, str]:
    """Return one Ansible diff entry; where only the mode differs, the texts are the modes."""
    before = read_text(path)
    after = spec.content if spec else ""
    mode = _mode(path)
    if spec is not None and before == spec.content and mode is not None:
        before, after = f"mode: {mode:04o}\n", f"mode: {spec.mode:04o}\n"
    return {
        "before": _printable(before or ""),
        "after": _printable(after),
        "before_header": path if mode is not None else path + " (absent)",
        "after_header": path if spec else path + " (absent)",
    }


def _printable(text: str) -> str:
    """Return text without lone surrogates, which JSON readers refuse."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _mode(path: str) -> int | None:
    """Return the permission bits of a file, or None where it is absent."""
    try:
        return stat.S_IMODE(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None
