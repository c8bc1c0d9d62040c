"""The controller's store of built wheels: one folder a platform class, one manifest in it, one owner of a build.

Layout, with the manifest always written last:

    <class>/manifest.json                         {schema, class_id, wheels: {key: row}}
    <class>/<component>-<key[:12]>/               the wheel and, where it was built, build.log
    <class>/aside/<UTC time>-<wheel> + .json      wheels that turned out to be wrong, and why
    <class>/locks/<component>-<key[:12]>.json     who is building; its modification time is the owner's heartbeat

A crash between a wheel and its manifest leaves a file that nobody names; the next add or prune removes it. Processes of
one controller and several controllers on a shared folder may all write at the same time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from ansible_collections.jetson.mamba.plugins.module_utils import inspection
from ansible_collections.jetson.mamba.plugins.module_utils.build import RECIPE, build_key
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.files import sha256_file, sync_folder, write_atomic
from ansible_collections.jetson.mamba.plugins.module_utils.versions import (
    Target,
    canonical_name,
    parse_wheel_name,
    same_version,
    tag_mismatch,
)
from ansible_collections.jetson.mamba.plugins.plugin_utils import components, wheel_inspection, wheelhouse_lock
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheelhouse_lock import flock, now_text, writing

Row = dict[str, Any]
Report = Callable[[str], Any]
# looks into a wheel that a row describes; raises a Problem where it is something else
Inspect = Callable[[Path, Row], wheel_inspection.Inspection]

SCHEMA = 1
FOLDER = "wheelhouse"
# variables of playbooks/wheelhouse.yml beside the settings of the role wheelhouse
PLAYBOOK_VARIABLES = (
    "wheelhouse_action",
    "wheelhouse_class",
    "wheelhouse_import",
    "wheelhouse_keep",
    "wheelhouse_aside_days",
)
KEEP_ROWS = 2
ASIDE_DAYS = 30.0
# a copy in flight is written to all the time
_PARTIAL_SECONDS = 3600.0
_BLOCK_BYTES = 1 << 20
_CLASS = re.compile(
    r"(?P<machine>[a-z0-9_]+)-glibc(?P<glibc>\d+\.\d+)-cu(?P<cuda>none|\d+\.\d+)-cp(?P<major>\d)(?P<minor>\d+)"
    r"-torch(?P<torch>[A-Za-z0-9][A-Za-z0-9.+_]*)-(?P<abi>cxx11|cxx98)-(?P<sm>cpu|sm\d+[af]?)"
)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ENTRY = re.compile(r"[A-Za-z0-9_]+-[0-9a-f]{12}")
_REQUIRED = ("component", "version", "key", "class_id", "filename", "sha256", "origin", "sm", "flags")
_OPTIONAL = ("source", "source_sha256", "builder", "l4t", "seconds")


# ---------------------------------------------------------------- classes and keys


class ClassId(NamedTuple):
    """The parts of a platform class.

    Args:
        cuda: major.minor, or "none".
        python: such as "3.10".
        torch: as pip shows it.
        cxx11_abi: whether torch was built with the C++11 ABI.
        sm: the GPU's number ("87"), or "cpu".
    """

    machine: str
    glibc: str
    cuda: str
    python: str
    torch: str
    cxx11_abi: bool
    sm: str

    @property
    def target(self) -> Target:
        """What the name of a wheel of this class must be for."""
        return Target(self.machine, self.python, self.glibc)


def parse_class_id(class_id: str) -> ClassId:
    """Return the parts of a class as module_utils/plan.class_id writes it.

    Raises:
        Problem: it is no class id.
    """
    match = _CLASS.fullmatch(class_id)
    if not match:
        raise Problem(
            f"'{class_id}' is no platform class",
            "MACHINE-glibcX.Y-cuX.Y-cpXY-torchVERSION-cxx11-smNN, such as "
            "aarch64-glibc2.35-cu12.6-cp310-torch2.5.0a0+872d972e41.nv24.8-cxx11-sm87",
            "copy it from the plan that a run prints, or from the folders' names in the wheelhouse",
        )
    sm = match["sm"]
    return ClassId(
        match["machine"],
        match["glibc"],
        match["cuda"],
        f"{match['major']}.{match['minor']}",
        match["torch"],
        match["abi"] == "cxx11",
        sm if sm == "cpu" else sm[len("sm") :],
    )


def imported_key(class_id: str, component: str, version: str, sha256: str) -> str:
    """Return the key of a wheel that others built: nothing is known of its making but the file itself."""
    inputs = {"recipe": "imported", "component": component, "version": version, "class": class_id, "sha256": sha256}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode("utf-8")).hexdigest()


def is_imported(row: Mapping[str, Any]) -> bool:
    """Return whether a row's wheel was built by others (an archive folder, an index, an import)."""
    return row.get("source_sha256") is None


