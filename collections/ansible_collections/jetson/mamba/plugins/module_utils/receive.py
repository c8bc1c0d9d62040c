"""The device's half of a transfer: what has arrived, what is missing, and whether it is what was sent.

A file arrives in parts of equal size, each a file of its own, so that a cut costs one part. Everything is kept in two
kinds of folders below the folder for transfers, both of the connecting user alone (0700):

    jetson-mamba-incoming.<uid>/<sha256>/   a file on its way: body (its beginning), NNNNN.<size>.part, or whole
    jetson-mamba-delivery.XXXXXXXX/         what was delivered, under its names, until the task is over

An interrupted transfer leaves its parts, and the next one goes on from there. What nobody came back for is removed
half a day later.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import os
import re
import shutil
import socket
import stat
import tarfile
import tempfile
import time
from typing import Any, Dict, Iterator, List, Mapping, NoReturn, Optional, Sequence, Set, Union

from ansible_collections.jetson.mamba.plugins.module_utils import download
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.files import sha256_file

INCOMING = "jetson-mamba-incoming."
DELIVERY = "jetson-mamba-delivery."
STALE_SECONDS = 12 * 3600
# below this in a whole call, the controller is the faster way
SLOWEST_PULL_BYTES = 256 << 10
_BLOCK_BYTES = 1 << 20
# what a cut of the network costs
_PIECE_BYTES = 64 << 10
_LOCK_SECONDS = 90.0
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_DELIVERY_NAME = re.compile(re.escape(DELIVERY) + r"[A-Za-z0-9_]{8}\Z")
Row = Mapping[str, Any]


def part_name(index: int, part_bytes: int) -> str:
    """Return the file name of a part; parts of another size are other files."""
    return f"{index:05d}.{part_bytes}.part"


def part_count(size: int, part_bytes: int) -> int:
    """Return how many parts a file has; an empty one has one."""
    return max(1, -(-size // part_bytes))


def part_size(index: int, size: int, part_bytes: int) -> int:
    """Return the bytes of one part."""
    return max(0, min(part_bytes, size - index * part_bytes))


# ---------------------------------------------------------------- folders


def incoming_folder(tmp: str) -> str:
    """Return where files on their way are kept, which need not exist."""
    return os.path.join(tmp, f"{INCOMING}{os.geteuid()}")


def ensure_own_folder(path: str) -> str:
    """Return a folder that is this user's alone, made where it is absent with its parents.

    Raises:
        Problem: it cannot be made, or what is there is a link or somebody else's.
    """
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        status = os.lstat(path)
    except OSError as error:
        raise _no_folder(path, error) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise Problem(
            f"{path} is {'of another user' if stat.S_ISDIR(status.st_mode) else 'no folder'}",
            "a folder of the connecting user alone",
            f"look at it with: ls -ld {path}; remove it, or name another place: -e jetson_platform_tmp_root=FOLDER",
        )
    if status.st_mode & 0o077:
        os.chmod(path, 0o700)
    return path


def _no_folder(path: str, error: OSError) -> Problem:
    parent = os.path.dirname(path)
    return Problem(
        f"no folder could be made in {parent} on the device: {error.strerror or error}",
        "a folder for files in transfer that the connecting user may write",
        f"look at: ls -ld {parent}; or name another: -e jetson_platform_tmp_root=FOLDER",
    )


def _raise_problem(error: OSError, path: str) -> NoReturn:
    """Raise what an error in writing means."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise Problem(
            f"the disk of {path} is full ({error.strerror})",
            "room for the files in transfer",
            "free space there, or name a larger disk: -e jetson_platform_tmp_root=FOLDER",
        ) from error
    raise Problem(
        f"{path} cannot be written: {error.strerror or error}",
        "a folder that the connecting user may write",
        f"look at: ls -ld {path}, and at the device's storage (dmesg)",
    ) from error


def no_room(path: str, free: int, wanted: int) -> Problem:
    """Return the problem that a file system is too small."""
    return Problem(
        f"{free >> 20} MB free for {path} on the device",
        f"{-(-wanted >> 20)} MB for the files in transfer",
        "free space there, or name a larger disk: -e jetson_platform_tmp_root=FOLDER",
    )


