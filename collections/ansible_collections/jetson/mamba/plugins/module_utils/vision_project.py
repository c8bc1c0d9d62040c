"""The device's half of vision_project: hand a project's files out, write the fixed ones back, take a fix back.

A file is written only where it is still the one that was handed out, and only after its original has been kept. What
was kept lies in a folder of the project's owner, outside of the checkout and of every environment:

    <state_dir>/<file name>-<digest of its path>.json     path, sha256 before and after the fix, time
    <state_dir>/<file name>-<digest of its path>.orig     the file before the fix
"""

from __future__ import annotations

import base64
import contextlib
import glob
import hashlib
import json
import os
import stat
import time
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ansible_collections.jetson.mamba.plugins.module_utils import files
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

RECORD_SCHEMA = 1
# a model's source is far smaller; what is larger is data with another ending
LARGEST_BYTES = 2 << 20

# where the files of known layouts are
PRESETS: Dict[str, Tuple[str, ...]] = {
    "guide": ("yolov10_main/ultralytics/nn/AddModules/Structure/mamba_yolo.py",),
    "upstream": ("ultralytics/nn/modules/mamba_yolo.py", "ultralytics/nn/modules/common_utils_mbyolo.py"),
}

ARGUMENTS: Dict[str, Dict[str, Any]] = {
    "path": {"type": "path", "required": True},
    "name": {"type": "str", "default": ""},
    "files": {"type": "list", "elements": "str", "default": []},
    "preset": {"type": "str", "choices": ["", *sorted(PRESETS)], "default": ""},
    "classes": {"type": "list", "elements": "str", "default": []},
    "mode": {"type": "str", "choices": ["report", "fix"], "default": "report"},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "state_dir": {"type": "path", "default": ""},
    "patch_folder": {"type": "path", "default": ""},
    "operation": {"type": "str", "choices": ["fetch", "write", "restore"]},
    "edits": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "path": {"type": "str", "required": True},
            "sha256_before": {"type": "str", "required": True},
            "sha256_after": {"type": "str", "required": True},
            "splices": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "start": {"type": "int", "required": True},
                    "end": {"type": "int", "required": True},
                    "text": {"type": "str", "required": True},
                },
            },
        },
    },
}


class _Change(NamedTuple):
    """One file's content before and after, and what is remembered of it."""

    path: str
    target: str
    before: bytes
    after: bytes


def patterns_of(names: Sequence[str], preset: str) -> List[str]:
    """Return the globs that name a project's files.

    Args:
        names: the user's own, relative to the project.
        preset: a known layout, or nothing.

    Raises:
        Problem: there is none, or one could leave the project.
    """
    patterns = [*names, *PRESETS.get(preset, ())]
    if not patterns:
        raise Problem(
            "no file of the project is named",
            f"files, or preset: {' or '.join(sorted(PRESETS))}",
            "name the files with the SS2D-like classes, for instance files: ['**/mamba_yolo.py']",
        )
    for pattern in patterns:
        if not pattern or os.path.isabs(pattern) or ".." in pattern.split("/"):
            raise Problem(
                f"files has {pattern!r}",
                "a path or glob relative to the project",
                "leave the project's own path out, and name another project for files elsewhere",
            )
    return patterns