def recorded_key(row: Mapping[str, Any]) -> str:
    """Return the key that follows from what a row records."""
    class_id, component, version = str(row["class_id"]), str(row["component"]), str(row["version"])
    if is_imported(row):
        return imported_key(class_id, component, version, str(row["sha256"]))
    return build_key(component, version, str(row["source_sha256"]), class_id, str(row["sm"]), list(row["flags"]))


def satisfies(found: str, wanted: str) -> bool:
    """Return whether a wheel's version is the wanted one; a local part that nobody asked for is one (1.6.0+cu126)."""
    return same_version(found, wanted) or ("+" not in wanted and same_version(found.split("+")[0], wanted))


def default_root(project: str | Path) -> Path:
    """Return the wheelhouse that is used where wheelhouse_path is empty: beside site.yml."""
    return Path(project) / FOLDER


def open_store(setting: str | None, project: str | Path) -> Wheelhouse:
    """Return the wheelhouse that a setting names.

    Args:
        setting: wheelhouse_path; empty for the default.
        project: the folder of site.yml; a relative setting counts from there.
    """
    if not setting:
        return Wheelhouse(default_root(project))
    return Wheelhouse(Path(project) / Path(setting).expanduser())


def inspect_row(path: Path, row: Mapping[str, Any]) -> wheel_inspection.Inspection:
    """Look into a wheel for what its row says it is.

    Raises:
        Problem: it is something else.
    """
    return wheel_inspection.inspect(path, expectation_of(row))


def expectation_of(row: Mapping[str, Any]) -> inspection.Expectation:
    """Return what a wheel of a row's class must hold.

    Raises:
        Problem: the row's class or component is unknown.
    """
    parts = parse_class_id(str(row["class_id"]))
    modules = components.component(str(row["component"]), str(row["version"])).provides_modules
    return inspection.Expectation(
        machine=parts.machine,
        python=parts.python,
        glibc=parts.glibc,
        sm=parts.sm,
        component=str(row["component"]),
        version=str(row["version"]),
        modules=tuple(modules),
        cxx11=parts.cxx11_abi,
    )


# ---------------------------------------------------------------- answers


class Look(NamedTuple):
    """What the wheelhouse has for a key.

    Args:
        row: the manifest's row, or None.
        path: the verified wheel; None where there is none that can be used.
        fault: why a row that is there cannot be used.
    """

    row: Row | None
    path: Path | None
    fault: str | None


class Finding(NamedTuple):
    """What verify found out about one wheel: why it was (or would be) set aside, warnings, and where it went."""

    row: Row
    fault: str | None
    warnings: list[str]
    aside: Path | None


class Removal(NamedTuple):
    """One thing that prune removed or would remove: its path below the wheelhouse, bytes and the reason."""

    path: str
    size: int
    reason: str


# ---------------------------------------------------------------- small helpers


def _stamp(path: Path, sha256: str) -> str:
    status = path.stat()
    return f"{sha256} {status.st_size} {status.st_mtime_ns}\n"


def _note(path: Path) -> Path:
    return path.with_name(f".{path.name}.verified")


def _remember(path: Path, sha256: str) -> None:
    """Write down that a file had this checksum at its size and time; a read-only wheelhouse just forgets."""
    with contextlib.suppress(OSError):
        write_atomic(str(_note(path)), _stamp(path, sha256).encode(), 0o644)


def _forget(path: Path, sha256: str) -> None:
    """Take back what _remember() wrote of a file that rotted, with its size and time as they were."""
    if _is_remembered(path, sha256):
        with contextlib.suppress(OSError):
            _note(path).unlink()