def free_bytes(path: str) -> int:
    """Return the bytes that this user may still write on the file system of a folder."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def _age(path: str) -> float:
    """Return how long nothing has changed in a folder, in seconds."""
    newest = os.lstat(path).st_mtime
    with os.scandir(path) as entries:
        for entry in entries:
            newest = max(newest, entry.stat(follow_symlinks=False).st_mtime)
    return time.time() - newest


def sweep(tmp: str, wanted: Set[str]) -> List[str]:
    """Remove what killed runs of this user left in a folder more than half a day ago; returns the paths.

    Args:
        tmp: the folder for transfers; everything in it that is not ours, or not this user's, stays.
        wanted: sha256 of files whose parts are used again, however old.
    """
    candidates = []
    with contextlib.suppress(OSError):
        candidates += [os.path.join(tmp, name) for name in os.listdir(tmp) if _DELIVERY_NAME.match(name)]
    incoming = incoming_folder(tmp)
    with contextlib.suppress(OSError):
        candidates += [os.path.join(incoming, name) for name in os.listdir(incoming) if name not in wanted]
    removed = []
    for path in candidates:
        with contextlib.suppress(OSError):
            status = os.lstat(path)
            ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
            if ours and _age(path) > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
                removed.append(path)
    return removed


# ---------------------------------------------------------------- one file on its way


class Arrival:
    """A file on its way.

    Args:
        tmp: the folder for transfers.
        row: sha256 and size.
        part_bytes: size of all parts but the last.
    """

    def __init__(self, tmp: str, row: Row, part_bytes: int) -> None:
        self.sha256 = str(row["sha256"])
        if not _DIGEST.match(self.sha256):
            raise Problem(f"sha256 {self.sha256!r}", "64 hexadecimal digits", "correct where the file is named")
        self.size = int(row["size"])
        self.part_bytes = part_bytes
        self.folder = os.path.join(incoming_folder(tmp), self.sha256)
        self.body = os.path.join(self.folder, "body")
        self.whole = os.path.join(self.folder, "whole")

    def part(self, index: int) -> str:
        """Return the path of a part."""
        return os.path.join(self.folder, part_name(index, self.part_bytes))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs from joining the same parts; its folder is made where it is absent."""
        ensure_own_folder(self.folder)
        with open(os.path.join(self.folder, "lock"), "w") as handle:
            deadline = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if time.monotonic() > deadline:
                        raise Problem(
                            f"another run has been receiving {self.folder} for {_LOCK_SECONDS:.0f} s",
                            "one run at a time on a device",
                            "let the other one end, then run again",
                        ) from error
                    time.sleep(0.2)
            yield

    def is_whole(self) -> bool:
        """Return whether the file is there and was verified."""
        return os.path.isfile(self.whole)

    def body_size(self) -> int:
        """Return how many bytes of the beginning are there."""
        with contextlib.suppress(OSError):
            return os.path.getsize(self.body)
        return 0

    def missing(self) -> List[int]:
        """Return the parts that must be sent; a part that a cut left incomplete is removed."""
        if self.is_whole():
            return []
        had = self.body_size()
        if had > self.size:
            os.unlink(self.body)
            had = 0
        first = part_count(self.size, self.part_bytes) if had == self.size > 0 else had // self.part_bytes
        found = []
        for index in range(first, part_count(self.size, self.part_bytes)):
            path = self.part(index)
            if not os.path.isfile(path):
                found.append(index)
            elif os.path.getsize(path) != part_size(index, self.size, self.part_bytes):
                os.unlink(path)
                found.append(index)
        return found

    def join(self) -> None:
        """Append to the body those parts that follow it, and remove each when it has been appended."""
        had = self.body_size()
        if had != self.size:
            # a kill between appending and removing leaves a piece of a part behind
            index = had // self.part_bytes
            while os.path.isfile(self.part(index)):
                if os.path.getsize(self.part(index)) != part_size(index, self.size, self.part_bytes):
                    break
                with open(self.body, "ab") as output, open(self.part(index), "rb") as source:
                    output.truncate(index * self.part_bytes)
                    shutil.copyfileobj(source, output, _BLOCK_BYTES)
                os.unlink(self.part(index))
                index += 1
        for name in os.listdir(self.folder):
            if name.endswith(".part") and int(name.split(".")[0]) * self.part_bytes < self.body_size():
                os.unlink(os.path.join(self.folder, name))

    def verify(self) -> bool:
        """Compare a complete body with the sha256; what is right becomes `whole`."""
        if sha256_file(self.body) != self.sha256:
            return False
        os.replace(self.body, self.whole)
        return True

    def cut_damage(self, digests: Sequence[str]) -> None:
        """Cut a complete but wrong body before its first wrong part.

        Args:
            digests: the sha256 of every part.
        """
        keep = 0
        with open(self.body, "rb+") as handle:
            for index, expected in enumerate(digests):
                digest = hashlib.sha256()
                left = part_size(index, self.size, self.part_bytes)
                while left:
                    block = handle.read(min(left, _BLOCK_BYTES))
                    if not block:
                        break
                    digest.update(block)
                    left -= len(block)
                if digest.hexdigest() != expected:
                    keep = index * self.part_bytes
                    break
            # no part is wrong and the sum is: then nothing of it is to be believed
            handle.truncate(keep)
        if not keep:
            os.unlink(self.body)

    def discard(self) -> None:
        """Remove everything of this file."""
        shutil.rmtree(self.folder, ignore_errors=True)


