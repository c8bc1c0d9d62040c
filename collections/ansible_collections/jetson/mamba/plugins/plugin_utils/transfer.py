"""Send files to a device: in parts, so that a cut costs one part; verified on arrival; nothing left behind.

An action opens `Courier(self, task_vars, tmp, plan["transfer"], display.display).delivered([Parcel(…), …])` and hands
the folder that it yields to its module.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from ansible_collections.jetson.mamba.plugins.module_utils import download, receive
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

MODULE = "jetson.mamba.receive_files"
# below this a transfer of its own costs more than its bytes: such files travel together
SMALL_BYTES = 4 << 20
# what a cut costs; all but the last part of a file have this size
PART_BYTES = 32 << 20
# what is larger is announced before it is sent
ANNOUNCED_BYTES = 64 << 20
PROGRESS_SECONDS = 15.0
# a relay is asked again and again for so long, so that it can be said how far it is
PULL_SECONDS = 30.0
STORE_FACT = "jetson_platform_relay_store"
_PLAN_FACT = "jetson_platform_plan"
_BLOCK_BYTES = 1 << 20
# how often a file is sent again that arrived damaged, and how often a lost connection is taken up again in one task
_REPAIRS = 2
_RESUMPTIONS = 2
_LIMITED_OPTIONS = ("sftp_extra_args", "scp_extra_args")


@dataclass(frozen=True)
class Parcel:
    """A file that is wanted on a device.

    Args:
        path: where it is on the controller.
        sha256: its checksum, lower-case hex; the device compares it with what arrived.
        name: its plain file name in the delivery.
        url: where a device may fetch it by itself, "" where that is not known.
    """

    path: str
    sha256: str
    name: str
    url: str = ""


@dataclass
class _Piece:
    """What travels as one: a file, or an archive of small ones."""

    path: str
    sha256: str
    size: int
    label: str
    names: list[str] = field(default_factory=list)
    members: list[dict[str, str]] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    url: str = ""

    def row(self) -> dict[str, Any]:
        """Return it as the device is told of it."""
        return {
            "sha256": self.sha256,
            "size": self.size,
            "names": self.names,
            "members": self.members,
            "parts": self.parts,
            **({"url": self.url} if self.url else {}),
        }


class StillWorking:
    """While the body runs, report every 15 seconds what is going on and for how long.

    Args:
        report: called with a line of text, from another thread.
        what: what is going on, or what returns it.
    """

    def __init__(
        self, report: Callable[[str], Any], what: str | Callable[[], str], interval: float = PROGRESS_SECONDS
    ) -> None:
        self._report = report
        self._what = what
        self._interval = interval
        self._over = threading.Event()
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> StillWorking:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._interval):
            what = self._what if isinstance(self._what, str) else self._what()
            self._report(f"{what}, for {time.monotonic() - self._started:.0f} s")


class Courier:
    """Brings files to one device.

    It works as the connecting user, also in a task with become: what root needs, root can read. Not for check mode.

    Args:
        action: the action plugin that sends (an ansible ActionBase).
        task_vars: the task's variables.
        tmp: folder for transfers on the device (the plan's paths.tmp); made where it is absent and allowed.
        options: the plan's transfer: rate_limit_kbit (Kbit/s to one device, 0: no limit), relay (inventory name,
            "": none) and downloads ("device": it fetches by itself what has an address). None means what the host's
            plan says.
        say: shows one line to the user.
        warn: shows a warning; where None, say does.
    """

    def __init__(
        self,
        action: Any,
        task_vars: Mapping[str, Any] | None,
        tmp: str,
        options: Mapping[str, Any] | None,
        say: Callable[[str], Any],
        warn: Callable[[str], Any] | None = None,
    ) -> None:
        self._action = action
        self._vars = task_vars or {}
        self._tmp = tmp.rstrip("/") or "/"
        options = _options(self._vars, options)
        self._rate_kbit = _rate(options)
        self._relay = str(options.get("relay") or "")
        self._fetches = options.get("downloads") == "device"
        self._say = say
        self._warn = warn or say
        self._host = str(self._vars.get("inventory_hostname", "host"))
        self._incoming = ""
        # what the device was to fetch by itself: its beginnings may be there, also where it came another way
        self._tried: list[_Piece] = []

    @contextlib.contextmanager
    def delivered(self, parcels: Sequence[Parcel]) -> Iterator[str]:
        """Yield a folder on the device that holds all parcels under their names; it is gone afterwards.

        The folder is the connecting user's, with mode 0700, and the body may write there. Parts that an interrupted
        run sent are not sent again.

        Args:
            parcels: files with different names; none makes an empty folder.

        Raises:
            Problem: no room; a folder that cannot be written; a file that is not what its sha256 says.
            AnsibleConnectionFailure: the connection was lost; what had arrived stays for the next run.
        """
        if getattr(getattr(self._action, "_task", None), "check_mode", False):
            raise RuntimeError("nothing is sent in check mode: the action has to return before")
        folder = self._deliver(_files(parcels, addresses=self._fetches))
        try:
            yield folder
        finally:
            self._clear(folder, self._tried)

    def _deliver(self, files: list[_Piece]) -> str:
        """Bring files to the device and return their folder there."""
        self._tried = []
        pieces = files
        try:
            with as_connecting_user(self._action._connection), tempfile.TemporaryDirectory(prefix="transfer-") as local:
                pulled = self._pull_from_relay(files)
                pulled |= self._pull_from_internet([file for file in files if file.sha256 not in pulled])
                pieces = [file for file in files if file.sha256 in pulled]
                rest = _pack([file for file in files if file.sha256 not in pulled], local)
                pieces += rest
                if rest:
                    self._send(rest, self._open(rest), local)
                return self._settle(pieces, local)
        except Problem:
            # a lost connection is no Problem: then the parts stay, and the next run goes on from there
            self._clear(None, [*pieces, *self._tried])
            raise

    # ------------------------------------------------------------ from the controller

    def _open(self, pieces: list[_Piece]) -> dict[str, list[int]]:
        """Prepare the device; returns the parts that it lacks. Raises Problem where there is no room for them."""
        answer = self._ask("open", pieces)
        missing: dict[str, list[int]] = answer["missing"]
        wanted = sum(
            receive.part_size(index, piece.size, PART_BYTES)
            for piece in pieces
            for index in missing.get(piece.sha256, [])
        )
        # parts are joined one by one, and an archive is unpacked beside itself
        wanted += min(PART_BYTES, max(piece.size for piece in pieces))
        wanted += sum(piece.size for piece in pieces if piece.members)
        if wanted >= answer["free_bytes"]:
            raise receive.no_room(self._tmp, int(answer["free_bytes"]), wanted)
        self._incoming = str(answer["incoming"])
        return missing

    def _send(self, pieces: list[_Piece], missing: Mapping[str, list[int]], local: str) -> None:
        """Send the missing parts; a connection that is lost and comes back is gone on with."""
        lost = 0
        while True:
            try:
                for piece in pieces:
                    if missing.get(piece.sha256):
                        self._send_parts(piece, missing[piece.sha256], local)
                return
            except Exception as error:
                if isinstance(error, Problem):
                    raise
                lost += 1
                try:
                    missing = self._open(pieces)
                except Problem:
                    # the disk has filled up
                    raise
                except Exception:
                    raise error from None
                if lost > _RESUMPTIONS:
                    raise
                self._warn(f"{self._host}: a transfer was interrupted and is gone on with: {_first_line(error)}")

    def _send_parts(self, piece: _Piece, indexes: Sequence[int], local: str) -> None:
        """Send parts of one file; nothing large goes through memory."""
        total = receive.part_count(piece.size, PART_BYTES)
        here = piece.size - sum(receive.part_size(index, piece.size, PART_BYTES) for index in indexes)

        def progress() -> str:
            return f"{self._host}: sending {piece.label} {here >> 20} of {piece.size >> 20} MB"

        if here:
            self._say(f"{progress()}, which arrived before; going on from there")
        elif piece.size > ANNOUNCED_BYTES:
            self._say(progress())
        with StillWorking(self._say, progress), _limited(self._action._connection, self._rate_kbit):
            for index in indexes:
                size = receive.part_size(index, piece.size, PART_BYTES)
                source = piece.path if total == 1 else _cut(piece.path, index, local)
                name = receive.part_name(index, PART_BYTES)
                started = time.monotonic()
                self._action._transfer_file(source, f"{self._incoming}/{piece.sha256}/{name}")
                _pace(size, time.monotonic() - started, self._rate_kbit)
                here += size

    def _settle(self, pieces: list[_Piece], local: str) -> str:
        """Have everything verified and delivered; what is missing or damaged is sent again, a few times."""
        by_digest = {piece.sha256: piece for piece in pieces}
        repairs: dict[str, int] = {}
        while True:
            answer = self._ask("finish", pieces)
            if answer["folder"]:
                return str(answer["folder"])
            self._incoming = str(answer["incoming"])
            for digest in answer["damaged"]:
                piece = by_digest[digest]
                piece.parts = _part_digests(piece)
                self._warn(f"{self._host}: {piece.label} arrived damaged; its damaged part is sent again")
            for digest in [*answer["damaged"], *answer["missing"]]:
                repairs[digest] = repairs.get(digest, 0) + 1
                if repairs[digest] > 2 * _REPAIRS:
                    raise Problem(
                        f"{by_digest[digest].label} arrived damaged on {self._host}, also when it was sent again",
                        f"sha256 {digest} on arrival",
                        "look at the device's storage (dmesg, df -h) and memory, and whether another run sends to it; "
                        "then run again",
                    )
            self._send(pieces, answer["missing"], local)

    # ------------------------------------------------------------ fetched by the device itself

    def _pull_from_relay(self, files: list[_Piece]) -> set[str]:
        """Have the device fetch from its relay what that has; returns the sha256 of what it got."""
        store = self._store()
        offered = set(store.get("files") or ())
        relay = f"the relay {self._relay or self._host}"
        instead = "is fetched from the internet" if self._fetches else "comes from the controller"

        def failed(reasons: Mapping[str, str]) -> None:
            for reason in dict.fromkeys(reasons.values()):
                self._warn(f"{self._host}: {relay} is used no more: {reason}; what is missing {instead}")

        wanted = [file for file in files if file.sha256 in offered]
        return self._pull(wanted, str(store.get("url") or ""), f"fetching from {relay}", failed)

    def _pull_from_internet(self, files: list[_Piece]) -> set[str]:
        """Have the device fetch what has an address, if it is told to; returns the sha256 of what it got."""
        if not self._fetches or not files:
            return set()
        wanted = [file for file in files if file.url]
        if len(wanted) < len(files):
            others = f"{len(files) - len(wanted)} of {len(files)} files"
            self._say(
                f"{self._host}: no address that the device may use is known of {others}; the controller sends them"
            )
        by_digest = {file.sha256: file for file in wanted}

        def failed(reasons: Mapping[str, str]) -> None:
            # a server that does not answer is one warning, not one for each of its files
            for reason in dict.fromkeys(reasons.values()):
                urls = [by_digest[digest].url for digest, why in reasons.items() if why == reason]
                what = urls[0] + (f" and {len(urls) - 1} more" if urls[1:] else "")
                self._warn(f"{self._host}: the device could not fetch {what}: {reason}; taken from the controller")

        return self._pull(wanted, "", "fetching by itself", failed)

    def _pull(self, wanted: list[_Piece], url: str, what: str, failed: Callable[[Mapping[str, str]], None]) -> set[str]:
        """Have the device fetch files, a while at a time; returns the sha256 of what it got."""
        if not wanted:
            return set()
        self._tried += wanted
        total = sum(file.size for file in wanted)
        done: set[str] = set()
        had: dict[str, int] = {}

        def progress() -> str:
            return f"{self._host}: {what} {sum(had.values()) >> 20} of {total >> 20} MB"

        if total > ANNOUNCED_BYTES:
            self._say(progress())
        with StillWorking(self._say, progress):
            while wanted:
                answer = self._ask("pull", wanted, url=url, seconds=PULL_SECONDS)
                had.update(answer["had"])
                done.update(answer["done"])
                if answer["refused"]:
                    failed(answer["refused"])
                wanted = [file for file in wanted if file.sha256 not in {*done, *answer["refused"]}]
        return done

    def _store(self) -> Mapping[str, Any]:
        """Return what the relay said of itself; a relay takes from its own store, so the slow line is used once."""
        own = self._vars.get(STORE_FACT)
        if own:
            return dict(own)
        hostvars = self._vars.get("hostvars") or {}
        if not self._relay or self._relay not in hostvars:
            return {}
        return dict(hostvars[self._relay].get(STORE_FACT) or {})

    # ------------------------------------------------------------ the device's half

    def _ask(self, mode: str, pieces: Sequence[_Piece], **more: Any) -> dict[str, Any]:
        """Run a step on the device. Raises Problem where it failed."""
        arguments = {
            "mode": mode,
            "tmp": self._tmp,
            "wanted": [piece.row() for piece in pieces],
            "part_bytes": PART_BYTES,
            **more,
        }
        answer: dict[str, Any] = self._action._execute_module(
            module_name=MODULE, module_args=arguments, task_vars=dict(self._vars)
        )
        check_answer(answer, MODULE, self._host)
        return answer

    def _clear(self, folder: str | None, pieces: Sequence[_Piece]) -> None:
        """Remove a delivery; where that fails, a later run does it, so it does not fail the task."""
        left = folder
        try:
            with as_connecting_user(self._action._connection):
                left = ", ".join(self._ask("close", pieces, folder=folder)["left"])
        except Exception as error:
            self._warn(f"{self._host}: {left or self._tmp} is cleared by a later run: {_first_line(error)}")
            return
        if left:
            self._warn(f"{self._host}: {left} could not be removed whole; its files belong to another user")


class Line:
    """Single files to and from a device, as slowly as the host's plan asks; for what is checked by whoever sends it.

    Args:
        action: the action plugin (an ansible ActionBase).
        task_vars: the task's variables.
        options: as for Courier.
    """

    def __init__(
        self, action: Any, task_vars: Mapping[str, Any] | None, options: Mapping[str, Any] | None = None
    ) -> None:
        self._action = action
        self._rate_kbit = _rate(_options(task_vars or {}, options))

    def send(self, local: str, remote: str) -> None:
        """Copy a file to the device."""
        started = time.monotonic()
        with _limited(self._action._connection, self._rate_kbit):
            self._action._transfer_file(local, remote)
        _pace(os.path.getsize(local), time.monotonic() - started, self._rate_kbit)

    def receive(self, remote: str, local: str) -> None:
        """Copy a file from the device."""
        started = time.monotonic()
        with _limited(self._action._connection, self._rate_kbit):
            self._action._connection.fetch_file(remote, local)
        if os.path.exists(local):
            _pace(os.path.getsize(local), time.monotonic() - started, self._rate_kbit)


def _options(variables: Mapping[str, Any], options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the plan's transfer, as it is given or as the host's plan says."""
    return options if options is not None else (variables.get(_PLAN_FACT) or {}).get("transfer") or {}


