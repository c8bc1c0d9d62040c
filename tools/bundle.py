#!/usr/bin/env python3
"""Pack all that a controller without internet needs into one file, and open such a file.

    tools/bundle.py make --platforms 'jetpack-6.1-6.2'     # by platform rows; no device is asked
    tools/bundle.py make --inventory jetsons.ini           # what the devices of an inventory lack, as a survey says
    tools/bundle.py open bundle/jetson-mamba-….tar         # anywhere, with Python 3.10 or newer and nothing else
    tools/bundle.py open                                   # the same, in a folder that tar has unpacked

A bundle is a plain tar file. Its first member is the manifest, which names every other member with size and sha256;
opening reads all of it before anything is put in place. docs/offline.md is the whole story.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import platform
import shlex
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "collections")]

# E402: they can be imported only after the line above. Only these two: opening has no virtual environment yet.
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem  # noqa: E402
from ansible_collections.jetson.mamba.plugins.module_utils.files import sha256_file, write_atomic  # noqa: E402

SCHEMA = 1
TOP = "jetson-mamba"
# .cache/ is no part of the repository, and `make clean` leaves this folder of it
PAYLOAD = ".cache/bundle"
MANIFEST = f"{PAYLOAD}/manifest.json"
OPENED = f"{PAYLOAD}/opened.json"
CACHE, WHEELHOUSE, OWN = f"{PAYLOAD}/cache", f"{PAYLOAD}/wheelhouse", f"{PAYLOAD}/own"
CONTROLLER = f"{PAYLOAD}/controller-wheels"
GIT_BUNDLE = f"{PAYLOAD}/project.gitbundle"
OWN_SETTINGS = f"{OWN}/settings.yml"
# stands in recorded settings for the folder that OWN becomes
OWN_MARK = "@OWN@"
DEFAULT_CACHE = "~/.cache/jetson-mamba"
PARTIAL = ".bundle-part-"
# wheels for a controller run on this glibc and newer ones: Ubuntu 20.04, Debian 11
CONTROLLER_GLIBC = "2.31"
SUPPORTED = ("3.10", "3.11", "3.12", "3.13")
PROGRESS_SECONDS = 5.0
BLOCK = 1 << 20
_LARGEST_MANIFEST = 64 << 20

Say = Callable[[str], None]
Data = dict[str, Any]


class Refused(Exception):
    """Several problems at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(len(problems))
        self.problems = list(problems)

    def render(self) -> str:
        """Return all of them, numbered."""
        lines = [f"{len(self.problems)} problem(s); no bundle was written."]
        for number, problem in enumerate(self.problems, start=1):
            lines += [f"{number}.", *(f"   {line}" for line in problem.render().splitlines())]
        return "\n".join(lines)


@dataclass(frozen=True)
class Entry:
    """One file of a bundle.

    Args:
        path: its place below the bundle's top folder.
        sha256: of its bytes; "" for a link.
        size: bytes.
        executable: whether it may be executed.
        link: where it leads to, for a symbolic link.
        origin: where it lies while a bundle is made.
    """

    path: str
    sha256: str
    size: int
    executable: bool = False
    link: str = ""
    origin: Path | None = None

    def as_dict(self) -> Data:
        """Return it as the manifest says it."""
        row: Data = {"path": self.path, "size": self.size}
        row.update({"link": self.link} if self.link else {"sha256": self.sha256})
        return dict(row, executable=True) if self.executable else row


class Progress:
    """Says how far long work is, every few seconds."""

    def __init__(self, what: str, total: int, say: Say) -> None:
        self._what, self._total, self._say = what, total, say
        self._done, self._last = 0, time.monotonic()

    def add(self, size: int) -> None:
        """Note that so many more bytes are done."""
        self._done += size
        if time.monotonic() - self._last >= PROGRESS_SECONDS:
            self._last = time.monotonic()
            self._say(f"{self._what}: {in_words(self._done)} of {in_words(self._total)}")