# ---------------------------------------------------------------- the steps


def look(tmp: str, wanted: Sequence[Row], part_bytes: int) -> Dict[str, Any]:
    """Return what of these files must be sent, and how much room there is; changes nothing (check mode)."""
    existing = tmp
    while not os.path.isdir(existing) and os.path.dirname(existing) != existing:
        existing = os.path.dirname(existing)
    arrivals = [Arrival(tmp, row, part_bytes) for row in wanted]
    missing = {item.sha256: list(range(part_count(item.size, part_bytes))) for item in arrivals if not item.is_whole()}
    return {"incoming": incoming_folder(tmp), "missing": missing, "free_bytes": free_bytes(existing)}


def begin(tmp: str, wanted: Sequence[Row], part_bytes: int) -> Dict[str, Any]:
    """Prepare to receive files, and say which parts of them are not here yet.

    Args:
        tmp: the folder for transfers, made where it is absent.
        wanted: sha256 and size of each file.
        part_bytes: size of a part.

    Returns:
        incoming (put part N of a file at <incoming>/<sha256>/NNNNN.<part_bytes>.part), missing ({sha256: [N, …]}),
        free_bytes.

    Raises:
        Problem: tmp is no folder that this user may write.
    """
    incoming = ensure_own_folder(incoming_folder(tmp))
    sweep(tmp, {str(row["sha256"]) for row in wanted})
    missing = {}
    for row in wanted:
        arrival = Arrival(tmp, row, part_bytes)
        with arrival.locked():
            indexes = arrival.missing()
        if indexes:
            missing[arrival.sha256] = indexes
    return {"incoming": incoming, "missing": missing, "free_bytes": free_bytes(incoming)}


def finish(tmp: str, wanted: Sequence[Row], part_bytes: int) -> Dict[str, Any]:
    """Join, verify and deliver files whose parts have arrived.

    Args:
        tmp: the folder for transfers.
        wanted: rows of sha256, size, and either names (the file's names in the delivery) or members (the file is a
            tar; [{name, sha256}] of what is in it); parts ([sha256 of each]) after the file was found damaged.
        part_bytes: size of a part.

    Returns:
        incoming, and folder: the delivery, or None where something is missing ({sha256: [part, …]}) or damaged
        ([sha256], all parts are there and the sum is wrong).

    Raises:
        Problem: the disk is full; the tar holds something else than was announced.
    """
    missing: Dict[str, List[int]] = {}
    damaged: List[str] = []
    try:
        incoming = ensure_own_folder(incoming_folder(tmp))
        arrivals = [Arrival(tmp, row, part_bytes) for row in wanted]
        for arrival, row in zip(arrivals, wanted):
            with arrival.locked():
                _settle(arrival, row.get("parts") or [], missing, damaged)
        if missing or damaged:
            return {"folder": None, "missing": missing, "damaged": damaged, "incoming": incoming}
        return {"folder": _deliver(tmp, arrivals, wanted), "missing": {}, "damaged": [], "incoming": incoming}
    except OSError as error:
        _raise_problem(error, tmp)


def _settle(arrival: Arrival, digests: Sequence[str], missing: Dict[str, List[int]], damaged: List[str]) -> None:
    """Make a file whole, or note what it lacks."""
    if arrival.is_whole():
        return
    arrival.join()
    if arrival.body_size() == arrival.size and not arrival.missing():
        if arrival.size == 0 and not os.path.exists(arrival.body):
            open(arrival.body, "wb").close()
        if arrival.verify():
            return
        if not digests:
            damaged.append(arrival.sha256)
            return
        arrival.cut_damage(digests)
    missing[arrival.sha256] = arrival.missing()