def _rate(options: Mapping[str, Any]) -> int:
    return max(0, int(options.get("rate_limit_kbit") or 0))


@contextlib.contextmanager
def _limited(connection: Any, rate_kbit: int) -> Iterator[None]:
    """Have ssh's own programs keep to a rate, where files travel by them."""
    if not rate_kbit or getattr(connection, "transport", "") != "ssh":
        yield
        return
    before = {name: connection.get_option(name) for name in _LIMITED_OPTIONS}
    try:
        for name, value in before.items():
            connection.set_option(name, f"{value or ''} -l {rate_kbit}".strip())
        yield
    finally:
        for name, value in before.items():
            connection.set_option(name, value)


def _pace(size: int, seconds: float, rate_kbit: int) -> None:
    """Wait until so many bytes may have travelled, for connections that know no limit of their own."""
    if rate_kbit:
        due = size * 8 / (rate_kbit * 1024)
        if due > seconds:
            time.sleep(due - seconds)


@contextlib.contextmanager
def as_connecting_user(connection: Any) -> Iterator[None]:
    """Run the body's modules without become: files are put as the connecting user, so the rest is that user's too."""
    before = connection.become
    connection.set_become_plugin(None)
    try:
        yield
    finally:
        connection.set_become_plugin(before)


def check_answer(answer: Mapping[str, Any], module: str, host: str) -> None:
    """Do nothing with a module's answer that is none of a failure.

    Raises:
        Problem: the module failed; its own problem, where it gave one.
    """
    if not answer.get("failed"):
        return
    problem = answer.get("problem")
    if problem:
        raise Problem(problem["found"], problem["expected"], problem["next"])
    raise Problem(
        f"{module} failed on {host}: {answer.get('msg', '')}\n{answer.get('module_stderr', '')}".strip(),
        f"{module} to work there",
        "run again with -vvv to see what the device says",
    )