class Tap:
    """A file object that hashes what passes through it, in either direction."""

    def __init__(self, stream: IO[bytes], progress: Progress | None = None) -> None:
        self._stream, self._progress = stream, progress
        self._digest = hashlib.sha256()
        self.size = 0

    def read(self, size: int = -1) -> bytes:
        """Read as the file would."""
        return self._note(self._stream.read(size))

    def write(self, data: bytes) -> int:
        """Write as the file would."""
        self._stream.write(data)
        return len(self._note(data))

    def _note(self, data: bytes) -> bytes:
        self._digest.update(data)
        self.size += len(data)
        if self._progress:
            self._progress.add(len(data))
        return data

    def hexdigest(self) -> str:
        """Return the sha256 of what has passed."""
        return self._digest.hexdigest()


def in_words(size: int) -> str:
    """Return a number of bytes for people: 3 MB, 1.2 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{-(-size // 1_000_000)} MB"


def tell(text: str) -> None:
    """Show a line to the user; standard output is left to what is printed for machines (nothing, so far)."""
    print(f"==> {text}" if not text.startswith(" ") else text, file=sys.stderr, flush=True)


def detail(text: str) -> None:
    """Show how far the work is."""
    print(f"    {text}", file=sys.stderr, flush=True)


def check_room(needs: Sequence[tuple[Path, int, str]]) -> None:
    """Raise a Problem where a file system lacks the room; folders on one file system share it.

    Args:
        needs: (folder, bytes, what for) each; a folder need not be there yet.
    """
    shared: dict[int, list[tuple[Path, int, str]]] = {}
    for folder, size, what in needs:
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        shared.setdefault(there.stat().st_dev, []).append((there, size, what))
    for items in shared.values():
        wanted, free = sum(size for _there, size, _what in items), shutil.disk_usage(items[0][0]).free
        if wanted > free:
            raise Problem(
                f"{in_words(free)} free at {items[0][0]}",
                f"{in_words(wanted)}: " + ", ".join(f"{what} {in_words(size)}" for _there, size, what in items if size),
                "free space there, or name folders on another disk (options --output, --cache, --into)",
            )


# ---------------------------------------------------------------- the file


def safe_path(path: Any) -> bool:
    """Return whether a path stays below the folder that it is relative to."""
    return (
        isinstance(path, str)
        and bool(path)
        and not any(character in path for character in "\0\\\n")
        and not path.startswith("/")
        and not {"", ".", ".."} & set(path.split("/"))
    )


def damaged(origin: Path | str, reason: str) -> Problem:
    """Return the problem of a bundle that is not what was packed."""
    return Problem(
        f"{origin}: {reason}",
        "the bundle as it was made, whole and unchanged",
        "copy it again from where it was made, and compare: sha256sum -c NAME.tar.sha256",
    )


def digest_of(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of a manifest's content, without the digest that it carries itself."""
    text = json.dumps({key: value for key, value in manifest.items() if key != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def render_manifest(manifest: Data) -> bytes:
    """Return a manifest's bytes, its own digest added."""
    whole = dict(manifest, digest=digest_of(manifest))
    return (json.dumps(whole, indent=1, sort_keys=True) + "\n").encode("utf-8")


def read_manifest(text: bytes, origin: Path | str) -> tuple[Data, dict[str, Entry]]:
    """Return a checked manifest and its entries by path.

    Raises:
        Problem: it is damaged, of another schema, or names a path that leads out.
    """
    try:
        manifest = json.loads(text)
        if manifest["schema"] != SCHEMA:
            raise Problem(
                f"{origin}: a bundle of schema {manifest['schema']}",
                f"schema {SCHEMA}",
                "open it with the tools/bundle.py that lies inside it (tar xf …, then make open)",
            )
        entries = {}
        for row in manifest["files"]:
            entry = Entry(
                row["path"],
                str(row.get("sha256", "")),
                int(row["size"]),
                bool(row.get("executable")),
                str(row.get("link", "")),
            )
            goal = os.path.normpath(os.path.join(os.path.dirname(row["path"]), entry.link))
            if not safe_path(entry.path) or (entry.link and (entry.link[0] == "/" or goal.split(os.sep)[0] == "..")):
                raise damaged(origin, f"it names {entry.path!r}, which leads out of its folder")
            entries[entry.path] = entry
        links = {entry.path for entry in entries.values() if entry.link}
        below = [path for path in entries if {str(parent) for parent in PurePosixPath(path).parents} & links]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(origin, f"its manifest cannot be read ({type(error).__name__}: {error})") from error
    if below:
        raise damaged(origin, f"it names {below[0]!r}, which leads through a link")
    if manifest.get("digest") != digest_of(manifest):
        raise damaged(origin, "its manifest was changed")
    return manifest, entries


def write_bundle(target: Path, manifest: Data, entries: Sequence[Entry], mtime: int, say: Say = detail) -> str:
    """Write a bundle and its .sha256 file, whole or not at all; return the sha256.

    Args:
        target: the tar file.
        manifest: all of it but the files.
        entries: what goes in, in this order, each with its origin.
        mtime: the time that every member gets.

    Raises:
        Problem: no room, or a file changed while it was packed.
    """
    whole = dict(manifest, files=[entry.as_dict() for entry in entries])
    partial = target.with_name(PARTIAL + target.name)
    progress = Progress("packing", sum(entry.size for entry in entries), say)
    try:
        with open(partial, "wb") as raw:
            sink = Tap(raw)
            with tarfile.open(fileobj=sink, mode="w|", format=tarfile.GNU_FORMAT, bufsize=BLOCK) as tar:  # type: ignore[call-overload]
                text = render_manifest(whole)
                with tempfile.TemporaryFile() as stream:
                    stream.write(text)
                    stream.seek(0)
                    tar.addfile(_member(Entry(MANIFEST, "", len(text)), mtime), stream)
                for entry in entries:
                    _add(tar, entry, mtime, progress)
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise Problem(
            f"{target}: {error.strerror or error}", "room for the bundle", "free space, or name another --output"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    note = f"{sink.hexdigest()}  {target.name}\n"
    write_atomic(f"{target}.sha256", note.encode("utf-8"), 0o644)
    return sink.hexdigest()


def _member(entry: Entry, mtime: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(f"{TOP}/{entry.path}")
    member.mtime, member.size = mtime, entry.size
    member.mode = 0o755 if entry.executable else 0o644
    if entry.link:
        member.type, member.linkname, member.mode = tarfile.SYMTYPE, entry.link, 0o777
    return member


def _add(tar: tarfile.TarFile, entry: Entry, mtime: int, progress: Progress) -> None:
    if entry.link:
        tar.addfile(_member(entry, mtime))
        return
    assert entry.origin is not None
    with open(entry.origin, "rb") as stream:
        tap = Tap(stream, progress)
        tar.addfile(_member(entry, mtime), tap)
        if tap.hexdigest() != entry.sha256 or stream.read(1):
            raise Problem(
                f"{entry.origin} changed while it was packed",
                f"sha256 {entry.sha256}",
                "let what writes there finish (another run, an editor), then the same command again",
            )


@contextlib.contextmanager
def open_tar(path: Path) -> Iterator[tuple[tarfile.TarFile, Tap]]:
    """Give a bundle's tar file, read from front to back, and what has hashed it.

    Raises:
        Problem: it can't be read, or ends too early.
    """
    try:
        with open(path, "rb") as raw:
            progress = Progress(f"reading {path.name}", os.fstat(raw.fileno()).st_size, detail)
            tap = Tap(raw, progress)
            with tarfile.open(fileobj=tap, mode="r|", bufsize=BLOCK) as tar:  # type: ignore[call-overload]
                yield tar, tap
            while tap.read(BLOCK):
                pass
    except (tarfile.TarError, EOFError) as error:
        raise damaged(path, f"it is no whole tar file ({error})") from error
    except OSError as error:
        raise Problem(
            f"{path}: {error.strerror or error}", "a bundle that `make bundle` has made", "correct the path"
        ) from error


def first_member(tar: tarfile.TarFile, path: Path) -> tuple[Data, dict[str, Entry]]:
    """Return the manifest and its entries from a tar file's first member."""
    member = tar.next()
    if member is None or member.name != f"{TOP}/{MANIFEST}" or not member.isreg() or member.size > _LARGEST_MANIFEST:
        raise damaged(path, f"it does not begin with {TOP}/{MANIFEST}")
    stream = tar.extractfile(member)
    assert stream is not None
    return read_manifest(stream.read(), path)


def members(tar: tarfile.TarFile, entries: Mapping[str, Entry], path: Path) -> Iterator[tuple[Entry, IO[bytes] | None]]:
    """Yield every member after the manifest as (entry, its bytes), checked to be what the manifest says of it.

    Raises:
        Problem: one is missing, unknown, twice there, or of another kind or size.
    """
    left = dict(entries)
    while True:
        member = tar.next()
        if member is None:
            break
        entry = left.pop(member.name.partition("/")[2], None) if member.name.startswith(TOP + "/") else None
        if entry is None:
            raise damaged(path, f"it holds {member.name!r}, which its manifest does not name (any more)")
        if entry.link:
            if not member.issym() or member.linkname != entry.link:
                raise damaged(path, f"{entry.path} is not the link that its manifest names")
            yield entry, None
            continue
        if not member.isreg() or member.size != entry.size:
            raise damaged(path, f"{entry.path} is not the file of {entry.size} bytes that its manifest names")
        yield entry, tar.extractfile(member)
    if left:
        raise damaged(path, f"it ends too early: {len(left)} of {len(entries)} files are missing, first {min(left)}")


def verify_file(path: Path) -> tuple[Data, dict[str, Entry]]:
    """Read a bundle from front to back and return its manifest and entries.

    Raises:
        Problem: it is not, to the last byte, what its manifest and its .sha256 file say.
    """
    with open_tar(path) as (tar, tap):
        manifest, entries = first_member(tar, path)
        for entry, stream in members(tar, entries, path):
            if stream is not None and _digest(stream) != entry.sha256:
                raise damaged(path, f"{entry.path} has another sha256 than its manifest says")
    note = Path(f"{path}.sha256")
    if note.is_file() and note.read_text(encoding="utf-8").split()[:1] != [tap.hexdigest()]:
        raise damaged(path, f"its sha256 is {tap.hexdigest()}, and {note.name} says another")
    return manifest, entries


def _digest(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    for block in iter(lambda: stream.read(BLOCK), b""):
        digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------- opening


@dataclass(frozen=True)
class Places:
    """Where the parts of a bundle go: the project, the artefact cache, the wheelhouse."""

    root: Path
    cache: Path
    wheelhouse: Path

    def of(self, entry: Entry) -> Path:
        """Return the final place of a file."""
        for prefix, folder in ((CACHE, self.cache), (WHEELHOUSE, self.wheelhouse)):
            if entry.path.startswith(prefix + "/"):
                return folder / entry.path[len(prefix) + 1 :]
        return self.root / entry.path


def is_list(path: str) -> bool:
    """Return whether a file is a list that may already be there with other lines: it is merged, and placed last."""
    return path == f"{CACHE}/trust.json" or (path.startswith(WHEELHOUSE + "/") and path.endswith("/manifest.json"))


def open_file(path: Path, places: Places, say: Say = tell) -> Data:
    """Open a bundle: verify all of it, then put everything in place. Done again after a cut, it goes on.

    Raises:
        Problem: the bundle is damaged, the folder holds something else, there is no room, or lists contradict.
    """
    say(f"verifying {path}")
    manifest, entries = verify_file(path)
    check_folder(places.root, entries)
    absent = [entry for entry in entries.values() if not is_in_place(entry, places)]
    check_room(room_needed(absent, places, staged=False))
    check_lists_in_tar(path, absent, places)
    say(f"verified: {len(entries)} files; putting {len(absent)} in place ({in_words(total(absent))})")
    wanted = {entry.path for entry in absent}
    with open_tar(path) as (tar, _tap):
        first_member(tar, path)
        for entry, stream in members(tar, entries, path):
            if entry.path in wanted:
                place(entry, stream, places)
    write_atomic(str(places.root / MANIFEST), render_manifest(manifest), 0o644)
    finish(manifest, places)
    return manifest


def open_tree(places: Places, say: Say = tell) -> Data:
    """Open a bundle that tar has unpacked: verify everything, then move the parts where they belong.

    Raises:
        Problem: as open_file; or the folder does not come from a bundle.
    """
    root = places.root
    if not (root / MANIFEST).is_file():
        raise Problem(
            f"{root} has no {MANIFEST}: it does not come from a bundle",
            "a folder that 'tar xf' made of a bundle, or the bundle itself",
            "python3 tools/bundle.py open FILE; docs/offline.md tells how a bundle is made",
        )
    manifest, entries = read_manifest((root / MANIFEST).read_bytes(), root / MANIFEST)
    opened = read_opened(root)
    say(f"verifying {len(entries)} files ({in_words(total(entries.values()))})")
    progress = Progress("verifying", total(entries.values()), detail)
    staged = []
    for entry in entries.values():
        here = root / entry.path
        # what was opened once is the user's own: settings, playbooks
        if opened and places.of(entry) == here and not entry.path.startswith(PAYLOAD):
            continue
        if matches(entry, here):
            if places.of(entry) != here:
                staged.append(entry)
        elif os.path.lexists(here):
            raise damaged(root, f"{entry.path} is not what was packed")
        elif not is_in_place(entry, places) and not (opened and is_list(entry.path)):
            moved = f" (it was opened before, into {opened['cache']} and {opened['wheelhouse']})" if opened else ""
            raise damaged(root, f"{entry.path} is missing{moved}")
        progress.add(entry.size)
    check_room(room_needed(staged, places, staged=True))
    staged.sort(key=lambda entry: (is_list(entry.path), entry.path))
    for entry in staged:
        if is_list(entry.path):
            merge(places.of(entry), (root / entry.path).read_bytes(), entry)
    for entry in staged:
        here, there = root / entry.path, places.of(entry)
        if not is_in_place(entry, places):
            if same_disk(here, there) and not is_list(entry.path):
                there.parent.mkdir(parents=True, exist_ok=True)
                os.replace(here, there)
            else:
                with open(here, "rb") as stream:
                    place(entry, stream, places)
        if not is_list(entry.path):
            here.unlink(missing_ok=True)
    finish(manifest, places)
    for part in (CACHE, WHEELHOUSE):
        shutil.rmtree(root / part, ignore_errors=True)
    return manifest


def read_opened(root: Path) -> Data:
    """Return the note that an earlier opening left, or nothing."""
    try:
        note: Data = json.loads((root / OPENED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note


def total(entries: Iterable[Entry]) -> int:
    """Return the bytes of several files."""
    return sum(entry.size for entry in entries)


def matches(entry: Entry, path: Path) -> bool:
    """Return whether a path holds exactly what an entry says."""
    if entry.link:
        return path.is_symlink() and os.readlink(path) == entry.link
    if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.size:
        return False
    return sha256_file(str(path)) == entry.sha256


def is_in_place(entry: Entry, places: Places) -> bool:
    """Return whether a file is where it belongs already; a list is always merged, which may change nothing."""
    return not is_list(entry.path) and matches(entry, places.of(entry))


def check_folder(root: Path, entries: Mapping[str, Entry]) -> None:
    """Raise a Problem where a folder holds anything that is not of this bundle: nothing of anybody's is overwritten."""
    if not root.exists():
        return
    if not root.is_dir():
        raise Problem(f"{root} is no folder", "an empty folder, or a name that is free", "name another: --into FOLDER")
    for folder, names, files in os.walk(root):
        links = [name for name in names if os.path.islink(os.path.join(folder, name))]
        for name in sorted([*files, *links]):
            path = Path(folder, name)
            inside = path.relative_to(root).as_posix()
            if name.startswith(PARTIAL) or inside in (MANIFEST, OPENED, OWN_SETTINGS):
                continue
            entry = entries.get(inside)
            if entry is None or not matches(entry, path):
                raise Problem(
                    f"{root} holds {inside}, which is not of this bundle",
                    "an empty folder, a name that is free, or what an earlier try with this bundle left",
                    "name another: --into FOLDER (cache and wheelhouse may be shared with an earlier one)",
                )


def room_needed(entries: Iterable[Entry], places: Places, staged: bool) -> list[tuple[Path, int, str]]:
    """Return what check_room takes; a move within one file system needs nothing."""
    needs = {"project": 0, "artefact cache": 0, "wheelhouse": 0}
    folders = {"project": places.root, "artefact cache": places.cache, "wheelhouse": places.wheelhouse}
    for entry in entries:
        if staged and same_disk(places.root / entry.path, places.of(entry)):
            continue
        prefixes = {f"{CACHE}/": "artefact cache", f"{WHEELHOUSE}/": "wheelhouse"}
        part = next((part for prefix, part in prefixes.items() if entry.path.startswith(prefix)), "project")
        needs[part] += entry.size
    return [(folders[part], size, part) for part, size in needs.items()]


def same_disk(here: Path, there: Path) -> bool:
    """Return whether a file can be moved to its place without being copied."""
    while not there.exists():
        there = there.parent
    return here.lstat().st_dev == there.stat().st_dev


def check_lists_in_tar(path: Path, absent: Sequence[Entry], places: Places) -> None:
    """Raise a Problem where a list of the bundle contradicts the one that is there, before anything is written."""
    lists = {entry.path for entry in absent if is_list(entry.path)}
    if not lists:
        return
    with open_tar(path) as (tar, _tap):
        _manifest, entries = first_member(tar, path)
        for entry, stream in members(tar, entries, path):
            if entry.path in lists and stream is not None:
                merge(places.of(entry), stream.read(), entry)


def merge(there: Path, text: bytes, entry: Entry) -> bytes:
    """Return the list at a path with the bundle's lines added; those that are there stay.

    Raises:
        Problem: trust.json: another checksum was accepted here for the same URL; or a list can't be read.
    """
    key = "files" if entry.path == f"{CACHE}/trust.json" else "wheels"
    new = json.loads(text)
    if not there.exists():
        return text
    try:
        old = json.loads(there.read_text(encoding="utf-8"))
        lines = {**new[key], **old[key]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Problem(
            f"{there} cannot be read: {error}", f"a list with '{key}', as this project writes it", f"move {there} away"
        ) from error
    for name, line in old[key].items():
        if key == "files" and name in new[key] and new[key][name]["sha256"] != line["sha256"]:
            raise Problem(
                f"{there}: {name} was accepted with sha256 {line['sha256']}",
                f"the bundle's, sha256 {new[key][name]['sha256']}",
                "ask the publisher which one is right; then remove the wrong line, or open with another --cache",
            )
    return (json.dumps(dict(old, **{key: lines}), indent=2, sort_keys=True) + "\n").encode("utf-8")


def place(entry: Entry, stream: IO[bytes] | None, places: Places) -> None:
    """Put one file where it belongs, whole or not at all.

    Raises:
        Problem: no room, no right to write, or the bytes changed since they were verified.
    """
    there = places.of(entry)
    temporary = there.with_name(f"{PARTIAL}{os.getpid()}")
    try:
        there.parent.mkdir(parents=True, exist_ok=True)
        if stream is None:
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(entry.link)
            os.replace(temporary, there)
            return
        if is_list(entry.path):
            write_atomic(str(there), merge(there, stream.read(), entry), 0o644)
            return
        with open(temporary, "wb") as raw:
            sink = Tap(raw)
            shutil.copyfileobj(stream, sink, BLOCK)
            raw.flush()
            os.fsync(raw.fileno())
        if sink.hexdigest() != entry.sha256:
            raise damaged(entry.path, "it changed while it was opened")
        temporary.chmod(0o755 if entry.executable else 0o644)
        os.replace(temporary, there)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise Problem(
            f"{there}: {error.strerror or error}",
            "room for all of the bundle" if full else "a folder that can be written to",
            "free space there, then the same command again: it goes on" if full else "name another: --into, --cache",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def finish(manifest: Data, places: Places) -> None:
    """Write the settings that name the user's own files, and the note that the bundle was opened."""
    settings = manifest.get("settings") or {}
    if settings:
        own = json.dumps(settings, indent=2, sort_keys=True).replace(OWN_MARK, json.dumps(str(places.root / OWN))[1:-1])
        text = f"---\n# Your own files that the bundle brought: ansible-playbook … -e @{OWN_SETTINGS}\n{own}\n"
        write_atomic(str(places.root / OWN_SETTINGS), text.encode("utf-8"), 0o644)
    note = {"opened_at": now(), "cache": str(places.cache), "wheelhouse": str(places.wheelhouse)}
    write_atomic(str(places.root / OPENED), (json.dumps(note, indent=1) + "\n").encode("utf-8"), 0o644)


def now() -> str:
    """Return the time as UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def next_steps(manifest: Data, places: Places) -> list[str]:
    """Return what a person types after opening."""
    words = ["ansible-playbook site.yml -i jetsons.ini"]
    if places.cache != Path(DEFAULT_CACHE).expanduser():
        words.append(f"-e jetson_platform_cache={shlex.quote(str(places.cache))}")
    if places.wheelhouse != places.root / "wheelhouse":
        words.append(f"-e wheelhouse_path={shlex.quote(str(places.wheelhouse))}")
    if manifest.get("settings"):
        words.append(f"-e @{OWN_SETTINGS}")
    lines = [f"    cd {places.root}"] if places.root != Path.cwd() else []
    return [*lines, "    make venv && . .venv/bin/activate", "    " + " ".join(words)]


def do_open(options: argparse.Namespace) -> None:
    """Open a bundle as the command line says."""
    root = (options.into or (Path.cwd() / TOP if options.file else ROOT)).absolute()
    places = Places(
        root,
        (options.cache or Path(DEFAULT_CACHE)).expanduser().absolute(),
        (options.wheelhouse or root / "wheelhouse").expanduser().absolute(),
    )
    if options.file is None and options.into and not (root / MANIFEST).is_file():
        raise Problem(f"--into {root} without a file", "the bundle to open", "tools/bundle.py open FILE --into FOLDER")
    manifest = open_file(options.file, places) if options.file else open_tree(places)
    made_for = manifest["made_for"]
    tell(f"opened: {TOP} at {manifest['commit'][:12]}, made {manifest['made_at']}")
    detail(f"project     {places.root}")
    detail(f"cache       {places.cache}")
    detail(f"wheelhouse  {places.wheelhouse}")
    detail(f"controller  packages for Python {', '.join(made_for['pythons'])} on {made_for['machine']}")
    for line in manifest["left_out"]:
        detail(f"left out    {line}")
    tell("next, without internet:")
    for line in next_steps(manifest, places):
        tell(line)


# ---------------------------------------------------------------- the command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    parser = argparse.ArgumentParser(prog="tools/bundle.py", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="make a bundle")
    make.add_argument("--platforms", default="", help="ids of platform rows, as one string")
    make.add_argument("--inventory", help="your inventory")
    make.add_argument("--args", default="", help="words for ansible-playbook, as one string; with platforms only -e")
    make.add_argument(
        "--pythons",
        default="{}.{}".format(*sys.version_info[:2]),
        help="Pythons of the controller where it is opened, as one string (default: this one)",
    )
    make.add_argument("--machine", default=machine, help="its machine, x86_64 or aarch64 (default: this one's)")
    make.add_argument("--glibc", help="glibc of the platforms' devices, where it does not follow from their Python")
    make.add_argument("--trust-on-first-use", action="store_true", help="accept wheels without a published sha256")
    make.add_argument("--without-torch", action="store_true", help="leave out the wheels that no lock names")
    make.add_argument("--output", type=Path, default=ROOT / "bundle", help="folder for the bundle")
    opener = commands.add_parser("open", help="verify a bundle and put everything in place")
    opener.add_argument("file", type=Path, nargs="?", help="the bundle; without it: the folder that tar has unpacked")
    opener.add_argument("--into", type=Path, help=f"folder for the project (default: {TOP})")
    for command in (make, opener):
        command.add_argument("--cache", type=Path, help=f"the artefact cache (default: {DEFAULT_CACHE})")
        command.add_argument("--wheelhouse", type=Path, help="the wheelhouse (default: wheelhouse/ in the project)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Make or open a bundle; return 0, or 2 for a Problem."""
    options = parse(argv)
    try:
        if options.command == "make":
            # here: it needs packages that a controller has only after `make venv`, and opening comes before that
            from tools import bundle_make

            bundle_make.do_make(options)
        else:
            do_open(options)
    except (Problem, Refused) as problem:
        print(problem.render(), file=sys.stderr)
        return 2
    except OSError as error:
        where, why = error.filename or "a file", error.strerror or str(error)
        print(Problem(f"{where}: {why}", "files and folders of yours", "correct that").render(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        tell("interrupted; the same command again goes on where it stopped")
        return 130
    return 0


if __name__ == "__main__":
    # bundle_make imports this file by its name: the two must be one module
    from tools.bundle import main as run

    sys.exit(run())