def _wrong_value(row: Mapping[str, Any]) -> str | None:
    """Return the first field of a row, as "name (value)", whose value cannot be right, or None."""
    texts = ("component", "version", "key", "class_id", "filename", "sha256", "origin", "sm")
    lists = ("flags", "needed")
    fitting = {
        **{name: isinstance(row.get(name), str) for name in texts},
        **{
            name: isinstance(row.get(name, []), list) and all(isinstance(one, str) for one in row.get(name, []))
            for name in lists
        },
        "source_sha256": isinstance(row.get("source_sha256"), (str, type(None))),
        "size": type(row.get("size")) in (int, type(None)),
    }
    wrong = next((name for name, fits in fitting.items() if not fits), None)
    if wrong is None:
        shapes = {
            "filename": _safe_name(row["filename"]),
            "component": _safe_name(row["component"]),
            "sha256": bool(_DIGEST.fullmatch(row["sha256"])),
        }
        wrong = next((name for name, fits in shapes.items() if not fits), None)
    return None if wrong is None else f"{wrong} ({row.get(wrong)!r:.80})"


def _is_remembered(path: Path, sha256: str) -> bool:
    try:
        return _note(path).read_text(encoding="utf-8") == _stamp(path, sha256)
    except (OSError, UnicodeDecodeError):
        return False