def _files(parcels: Sequence[Parcel], addresses: bool = False) -> list[_Piece]:
    """Return parcels as pieces, one for each content.

    Args:
        parcels: what is wanted.
        addresses: whether their addresses may be used; one that could hold a secret never is.

    Raises:
        Problem: two parcels have one name; a file is absent.
    """
    found: dict[str, _Piece] = {}
    names: dict[str, str] = {}
    for parcel in parcels:
        if names.setdefault(parcel.name, parcel.sha256) != parcel.sha256:
            raise Problem(f"two files named {parcel.name}", "files with different names", "rename one of them")
        try:
            size = os.path.getsize(parcel.path)
        except OSError as error:
            raise Problem(
                f"{parcel.path}: {error.strerror}", "a file to send to the device", "run again, to have it fetched anew"
            ) from error
        piece = found.setdefault(parcel.sha256, _Piece(parcel.path, parcel.sha256, size, os.path.basename(parcel.path)))
        if parcel.name not in piece.names:
            piece.names.append(parcel.name)
        if addresses and not piece.url and download.is_public(parcel.url):
            piece.url = parcel.url
    return list(found.values())


def _pack(files: list[_Piece], local: str) -> list[_Piece]:
    """Return what is to be sent, small files in one archive.

    The archive has the same bytes each time, so that an interrupted one is gone on with like any file.

    Args:
        files: one piece for each content.
        local: where the archive is written; it is the caller's to remove.
    """
    small = sorted((file for file in files if file.size < SMALL_BYTES), key=lambda file: file.sha256)
    if sum(len(file.names) for file in small) < 2:
        return files
    path = os.path.join(local, "small.tar")
    members = []
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for file in small:
            for name in file.names:
                member = tarfile.TarInfo(name)
                member.size, member.mode = file.size, 0o600
                with open(file.path, "rb") as handle:
                    archive.addfile(member, handle)
                members.append({"name": name, "sha256": file.sha256})
    label = f"{len(members)} small files"
    packed = _Piece(path, _digest(path), os.path.getsize(path), label, members=members)
    return [packed, *(file for file in files if file.size >= SMALL_BYTES)]