def _deliver(tmp: str, arrivals: Sequence[Arrival], wanted: Sequence[Row]) -> str:
    """Move verified files into a folder of their own."""
    try:
        folder = tempfile.mkdtemp(prefix=DELIVERY, dir=tmp)
    except OSError as error:
        raise _no_folder(os.path.join(tmp, DELIVERY), error) from error
    try:
        for arrival, row in zip(arrivals, wanted):
            if row.get("members"):
                _unpack(arrival.whole, folder, row["members"])
            names = row.get("names") or []
            for name in names[1:]:
                shutil.copyfile(arrival.whole, _inside(folder, name))
            for name in names[:1]:
                os.replace(arrival.whole, _inside(folder, name))
            arrival.discard()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _inside(folder: str, name: str) -> str:
    """Return the path of a plain name in a folder. Raises Problem where the name leads elsewhere."""
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise Problem(f"the file name {name!r}", "a plain name", "correct where the file is named")
    return os.path.join(folder, name)


def _unpack(archive: str, folder: str, members: Sequence[Row]) -> None:
    """Write the announced members of a tar, and nothing else, each compared with its sha256."""
    expected = {str(row["name"]): str(row["sha256"]) for row in members}
    with tarfile.open(archive, "r:") as handle:
        for member in handle:
            target = _inside(folder, member.name)
            stream = handle.extractfile(member) if member.isreg() else None
            if stream is None or member.name not in expected:
                raise Problem(f"{member.name} in the archive", "only the files that were announced", "run again")
            digest = hashlib.sha256()
            with stream, open(target, "xb") as output:
                block = stream.read(_BLOCK_BYTES)
                while block:
                    digest.update(block)
                    output.write(block)
                    block = stream.read(_BLOCK_BYTES)
            if digest.hexdigest() != expected.pop(member.name):
                raise Problem(
                    f"{member.name} has the sha256 {digest.hexdigest()}",
                    "the sha256 that the controller recorded",
                    "the controller's copy was changed: remove it from the controller's cache and run again",
                )
    if expected:
        raise Problem("no {} in the archive".format(", ".join(sorted(expected))), "all announced files", "run again")


def close(tmp: str, folder: Optional[str], wanted: Sequence[Row]) -> Dict[str, Any]:
    """Remove a delivery and what is left of its files on their way.

    Args:
        tmp: the folder for transfers.
        folder: the delivery, or None.
        wanted: rows with sha256.

    Raises:
        Problem: folder is none that this module made.
    """
    if folder:
        if not _DELIVERY_NAME.match(os.path.basename(folder)) or os.path.dirname(folder) != tmp.rstrip("/"):
            raise Problem(f"{folder} is no delivery", f"a folder {DELIVERY}… in {tmp}", "correct the task")
        shutil.rmtree(folder, ignore_errors=True)
    for row in wanted:
        Arrival(tmp, {"size": 0, **row}, 1).discard()
    with contextlib.suppress(OSError):
        os.rmdir(incoming_folder(tmp))
    return {"left": [path for path in [folder] if path and os.path.lexists(path)]}


# ---------------------------------------------------------------- fetched by the device itself


def pull(tmp: str, url: str, wanted: Sequence[Row], part_bytes: int, seconds: float) -> Dict[str, Any]:
    """Fetch files for a while; what was fetched before is kept and gone on with.

    Args:
        tmp: the folder for transfers.
        url: of a relay, http://address:port/token, where files are asked for by their sha256; "" to fetch each file
            from its own address.
        wanted: rows of sha256 and size; without a relay also url.
        part_bytes: size of the parts that may have arrived from the controller before.
        seconds: after how long to return, to be asked again.

    Returns:
        done ([sha256], verified), had ({sha256: bytes}), free_bytes, received (bytes in this call), and refused
        ({sha256: why it is not to be asked for again}). A server that fails is no error.

    Raises:
        Problem: the disk is full or tmp cannot be written.
    """
    incoming = ensure_own_folder(incoming_folder(tmp))
    sweep(tmp, {str(row["sha256"]) for row in wanted})
    lacking = sum(_lacking(Arrival(tmp, row, part_bytes)) for row in wanted)
    if lacking >= free_bytes(incoming):
        raise no_room(tmp, free_bytes(incoming), lacking)
    state = _Pull(download.Peer(url) if url else download.Internet(), time.monotonic() + seconds)
    done, had = [], {}
    refused: Dict[str, str] = {}
    arrived = 0
    try:
        for row in wanted:
            arrival = Arrival(tmp, row, part_bytes)
            with arrival.locked():
                if not arrival.is_whole():
                    arrival.join()
                    reason = state.fetch(row, arrival)
                    if reason:
                        refused[arrival.sha256] = reason
                    arrived += arrival.is_whole()
                if arrival.is_whole():
                    done.append(arrival.sha256)
                had[arrival.sha256] = arrival.size if arrival.is_whole() else arrival.body_size()
    except OSError as error:
        _raise_problem(error, tmp)
    finally:
        state.line.hang_up()
    if not refused and not arrived and len(done) < len(wanted) and state.received < SLOWEST_PULL_BYTES:
        reason = f"it sent {state.received} bytes in {seconds:.0f} s"
        refused = {str(row["sha256"]): reason for row in wanted if row["sha256"] not in done}
    return {
        "done": done,
        "had": had,
        "free_bytes": free_bytes(incoming_folder(tmp)),
        "received": state.received,
        "refused": refused,
    }