def _copy_in(source: Path, folder: Path, filename: str) -> tuple[Path, str, int]:
    """Copy a file beside its place; returns the temporary file, its sha256 and its size."""
    handle, temporary = tempfile.mkstemp(prefix=f".{filename}.", suffix=".tmp", dir=folder)
    digest, size = hashlib.sha256(), 0
    try:
        with open(source, "rb") as reader, os.fdopen(handle, "wb") as writer:
            for block in iter(lambda: reader.read(_BLOCK_BYTES), b""):
                digest.update(block)
                writer.write(block)
                size += len(block)
            writer.flush()
            os.fchmod(writer.fileno(), 0o644)
            os.fsync(writer.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return Path(temporary), digest.hexdigest(), size


def _is_partial(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _safe_name(name: str) -> bool:
    return bool(name) and name == os.path.basename(name) and not name.startswith(".")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _clear(folder: Path, kept: Collection[str] = ()) -> None:
    """Empty an entry's folder but for what is kept or just being written, and remove it where nothing is left."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in kept and not _in_flight(path):
            _remove(path)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_atomic(str(path), (json.dumps(data, indent=2, sort_keys=True) + "\n").encode("utf-8"), 0o644)


def _is_young(path: Path, seconds: float = _PARTIAL_SECONDS) -> bool:
    """Return whether a file was written to lately."""
    try:
        return time.time() - path.lstat().st_mtime < seconds
    except FileNotFoundError:
        return True


def _in_flight(path: Path) -> bool:
    return _is_partial(path) and _is_young(path)


def _size(path: Path) -> int:
    if path.is_dir() and not path.is_symlink():
        return sum(_size(child) for child in path.iterdir())
    return path.lstat().st_size


# ---------------------------------------------------------------- the store


class Wheelhouse:
    """The wheelhouse in one folder, which need not exist yet."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()

    def folder(self, class_id: str) -> Path:
        """Return the folder of a class.

        Raises:
            Problem: it is no class id.
        """
        parse_class_id(class_id)
        return self.root / class_id

    def entry(self, class_id: str, component: str, key: str) -> Path:
        """Return the folder of one wheel."""
        return self.folder(class_id) / f"{component}-{key[:12]}"

    def classes(self) -> list[str]:
        """Return the classes that have a folder."""
        if not self.root.is_dir():
            return []
        return sorted(path.name for path in self.root.iterdir() if path.is_dir() and _CLASS.fullmatch(path.name))

    def manifest(self, class_id: str) -> dict[str, Row]:
        """Return {key: row} of a class; empty where it has no manifest yet.

        Raises:
            Problem: the manifest is damaged, or of another release. It is never taken for an empty one.
        """
        path = self.folder(class_id) / "manifest.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise ValueError(f"it has schema {data['schema']}, this release knows {SCHEMA}")
            if data["class_id"] != class_id:
                raise ValueError(f"it is of class {data['class_id']}")
            # a row that is none is a fault of that wheel alone, see _fault
            return {str(key): dict(row) if isinstance(row, dict) else {} for key, row in data["wheels"].items()}
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise Problem(
                f"{path} cannot be read: {error.strerror}",
                "a wheelhouse folder that this user may read",
                f"check the owner of {self.root}, or name another folder in wheelhouse_path",
            ) from error
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise Problem(
                f"{path} cannot be read: {reason}",
                f"the manifest of {class_id}",
                "restore it from a backup; or move it away, and its wheels are built anew: "
                f"mv '{path}' '{path}.damaged'",
            ) from error

    def rows(self) -> Iterator[Row]:
        """Yield the rows of all classes, by class, component and time.

        Raises:
            Problem: a manifest is damaged.
        """
        for class_id in self.classes():
            rows = self.manifest(class_id).values()
            yield from sorted(rows, key=lambda row: (str(row.get("component")), str(row.get("added"))))

    # ------------------------------------------------------------ asking

    def look(self, class_id: str, key: str, rehash: bool = False) -> Look:
        """Return what there is for a key, verified. Changes nothing but the memory of the verification.

        The wheel is hashed once; afterwards its size and modification time are compared, until one of them changes.

        Args:
            class_id: of the platform.
            key: of the wheel.
            rehash: read the wheel whole again: a disk that fails changes neither its size nor its time.

        Raises:
            Problem: class_id is none.
        """
        try:
            row = self.manifest(class_id).get(key)
        except Problem as problem:
            if not _CLASS.fullmatch(class_id):
                raise
            return Look(None, None, f"{problem.found}; {problem.next_step}")
        if row is None:
            return Look(None, None, None)
        fault = self._fault(class_id, key, row, rehash)
        if fault:
            return Look(row, None, fault)
        # what an older release, or a person, left out
        whole = {**dict.fromkeys(_OPTIONAL), "needed": [], **row}
        path = self.path_of(whole)
        return Look({**whole, "size": path.stat().st_size}, path, None)

    def path_of(self, row: Mapping[str, Any]) -> Path:
        """Return where a row's wheel lies, or should."""
        return self.entry(str(row["class_id"]), str(row["component"]), str(row["key"])) / str(row["filename"])

    def _fault(self, class_id: str, key: str, row: Mapping[str, Any], rehash: bool) -> str | None:
        """Return why a row cannot be used, or None."""
        missing = [name for name in _REQUIRED if row.get(name) is None]
        if missing:
            return f"its row in the manifest has no {', '.join(missing)}"
        wrong = _wrong_value(row)
        if wrong:
            return f"its row in the manifest has a wrong {wrong}"
        if row["class_id"] != class_id:
            return f"it is recorded for class {row['class_id']}"
        if row["key"] != key:
            return f"its row in the manifest is recorded under the key {key[:12]} and says {row['key'][:12]}"
        # what an older release built stays what it was; no key of this release asks for it
        if is_imported(row) or row.get("recipe") == RECIPE:
            computed = recorded_key(row)
            if computed != key:
                return f"its recorded inputs make the key {computed[:12]}, it is recorded as {key[:12]}"
        path, sha256 = self.path_of(row), str(row["sha256"])
        try:
            size = path.stat().st_size
        except OSError as error:
            return f"its file cannot be read: {path} ({error.strerror})"
        if row.get("size") is not None and size != row["size"]:
            return f"{path} has {size} bytes, the manifest says {row['size']}"
        if not rehash and _is_remembered(path, sha256):
            return None
        try:
            found = sha256_file(str(path))
        except OSError as error:
            return f"its file cannot be read: {path} ({error.strerror})"
        if found != sha256:
            _forget(path, sha256)
            return f"{path} has sha256 {found}, the manifest says {sha256}"
        _remember(path, sha256)
        return None

    def find_imported(self, class_id: str, component: str, version: str) -> list[str]:
        """Return the keys of the wheels that others built for a component's version, the newest first.

        Raises:
            Problem: the manifest is damaged.
        """
        found = {
            key: str(row.get("added"))
            for key, row in self.manifest(class_id).items()
            if row.get("component") == component and is_imported(row) and satisfies(str(row.get("version")), version)
        }
        return sorted(found, key=lambda key: found[key], reverse=True)

    def explain(self, class_id: str, component: str, version: str, wanted: Mapping[str, Any]) -> str | None:
        """Return what differs between the wanted wheel and the newest one of that component, or None.

        Args:
            wanted: {key, source_sha256, flags, sm}.

        Returns:
            A reason for a plan, such as "version 2.2.5 wanted, 2.2.4 in the wheelhouse". None where the wheelhouse has
            no wheel of the component, or has the wanted one.

        Raises:
            Problem: the manifest is damaged.
        """
        rows = self.manifest(class_id)
        known = [
            row
            for row in rows.values()
            if row.get("component") == component and not set(_REQUIRED) - set(row) and not _wrong_value(row)
        ]
        if wanted["key"] in rows or not known:
            return None
        built = [row for row in known if not is_imported(row)]
        newest = max(built or known, key=lambda row: str(row.get("added")))
        reasons = []
        if not satisfies(str(newest["version"]), version):
            reasons.append(f"version {version} wanted, {newest['version']} in the wheelhouse")
        elif is_imported(newest):
            return None  # an imported wheel of the version serves; there is nothing to explain
        elif newest["source_sha256"] != wanted["source_sha256"]:
            old, new = str(newest["source_sha256"])[:12], str(wanted["source_sha256"])[:12]
            reasons.append(f"its source changed (sha256 {old} became {new})")
        old_flags, new_flags = sorted(newest.get("flags") or []), sorted(wanted.get("flags") or [])
        if not is_imported(newest) and old_flags != new_flags:
            reasons.append(f"other flags ({_flags_text(new_flags)} wanted, built with {_flags_text(old_flags)})")
        if str(newest.get("sm")) != str(wanted["sm"]):
            reasons.append(f"other GPU (sm {wanted['sm']} wanted, built for {newest.get('sm')})")
        if not reasons and newest.get("recipe") != RECIPE:
            reasons.append("this release builds wheels in another way")
        return "; ".join(reasons) or "its key changed"

    # ------------------------------------------------------------ changing

    @contextlib.contextmanager
    def _changing(self, class_id: str) -> Iterator[dict[str, Row]]:
        """Give {key: row} of a class, and write it when the block ends without an error and has changed it."""
        folder = self.folder(class_id)
        with writing(folder), flock(folder / ".manifest.lock"):
            rows = self.manifest(class_id)
            before = json.dumps(rows, sort_keys=True)
            yield rows
            if json.dumps(rows, sort_keys=True) != before:
                self._write_manifest(class_id, rows)

    def _write_manifest(self, class_id: str, rows: Mapping[str, Row]) -> None:
        _write_json(
            self.folder(class_id) / "manifest.json", {"schema": SCHEMA, "class_id": class_id, "wheels": dict(rows)}
        )

    def _complete(self, wheel: Path, row: Mapping[str, Any]) -> Row:
        """Return a row with all its fields.

        Raises:
            Problem: its name, class, checksum or key is not what it must be.
        """
        full: Row = dict.fromkeys(_OPTIONAL) | {"filename": wheel.name, "recipe": RECIPE, "needed": []} | dict(row)
        if is_imported(full):
            full["key"] = imported_key(
                str(full["class_id"]), str(full["component"]), str(full["version"]), str(full["sha256"]).lower()
            )
        missing = [name for name in _REQUIRED if full.get(name) is None]
        if missing:
            raise ValueError(f"a wheelhouse row lacks {', '.join(missing)}")
        parse_class_id(str(full["class_id"]))
        full["sha256"], full["flags"] = str(full["sha256"]).lower(), sorted(full["flags"])
        name = str(full["filename"])
        if not _safe_name(name) or not name.endswith(".whl") or not _ENTRY.fullmatch(
            f"{full['component']}-{str(full['key'])[:12]}"
        ):
            raise Problem(
                f"{name} of {full['component']} with key {full['key']}",
                "a wheel's file name, a component's name and a key of hex digits",
                "name the file as it was built or published",
            )
        computed = recorded_key(full)
        if computed != full["key"]:
            raise Problem(
                f"{name} comes with key {str(full['key'])[:12]}",
                f"key {computed[:12]}, which follows from its source, version, class and flags",
                "run again; if it stays, the source or the settings change while the run goes on",
            )
        return full

    def add(self, wheel: Path, row: Mapping[str, Any], log: Path | None = None) -> Row:
        """Copy a wheel in and enter it into the manifest, last. The wheel given stays where it is.

        Args:
            wheel: the file.
            row: component, version, class_id, sha256, origin, sm, flags; where known filename (default: the file's),
                source, builder, l4t, seconds, needed (sonames that the device's linker must find); source_sha256 and
                key of what was built here. Without source_sha256 others built it, and its key becomes imported_key().
                Further fields are kept as they are.
            log: of the build.

        Returns:
            The row as written, with size, log, added and recipe.

        Raises:
            Problem: the file is not the one that the row describes; it cannot be written; the manifest is damaged.
        """
        full = self._complete(wheel, row)
        class_id, name = str(full["class_id"]), str(full["filename"])
        self.manifest(class_id)  # said before the copying, where it is damaged
        folder = self.entry(class_id, str(full["component"]), str(full["key"]))
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            temporary, sha256, size = _copy_in(wheel, folder, name)
            copied_log: Path | None = None
            try:
                if sha256 != full["sha256"]:
                    raise Problem(
                        f"{wheel} has sha256 {sha256}", f"sha256 {full['sha256']}, as it was announced", "run again"
                    )
                if log is not None and log.is_file():
                    copied_log, _digest, _bytes = _copy_in(log, folder, "build.log")
                full.update(size=size, added=now_text(), log=f"{folder.name}/build.log" if copied_log else None)
                with self._changing(class_id) as rows:
                    os.replace(temporary, folder / name)
                    if copied_log:
                        os.replace(copied_log, folder / "build.log")
                    _remember(folder / name, sha256)
                    _clear(folder, {name, _note(folder / name).name, "build.log" if copied_log else name})
                    sync_folder(str(folder))
                    rows[str(full["key"])] = full
            finally:
                temporary.unlink(missing_ok=True)
                if copied_log is not None:
                    copied_log.unlink(missing_ok=True)
        return full

    def set_aside(
        self, class_id: str, key: str, reason: str, seen: Mapping[str, Any] | None = None
    ) -> Path:
        """Move a wheel out of the way, with the reason, and forget its row.

        Args:
            reason: in words.
            seen: the row that was judged; where another one has taken its place since, nothing is done.

        Returns:
            Where the wheel lies now; the note beside it where the wheel was gone already; the folder of what was set
            aside where there was nothing to do.

        Raises:
            Problem: it cannot be written, or the manifest is damaged.
        """
        aside = self.folder(class_id) / "aside"
        with self._changing(class_id) as rows:
            row = rows.get(key)
            if row is None or (seen is not None and dict(seen) != row):
                return aside
            aside.mkdir(exist_ok=True)
            named = str(row.get("filename"))
            stem = f"{datetime.now(timezone.utc).strftime('%Y%m%dT%H%M%S.%fZ')}-"
            stem += named if _safe_name(named) else f"{key[:12]}.whl"
            note = {"reason": reason, "set_aside": now_text(), "row": row}
            result = aside / f"{stem}.json"
            _write_json(result, note)
            folder = self.folder(class_id) / f"{row.get('component')}-{key[:12]}"
            if _ENTRY.fullmatch(folder.name) and _safe_name(named) and (folder / named).is_file():
                result = aside / stem
                os.replace(folder / named, result)
                _clear(folder)
                sync_folder(str(aside))
            del rows[key]
        return result

    def import_wheel(
        self,
        wheel: Path,
        class_id: str,
        component: str,
        *,
        sha256: str | None = None,
        inspect: Inspect | None = None,
        check: bool = False,
    ) -> tuple[Row, bool]:
        """Take in a wheel that others built.

        Args:
            wheel: the file; it stays where it is.
            class_id: what it was built for, as its owner says.
            component: such as mamba_ssm.
            sha256: what the file must have, where the settings name it.
            inspect: looks into it.
            check: say what would be done and do nothing.

        Returns:
            The row, and whether the wheelhouse changed (or would).

        Raises:
            Problem: the file's name, its checksum or what is inside does not fit.
        """
        parts = parse_class_id(class_id)
        try:
            name = parse_wheel_name(wheel.name)
        except ValueError as error:
            raise Problem(str(error), "a wheel under its published name", f"rename {wheel}") from error
        if canonical_name(name.name) != canonical_name(component):
            raise Problem(f"{wheel.name} is {name.name}", f"a wheel of {component}", "name another file")
        mismatch = tag_mismatch(name, parts.target)
        if mismatch:
            raise Problem(
                f"{wheel.name}: {mismatch}", f"a wheel for {class_id}", "name the class that it was built for"
            )
        found = sha256_file(str(wheel))
        if found is None:
            raise Problem(f"no file at {wheel}", f"a wheel of {component}", "correct wheelhouse_import")
        if sha256 and found != sha256.lower():
            raise Problem(
                f"{wheel} has sha256 {found}",
                f"sha256 {sha256}, as wheelhouse_sha256 says",
                "replace the file by the one that was meant, or correct wheelhouse_sha256",
            )
        row: Row = {
            "component": component,
            "version": name.version,
            "key": imported_key(class_id, component, name.version, found),
            "class_id": class_id,
            "sha256": found,
            "origin": f"imported from {wheel}",
            "sm": parts.sm,
            "flags": [],
        }
        if inspect is not None:
            row["needed"] = list(inspect(wheel, row).needed)
        there = self.look(class_id, str(row["key"]), rehash=True)
        if there.path is not None and there.row is not None:
            return there.row, False
        return (row if check else self.add(wheel, row)), True

    # ------------------------------------------------------------ keeping house

    def verify(self, inspect: Inspect | None = None, check: bool = False, say: Report | None = None) -> list[Finding]:
        """Hash every wheel anew and look into it; what is wrong is set aside.

        Args:
            inspect: looks into a wheel whose checksum is right.
            check: set nothing aside.
            say: shows one line for each wheel that is looked at.

        Raises:
            Problem: a manifest is damaged.
        """
        findings = []
        for class_id in self.classes():
            for key, row in sorted(self.manifest(class_id).items(), key=lambda item: str(item[1].get("component"))):
                if say is not None:
                    say(f"verifying {row.get('filename')} ({key[:12]})")
                fault = self._fault(class_id, key, row, rehash=True)
                warnings: list[str] = []
                if fault is None and inspect is not None:
                    try:
                        warnings = list(inspect(self.path_of(row), row).warnings)
                    except Problem as problem:
                        fault = " ".join(f"{problem.found}; expected: {problem.expected}".split())
                aside = self.set_aside(class_id, key, fault, seen=row) if fault and not check else None
                findings.append(Finding({**row, "class_id": class_id, "key": key}, fault, warnings, aside))
        return findings

    def strays(self, class_id: str) -> list[Path]:
        """Return the files of a class's folder that no manifest names and that nobody is writing.

        Raises:
            Problem: the manifest is damaged: then nothing can be said to be nobody's.
        """
        folder = self.folder(class_id)
        named: dict[str, set[str]] = {}
        for key, row in self.manifest(class_id).items():
            path = Path(str(row.get("filename")))
            named[f"{row.get('component')}-{key[:12]}"] = {path.name, _note(path).name, "build.log"}
        found: list[Path] = []
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.name in ("manifest.json", ".manifest.lock", "aside", "locks") or _in_flight(path):
                continue
            if path.is_dir() and _ENTRY.fullmatch(path.name):
                inside = sorted(path.iterdir())
                found += [one for one in inside if one.name not in named.get(path.name, ()) and not _in_flight(one)]
                if not inside and not _is_young(path):
                    found.append(path)
            else:
                found.append(path)
        return found

    def prune(self, keep: int = KEEP_ROWS, aside_days: float = ASIDE_DAYS, check: bool = False) -> list[Removal]:
        """Remove old wheels, files that no manifest names, and what was set aside long ago.

        Args:
            keep: rows that stay of each class and component, the newest.
            aside_days: age at which what was set aside goes.
            check: say what would go and remove nothing.

        Raises:
            Problem: a manifest is damaged; something cannot be removed.
        """
        if keep < 1 or aside_days < 0:
            raise Problem(
                f"wheelhouse_keep {keep}, wheelhouse_aside_days {aside_days:g}",
                "at least 1 wheel of each component, and no negative number of days",
                "correct the setting",
            )
        removals: list[Removal] = []
        for class_id in self.classes():
            folder = self.folder(class_id)
            with writing(folder), flock(folder / ".manifest.lock"):
                rows = self.manifest(class_id)
                doomed: list[tuple[Path, str]] = []
                for key in self._outdated(class_id, rows, keep):
                    row = rows.pop(key)
                    reason = f"{row.get('component')} {row.get('version')} of {row.get('added')}: {keep} are newer"
                    doomed.append((folder / f"{row.get('component')}-{key[:12]}", reason))
                strays = [(path, "no manifest names it") for path in self._own_strays(class_id)]
                text = f"set aside more than {aside_days:g} days ago"
                aside = [(path, text) for path in self._old_aside(class_id, aside_days)]
                for path, reason in [*doomed, *strays, *aside]:
                    size = _size(path) if path.exists() else 0
                    removals.append(Removal(str(path.relative_to(self.root)), size, reason))
                if check:
                    continue
                if doomed:
                    # before the files: a crash leaves files that nobody names rather than rows without a file
                    self._write_manifest(class_id, rows)
                for path, _reason in doomed:
                    _clear(path)
                for path, _reason in [*strays, *aside]:
                    _remove(path)
                    if _ENTRY.fullmatch(path.parent.name):
                        with contextlib.suppress(OSError):
                            path.parent.rmdir()
        return removals

    def _own_strays(self, class_id: str) -> list[Path]:
        """Return the strays that prune may remove: what a person put beside the wheels' folders stays."""
        folder, held = self.folder(class_id), self._held(class_id)
        return [
            path
            for path in self.strays(class_id)
            if (path.parent != folder or _is_partial(path) or _ENTRY.fullmatch(path.name))
            and (path if path.parent == folder else path.parent).name.rpartition("-")[0] not in held
        ]

    def _outdated(self, class_id: str, rows: Mapping[str, Row], keep: int) -> list[str]:
        """Return the keys of rows beyond the newest of their component.

        While somebody holds a wheel of a component, none of them goes: a lock is for what is wanted, and what serves
        that may be an imported wheel, under a key of its own.
        """
        by_component: dict[str, list[str]] = {}
        for key, row in sorted(rows.items(), key=lambda item: str(item[1].get("added")), reverse=True):
            by_component.setdefault(str(row.get("component")), []).append(key)
        return [
            key
            for component, keys in sorted(by_component.items())
            if component not in self._held(class_id)
            for key in keys[keep:]
        ]

    def _held(self, class_id: str) -> set[str]:
        """Return the components of a class of which somebody holds a lock."""
        return {path.name.rpartition("-")[0] for path in (self.folder(class_id) / "locks").glob("*.json")}

    def _old_aside(self, class_id: str, days: float) -> list[Path]:
        """Return what was set aside longer ago, by the time in its name, else by the file's."""
        aside = self.folder(class_id) / "aside"
        limit = time.time() - days * 86400
        found = []
        for path in sorted(aside.iterdir()) if aside.is_dir() else []:
            try:
                moment = datetime.strptime(path.name.split("-")[0], "%Y%m%dT%H%M%S.%fZ")
                seconds = moment.replace(tzinfo=timezone.utc).timestamp()
            except ValueError:
                seconds = path.lstat().st_mtime
            if seconds < limit:
                found.append(path)
        return found

    # ------------------------------------------------------------ one owner

    def _lock_path(self, class_id: str, component: str, key: str) -> Path:
        return self.folder(class_id) / "locks" / f"{component}-{key[:12]}.json"

    @contextlib.contextmanager
    def locked(
        self, class_id: str, component: str, key: str, say: Report, patience: float
    ) -> Iterator[float]:
        """Be the one, among all controllers, that sees to a key; look again inside.

        A living owner is waited for, which is announced. A dead one of this machine is replaced. One of another machine
        that gives no sign of life ends in a Problem, because nobody here can know.

        Args:
            say: shows one line.
            patience: seconds to wait for a living owner.

        Yields:
            The seconds waited: where they are more than 0, another run may have made the wheel meanwhile.

        Raises:
            Problem: the owner outlasts the patience, or is a stale one of another machine.
        """
        lock = wheelhouse_lock.Lock(self._lock_path(class_id, component, key), f"{component} for {class_id}", say)
        waited = lock.acquire(patience)
        try:
            yield waited
        finally:
            lock.release()

    def unlock(self, check: bool = False) -> list[wheelhouse_lock.Unlocking]:
        """Remove the locks whose owners are dead or gave no sign of life for ten minutes; living ones stay.

        Args:
            check: say which and remove nothing.
        """
        found = []
        for class_id in self.classes():
            folder = self.folder(class_id) / "locks"
            for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
                found.append(wheelhouse_lock.unlock(path, check))
        return [one for one in found if one is not None]


def _flags_text(flags: Collection[str]) -> str:
    return " ".join(flags) or "none"