def _digest(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for block in iter(lambda: handle.read(_BLOCK_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()


def _part_digests(piece: _Piece) -> list[str]:
    """Return the sha256 of every part of a file.

    Raises:
        Problem: it is the controller's file that is wrong.
    """
    whole = hashlib.sha256()
    found = []
    with open(piece.path, "rb") as handle:
        for index in range(receive.part_count(piece.size, PART_BYTES)):
            part = hashlib.sha256()
            left = receive.part_size(index, piece.size, PART_BYTES)
            while left:
                block = handle.read(min(left, _BLOCK_BYTES))
                if not block:
                    break
                part.update(block)
                whole.update(block)
                left -= len(block)
            found.append(part.hexdigest())
    if whole.hexdigest() != piece.sha256:
        raise Problem(
            f"{piece.path} on the controller has the sha256 {whole.hexdigest()}",
            f"sha256 {piece.sha256}: the file was changed since it was verified",
            "remove it and run again, to have it fetched anew; look at the controller's storage (dmesg)",
        )
    return found


def _cut(path: str, index: int, local: str) -> str:
    """Write one part of a file into a file of its own and return its path."""
    part = os.path.join(local, "part")
    left = PART_BYTES
    with open(path, "rb") as source, open(part, "wb") as output:
        source.seek(index * PART_BYTES)
        while left:
            block = source.read(min(left, _BLOCK_BYTES))
            if not block:
                break
            output.write(block)
            left -= len(block)
    return part


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