def _lacking(arrival: Arrival) -> int:
    return 0 if arrival.is_whole() else max(0, arrival.size - arrival.body_size())


class _Pull:
    """One call's fetching: until when, how much has come, and which servers are not to be asked again."""

    def __init__(self, line: Union[download.Peer, download.Internet], deadline: float) -> None:
        self.line = line
        self.received = 0
        self._deadline = deadline
        self._lost: Dict[str, str] = {}

    def is_over(self) -> bool:
        """Return whether the time is up."""
        return time.monotonic() >= self._deadline

    def fetch(self, row: Row, arrival: Arrival) -> Optional[str]:
        """Fetch one file as far as the time allows; returns why it cannot be had, or None."""
        place = self.line.place(row)
        if place in self._lost:
            return self._lost[place]
        try:
            self._go_on(row, arrival)
        except download.Trouble as trouble:
            self.line.hang_up()
            found = self.line.wrong(trouble)
            if found.place:
                self._lost[place] = str(found)
            return str(found)
        return None

    def _go_on(self, row: Row, arrival: Arrival) -> None:
        """Fetch one file, again from where a cut came. Raises Trouble where it cannot be had."""
        for attempt in range(1, self.line.attempts + 1):
            if self.is_over():
                return
            offset = arrival.body_size()
            if offset > arrival.size:
                os.unlink(arrival.body)
                offset = 0
            try:
                if offset < arrival.size or arrival.size == 0:
                    offset = self._stream(row, arrival, offset)
            except download.Trouble as trouble:
                self.line.hang_up()
                if not trouble.cut or attempt == self.line.attempts:
                    raise
                continue
            if offset == arrival.size and not arrival.verify():
                os.unlink(arrival.body)
                raise download.Trouble(f"what it sent as {arrival.sha256[:12]}… has another sha256")
            return

    def _stream(self, row: Row, arrival: Arrival, offset: int) -> int:
        """Append what the server sends to the body; returns how many bytes of the file are there then."""
        response = self.line.ask(row, offset)
        offset = _first_byte(response, arrival.size, offset, self.line.needs_range)
        with open(arrival.body, "ab") as output:
            output.truncate(offset)
            while offset < arrival.size:
                if self.is_over():
                    self.line.hang_up()
                    return offset
                block = self._read(response, min(_PIECE_BYTES, arrival.size - offset))
                if not block:
                    raise download.Trouble(f"it ended at {offset} of {arrival.size} bytes", cut=True)
                output.write(block)
                offset += len(block)
                self.received += len(block)
        self.line.finish(response)
        return offset

    def _read(self, response: http.client.HTTPResponse, size: int) -> bytes:
        """Return what comes next; b"" at the end."""
        try:
            return response.read(size)
        except socket.timeout as error:
            raise download.Trouble(f"it was silent for {self.line.patience:.0f} s", cut=True) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise download.Trouble(f"the connection was lost ({reason})", cut=True) from error


def _first_byte(response: http.client.HTTPResponse, size: int, offset: int, needs_range: bool) -> int:
    """Return the byte of the file that an answer begins with. Raises Trouble where it is none with the file."""
    if response.status not in (http.client.OK, http.client.PARTIAL_CONTENT):
        raise download.Trouble(f"it answers {response.status} {response.reason}")
    if (response.getheader("Content-Encoding") or "identity").lower() != "identity":
        raise download.Trouble("it sends the file encoded, as it was not asked to")
    if response.status == http.client.PARTIAL_CONTENT:
        found = (response.getheader("Content-Range") or "").strip()
        if not found.startswith(f"bytes {offset}-"):
            raise download.Trouble("it sends another range than was asked for")
        total = found.rpartition("/")[2]
    elif offset and needs_range:
        # else a file that takes longer than one call would begin again with each
        raise download.Trouble("it cannot go on with a file that has begun to arrive")
    else:
        offset, total = 0, response.getheader("Content-Length") or ""
    if total.isdigit() and int(total) != size:
        raise download.Trouble(f"it has a file of {total} bytes there, not of {size}")
    return offset
