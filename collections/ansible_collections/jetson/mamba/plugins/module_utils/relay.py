"""A host that keeps files for its peers: the store, and the server that serves it."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from typing import IO, Any, Dict, List, Mapping, Optional, Sequence

from ansible_collections.jetson.mamba.plugins.module_utils import nvcc_wrapper, relay_server
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.files import sha256_file, write_atomic
from ansible_collections.jetson.mamba.plugins.module_utils.receive import ensure_own_folder

FOLDER = "jetson-mamba-relay."
_START_SECONDS = 10.0
_STOP_SECONDS = 10.0
Row = Mapping[str, Any]


def store_folder(tmp: str) -> str:
    """Return where the store of this user is, which need not exist."""
    return os.path.join(tmp.rstrip("/") or "/", f"{FOLDER}{os.geteuid()}")


def numeric_address(address: str) -> str:
    """Return the address that a server can bind to and peers can reach.

    Raises:
        Problem: no such name, or an address that means every interface.
    """
    fix = "set jetson_platform_relay_address to the relay's own address in the network that its peers are in"
    try:
        found = str(socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise Problem(
            f"the relay's address {address!r} has no meaning on the relay: {error}", "its address", fix
        ) from (error)
    if ipaddress.ip_address(found.split("%")[0]).is_unspecified:
        raise Problem(f"the relay's address {address!r}", "one address, not all of them", fix)
    return found


def read_note(store: str) -> Optional[Dict[str, Any]]:
    """Return what a living server says of itself (address, url, pid), or None where none lives."""
    if not _is_locked(store):
        return None
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        with open(os.path.join(store, "log"), encoding="utf-8", errors="replace") as handle:
            note = json.loads(handle.readline())
        return {"address": str(note["address"]), "url": str(note["url"]), "pid": int(note["pid"])}
    return None


def _is_locked(store: str) -> bool:
    """Return whether a server lives: it holds the lock as long as it does, and no kill can leave that behind."""
    with contextlib.suppress(OSError), open(os.path.join(store, "lock"), "r+") as handle:
        return not _is_free(handle)
    return False


def _is_free(handle: IO[str]) -> bool:
    """Return whether nobody holds the lock of an open file, also where the file has been removed meanwhile."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.flock(handle, fcntl.LOCK_UN)
    return True


def held(store: str) -> List[str]:
    """Return the sha256 of what a store holds."""
    with contextlib.suppress(OSError):
        return sorted(name for name in os.listdir(os.path.join(store, "files")) if len(name) == 64)
    return []


def query(tmp: str, wanted: Sequence[Row]) -> Dict[str, Any]:
    """Return what of these files a store lacks; changes nothing.

    Args:
        tmp: the folder for transfers.
        wanted: rows of sha256 and size.

    Returns:
        lacking ([sha256]) and running (whether a server lives).
    """
    store = store_folder(tmp)
    lacking = []
    for row in wanted:
        path = os.path.join(store, "files", str(row["sha256"]))
        if not os.path.isfile(path) or os.path.getsize(path) != int(row["size"]):
            lacking.append(str(row["sha256"]))
    return {"lacking": lacking, "running": read_note(store) is not None}


def start(tmp: str, address: str, delivered: Optional[str], wanted: Sequence[Row]) -> Dict[str, Any]:
    """Take delivered files into the store and have a server serve them.

    A server that serves this address already goes on; one of another address is replaced.

    Args:
        tmp: the folder for transfers.
        address: what the server binds to, as name or number.
        delivered: folder of the files that the store lacked, each named by its sha256; they are moved.
        wanted: rows of sha256 of everything that shall be served; what else the store holds is removed where no
            server lived.

    Returns:
        url, files ([sha256]), pid, and started (whether a server was started now).

    Raises:
        Problem: the address is not this host's; a file is not what it should be.
    """
    bound = numeric_address(address)
    store = ensure_own_folder(store_folder(tmp))
    note = read_note(store)
    if note and note["address"] != bound:
        _end(store, note["pid"])
        ensure_own_folder(store)
        note = None
    files = ensure_own_folder(os.path.join(store, "files"))
    digests = [str(row["sha256"]) for row in wanted]
    if note is None:
        for name in set(held(store)) - set(digests):
            os.unlink(os.path.join(files, name))
    for digest in digests:
        source = os.path.join(delivered or "", digest)
        if delivered and os.path.isfile(source):
            os.replace(source, os.path.join(files, digest))
        elif note is None and sha256_file(os.path.join(files, digest)) != digest:
            # left by a server that was killed: verified before it is served again
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(files, digest))
            raise Problem(f"{digest} in the relay's store is damaged", "the file that was sent", "run again")
    started = note is None
    if note is None:
        note = _launch(store, bound)
    return {"url": note["url"], "files": held(store), "pid": note["pid"], "started": started}


def _launch(store: str, address: str) -> Dict[str, Any]:
    """Start a server, with nothing left that ties it to this process or its connection."""
    script = os.path.join(store, "server.py")
    write_atomic(script, nvcc_wrapper.source_text(relay_server.__name__).encode("utf-8"), 0o600)
    log = os.path.join(store, "log")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(log)
    _spawn([sys.executable, "-IS", script, store, address, str(relay_server.IDLE_SECONDS)], log, secrets.token_hex(16))
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        note = read_note(store)
        if note:
            return note
        if os.path.isfile(log) and os.path.getsize(log) and not _is_locked(store):
            break
        time.sleep(0.05)
    with contextlib.suppress(OSError), open(log, encoding="utf-8", errors="replace") as handle:
        reason = handle.read().strip()[-500:]
        shutil.rmtree(store, ignore_errors=True)
        raise Problem(
            f"the relay's server does not start on {address}: {reason or 'it says nothing'}",
            "an address of this host that its peers reach",
            "set jetson_platform_relay_address to it, or take jetson_platform_relay away",
        )
    raise Problem(f"no server could be started in {store}", "a folder that the connecting user may write", "see df -h")


def _spawn(argv: List[str], log: str, token: str) -> None:
    """Start a process in a session of its own, as nobody's child; the token goes by a pipe, where ps can't see it."""
    reader, writer = os.pipe()
    os.write(writer, token.encode("ascii") + b"\n")
    os.close(writer)
    first = os.fork()
    if first:
        os.close(reader)
        os.waitpid(first, 0)
        return
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.chdir("/")
        os.umask(0o077)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(reader, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.closerange(3, 65536)
        os.execv(argv[0], argv)
    finally:
        os._exit(127)


def _end(store: str, pid: int) -> None:
    """End exactly the process that holds the store's lock, and wait until it has let go."""
    with contextlib.suppress(FileNotFoundError), open(os.path.join(store, "lock"), "r+") as handle:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if _is_free(handle):
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            deadline = time.monotonic() + _STOP_SECONDS
            while not _is_free(handle) and time.monotonic() < deadline:
                time.sleep(0.05)


def stop(tmp: str, check: bool = False) -> bool:
    """End the server and remove the store; returns whether there was any of them.

    Args:
        tmp: the folder for transfers.
        check: True to do nothing.

    Raises:
        Problem: what is in the store's place is not this user's.
    """
    store = store_folder(tmp)
    if not os.path.lexists(store):
        return False
    if check:
        return True
    ensure_own_folder(store)
    note = read_note(store)
    if note:
        _end(store, note["pid"])
    shutil.rmtree(store, ignore_errors=True)
    return True
