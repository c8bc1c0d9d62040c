"""A relay's server: serves the files of one folder by their sha256, to whoever knows its token, and then goes.

The text of this file is put beside the files and run there by itself, detached from the connection that started it.
Standard library only; no other file of the project. It binds to one address, answers GET and HEAD, lists nothing,
and after half an hour without a request it removes its folder and ends.

    <folder>/lock    held (flock) while the server lives
    <folder>/log     its output; the first line is JSON: address, url (with the token) and pid
    <folder>/files/<sha256>
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import http.server
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from typing import Any, Optional, Tuple

IDLE_SECONDS = 1800.0
CONNECTIONS = 64
# a peer that stops reading must not keep the relay
PEER_SECONDS = 60.0
_BLOCK_BYTES = 1 << 20
_PATH = re.compile(r"/([0-9a-f]+)/([0-9a-f]{64})\Z")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)\Z")


def wanted_range(header: Optional[str], size: int) -> Optional[Tuple[int, int]]:
    """Return first and end (exclusive) of what a Range header asks for; the whole file where it asks for none.

    Returns:
        None where the range begins behind the end.
    """
    match = _RANGE.match(header or "")
    if not match:
        return 0, size
    first = int(match.group(1))
    end = min(int(match.group(2)) + 1, size) if match.group(2) else size
    if first >= size or end <= first:
        return None
    return first, end


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder.

    Args:
        folder: the relay's folder.
        address: the numeric address to bind to.
        port: 0 for any that is free.
        token: the first part of every path.
        idle_seconds: after how long without a request it ends.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = CONNECTIONS

    def __init__(self, folder: str, address: str, port: int, token: str, idle_seconds: float = IDLE_SECONDS) -> None:
        self.files = os.path.join(folder, "files")
        self.token = token
        self.last_request = time.monotonic()
        self.idle_seconds = idle_seconds
        self.active = 0
        self._slots = threading.BoundedSemaphore(CONNECTIONS)
        self._counting = threading.Lock()
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, port), Handler)

    def server_bind(self) -> None:
        """Bind without asking a name server who this is: offline, that takes long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, of which there is a limited number; who comes too many is turned away."""
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and free the slot."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that hangs up is no event."""

    @contextlib.contextmanager
    def serving(self) -> Any:
        """Count a request that is being answered; while one is, the server is not idle."""
        with self._counting:
            self.active += 1
        try:
            yield
        finally:
            with self._counting:
                self.active -= 1
                self.last_request = time.monotonic()

    def service_actions(self) -> None:
        """End when nobody has asked for long (called about twice a second)."""
        idle = time.monotonic() - self.last_request
        gone = not os.path.isdir(self.files)
        if (idle > self.idle_seconds and not self.active) or gone:
            threading.Thread(target=self.shutdown, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one peer."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "relay"
    sys_version = ""
    timeout = PEER_SECONDS

    def do_GET(self) -> None:
        """Send a file, or the range of it that was asked for."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Say how large a file is."""
        self._answer(with_body=False)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep silent: the paths hold the token."""

    def _answer(self, with_body: bool) -> None:
        match = _PATH.match(self.path)
        # compared in constant time, and before anything is looked up
        if not match or not hmac.compare_digest(match.group(1), self.server.token):
            self.send_error(404)
            return
        with self.server.serving():
            path = os.path.join(self.server.files, match.group(2))
            if not os.path.isfile(path):
                self.send_error(404)
                return
            with open(path, "rb") as handle:
                self._send(handle, os.fstat(handle.fileno()).st_size, with_body)

    def _send(self, handle: Any, size: int, with_body: bool) -> None:
        asked = self.headers.get("Range")
        span = wanted_range(asked, size)
        if span is None:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        first, end = span
        if _RANGE.match(asked or ""):
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(end - first))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if not with_body:
            return
        handle.seek(first)
        left = end - first
        while left:
            block = handle.read(min(left, _BLOCK_BYTES))
            if not block:
                self.close_connection = True
                return
            self.wfile.write(block)
            self.server.last_request = time.monotonic()
            left -= len(block)


def run(folder: str, address: str, token: str, idle_seconds: float) -> int:
    """Serve until nobody asks any more or a signal comes, then remove the folder; returns the exit status."""
    with open(os.path.join(folder, "lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("another server holds the lock", flush=True)
            return 1
        try:
            server = Server(folder, address, 0, token, idle_seconds)
        except OSError as error:
            print(f"{address}: {error.strerror or error}", flush=True)
            return 1
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown, daemon=True).start())
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        host = f"[{address}]" if ":" in address else address
        url = f"http://{host}:{server.server_port}/{token}"
        print(json.dumps({"address": address, "url": url, "pid": os.getpid()}), flush=True)
        try:
            server.serve_forever()
        finally:
            server.server_close()
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2], sys.stdin.readline().strip(), float(sys.argv[3])))