def default_state_dir() -> str:
    """Return where originals are kept: with the user who runs this, whichever environment is active."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.path.join(base, "jetson-mamba", "projects")


def fetch(project: str, patterns: Sequence[str], state_dir: str) -> Dict[str, Any]:
    """Return the files that the patterns name.

    Returns:
        files: rows {path (relative), sha256, content (base64), fixed (ours, and still as we left it)};
        skipped: rows {path, reason}; unmatched: patterns that name no file.

    Raises:
        Problem: there is no such project, or a file cannot be read.
    """
    root = _root(project)
    rows: Dict[str, Dict[str, Any]] = {}
    skipped: List[Dict[str, str]] = []
    unmatched: List[str] = []
    seen = set()
    for pattern in patterns:
        found = sorted(glob.glob(os.path.join(glob.escape(root), pattern), recursive=True))
        found = [path for path in found if not os.path.isdir(path)]
        if not found:
            unmatched.append(pattern)
        for path in found:
            name, target = os.path.relpath(path, root), os.path.realpath(path)
            if target in seen:
                continue
            seen.add(target)
            reason = _reason_against(root, target)
            if reason:
                skipped.append({"path": name, "reason": reason})
                continue
            content = _read(target)
            digest = hashlib.sha256(content).hexdigest()
            record = _read_record(state_dir, target)
            rows[name] = {
                "path": name,
                "sha256": digest,
                "content": base64.b64encode(content).decode("ascii"),
                "fixed": bool(record) and record.get("sha256_after") == digest,
            }
    return {"changed": False, "files": list(rows.values()), "skipped": skipped, "unmatched": unmatched}


def write(project: str, edits: Sequence[Mapping[str, Any]], state_dir: str, check: bool) -> Dict[str, Any]:
    """Do the splices, after keeping the originals; all files or none.

    Args:
        project: the checkout.
        edits: {path, sha256_before, sha256_after, splices: [{start, end, text (base64)}]} for each file.
        state_dir: folder of the originals.
        check: True to say what would change and write nothing.

    Raises:
        Problem: a file is no longer the one that was fetched, or cannot be written.
    """
    root = _root(project)
    changes = [change for change in (_change(root, edit) for edit in edits) if change is not None]
    if not check:
        for change in changes:
            _keep_and_write(change, state_dir)
    return _answer(root, changes)


def restore(project: str, state_dir: str, check: bool) -> Dict[str, Any]:
    """Put back every original that was kept of a project, byte for byte; all files or none.

    Raises:
        Problem: a fixed file was changed since, or its original is damaged; or a file cannot be written.
    """
    root = os.path.realpath(project)
    changes: List[_Change] = []
    notes: List[str] = []
    over: List[str] = []
    for record_path in sorted(glob.glob(os.path.join(glob.escape(state_dir), "*.json"))):
        record = _load(record_path)
        target = str(record.get("path", ""))
        if not target.startswith(root + os.sep):
            continue
        if not os.path.isfile(target):
            notes.append(f"{target} is gone; its original is kept: {_original_path(state_dir, target)}")
            continue
        current = _read(target)
        digest = hashlib.sha256(current).hexdigest()
        if digest == record.get("sha256_before"):
            over.append(target)
            continue
        original = _read_original(state_dir, target, str(record.get("sha256_before")))
        if digest != record.get("sha256_after"):
            raise Problem(
                f"{target} was changed after it was fixed (sha256 {digest})",
                f"the file as the fix left it, sha256 {record.get('sha256_after')}",
                "nothing was touched; take the fix out by hand, or copy the original over it: "
                f"cp {_original_path(state_dir, target)} {target}",
            )
        changes.append(_Change(os.path.relpath(target, root), target, current, original))
    if not check:
        for change in changes:
            _write(change.target, change.after)
            _forget(state_dir, change.target)
        for target in over:
            _forget(state_dir, target)
    return {**_answer(root, changes), "notes": notes}


def _root(project: str) -> str:
    if not os.path.isdir(project):
        raise Problem(
            f"there is no folder {project} on the device",
            "the checkout of a project",
            "correct its path, or copy the project there first",
        )
    return os.path.realpath(project)


def _reason_against(root: str, target: str) -> str:
    """Return why a file is not ours to touch, or nothing."""
    if not target.startswith(root + os.sep):
        return f"it is a link that leads out of the project, to {target}"
    try:
        facts = os.stat(target)
    except OSError as error:
        return f"it cannot be looked at: {error.strerror}"
    if not stat.S_ISREG(facts.st_mode):
        return "it is no regular file"
    if facts.st_size > LARGEST_BYTES:
        return f"it has {facts.st_size} bytes, more than any model's source"
    return ""


def _change(root: str, edit: Mapping[str, Any]) -> Optional[_Change]:
    """Return what a file becomes, or None where it is that already."""
    name = str(edit["path"])
    target = os.path.realpath(os.path.join(root, name))
    reason = _reason_against(root, target)
    if reason:
        raise Problem(f"{name}: {reason}", "the file that was fetched a moment ago", "run again")
    before = _read(target)
    digest = hashlib.sha256(before).hexdigest()
    if digest == edit["sha256_after"]:
        return None
    if digest != edit["sha256_before"]:
        raise Problem(
            f"{target} was changed while it was being looked at (sha256 {digest})",
            f"the file that was fetched, sha256 {edit['sha256_before']}",
            "nothing was touched; run again when nobody is editing it",
        )
    parts, position = [], 0
    for splice in edit["splices"]:
        parts += [before[position : splice["start"]], base64.b64decode(splice["text"])]
        position = splice["end"]
    after = b"".join([*parts, before[position:]])
    if hashlib.sha256(after).hexdigest() != edit["sha256_after"]:
        raise Problem(
            f"the fix of {target} came out otherwise than the controller had computed it",
            f"sha256 {edit['sha256_after']}",
            "nothing was touched; run again, and report this if it stays",
        )
    return _Change(name, target, before, after)


def _keep_and_write(change: _Change, state_dir: str) -> None:
    """Keep the original, say what will be, then write: a crash between leaves a file that is still the original."""
    record = {
        "schema": RECORD_SCHEMA,
        "path": change.target,
        "sha256_before": hashlib.sha256(change.before).hexdigest(),
        "sha256_after": hashlib.sha256(change.after).hexdigest(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    _guarded(_original_path(state_dir, change.target), change.before, 0o644)
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    _guarded(_record_path(state_dir, change.target), text.encode("utf-8"), 0o644)
    _write(change.target, change.after)


def _write(target: str, content: bytes) -> None:
    _guarded(target, content, stat.S_IMODE(os.stat(target).st_mode))


def _guarded(path: str, content: bytes, mode: int) -> None:
    try:
        files.write_atomic(path, content, mode)
    except OSError as error:
        raise Problem(
            f"{path} cannot be written: {error.strerror}",
            "a folder that the project's user may write, with space left",
            "name the checkout's owner as the project's user, or correct the rights of its folders",
        ) from error


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError as error:
        raise Problem(
            f"{path} cannot be read: {error.strerror}",
            "a file that the project's user may read",
            "name the checkout's owner as the project's user",
        ) from error


def _stem(state_dir: str, target: str) -> str:
    digest = hashlib.sha256(os.fsencode(target)).hexdigest()[:16]
    return os.path.join(state_dir, f"{os.path.basename(target)}-{digest}")


def _record_path(state_dir: str, target: str) -> str:
    return _stem(state_dir, target) + ".json"


def _original_path(state_dir: str, target: str) -> str:
    return _stem(state_dir, target) + ".orig"


def _load(path: str) -> Dict[str, Any]:
    """Return a record; what cannot be read as one is nothing that we remember."""
    try:
        with open(path, encoding="utf-8") as stream:
            record = json.load(stream)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and record.get("schema") == RECORD_SCHEMA else {}


def _read_record(state_dir: str, target: str) -> Dict[str, Any]:
    return _load(_record_path(state_dir, target))


def _read_original(state_dir: str, target: str, digest: str) -> bytes:
    path = _original_path(state_dir, target)
    content = _read(path)
    if hashlib.sha256(content).hexdigest() != digest:
        raise Problem(
            f"{path} is damaged",
            f"the original of {target}, sha256 {digest}",
            f"nothing was touched; take the file back by the project's own history: git checkout {target}",
        )
    return content


def _forget(state_dir: str, target: str) -> None:
    for path in (_record_path(state_dir, target), _original_path(state_dir, target)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    with contextlib.suppress(OSError):
        os.rmdir(state_dir)


def _answer(root: str, changes: Sequence[_Change]) -> Dict[str, Any]:
    diffs = [
        {
            "before_header": os.path.join(root, change.path),
            "after_header": os.path.join(root, change.path),
            "before": change.before.decode("utf-8", "replace"),
            "after": change.after.decode("utf-8", "replace"),
        }
        for change in changes
    ]
    return {"changed": bool(changes), "diff": diffs, "written": [change.path for change in changes]}
