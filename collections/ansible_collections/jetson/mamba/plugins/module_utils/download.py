"""Where a device fetches files from by itself: a relay beside it, or the addresses that published them."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from typing import Any, Dict, List, Mapping, Optional
from urllib.parse import urlsplit

from ansible_collections.jetson.mamba.plugins.module_utils.passwords import without_passwords

# the connection of a peer is a local one; one that says nothing for so long is gone
PEER_TIMEOUT_SECONDS = 20.0
CONNECT_TIMEOUT_SECONDS = 5.0
# to reach a server, which may have several addresses, and between two pieces of what it sends
INTERNET_TIMEOUT_SECONDS = 10.0
# a long way is cut now and then: how often a file is asked for in one call, each time from where it stopped
INTERNET_ATTEMPTS = 3
Row = Mapping[str, Any]


def is_public(url: Any) -> bool:
    """Return whether a device may be told an address: http or https, and with nothing in it that could be a secret.

    A query is taken for one: that is where links that were signed for somebody have their signature.
    """
    if not isinstance(url, str) or not (url.isascii() and url.isprintable()) or " " in url:
        return False
    try:
        place = urlsplit(url)
        named = bool(place.hostname) and (place.port is None or place.port > 0)
    except ValueError:
        return False
    return named and place.scheme in ("http", "https") and "@" not in place.netloc and not place.query


class Trouble(Exception):
    """A file cannot be had.

    Args:
        reason: why, in words that follow the address.
        place: whether all else of this server cannot be had either.
        cut: whether it ended in the middle, so that asking for the rest may help.
    """

    def __init__(self, reason: str, place: bool = False, cut: bool = False) -> None:
        super().__init__(reason)
        self.place = place
        self.cut = cut


class Peer:
    """A connection to a relay; proxies of the environment are not asked, for it is a neighbour.

    Args:
        url: http://address:port/token; files are asked for below it by their sha256.
    """

    attempts = 1
    # what it serves it can serve from any byte on
    needs_range = False
    patience = PEER_TIMEOUT_SECONDS

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url)
        self._connection: Optional[http.client.HTTPConnection] = None

    def place(self, _row: Row) -> str:
        """Return the server of a file."""
        return self._url.netloc

    def ask(self, row: Row, offset: int) -> http.client.HTTPResponse:
        """Ask for a file from an offset on. Raises Trouble where nobody answers."""
        try:
            if self._connection is None:
                host, port = self._url.hostname or "", self._url.port
                self._connection = http.client.HTTPConnection(host, port, timeout=CONNECT_TIMEOUT_SECONDS)
                self._connection.connect()
                if self._connection.sock:
                    self._connection.sock.settimeout(PEER_TIMEOUT_SECONDS)
            path = "{}/{}".format(self._url.path.rstrip("/"), row["sha256"])
            self._connection.request("GET", path, headers=_headers(offset))
            return self._connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise _no_answer(error) from error

    def wrong(self, trouble: Trouble) -> Trouble:
        """Return what a trouble with a file means: a relay that fails once is not used any more."""
        return Trouble(str(trouble), place=True)

    def finish(self, response: http.client.HTTPResponse) -> None:
        """Have the connection ready for the next file; read to its end, an answer leaves it open."""
        try:
            more = response.read(1)
        except (OSError, http.client.HTTPException):
            more = b"?"
        if more:
            self.hang_up()

    def hang_up(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Internet:
    """The addresses that published the files, by this machine's own proxy settings and certificates."""

    attempts = INTERNET_ATTEMPTS
    needs_range = True
    patience = INTERNET_TIMEOUT_SECONDS

    def __init__(self) -> None:
        self._opener = urllib.request.OpenerDirector()
        # urllib's own opener would also open file:, ftp: and data:
        handlers: List[Any] = [urllib.request.ProxyHandler, urllib.request.UnknownHandler, urllib.request.HTTPHandler]
        # a Python without ssl has no such handler
        handlers += [getattr(urllib.request, name) for name in ["HTTPSHandler"] if hasattr(urllib.request, name)]
        handlers += [urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor, _OnlyRemote]
        for handler in handlers:
            self._opener.add_handler(handler())
        self._response: Optional[http.client.HTTPResponse] = None

    def place(self, row: Row) -> str:
        """Return the server of a file; "" for an address that is none to fetch from."""
        url = row.get("url")
        return "{0.scheme}://{0.netloc}".format(urlsplit(str(url))) if is_public(url) else ""

    def ask(self, row: Row, offset: int) -> http.client.HTTPResponse:
        """Ask for a file from an offset on. Raises Trouble where it is refused or nobody answers."""
        if not self.place(row):
            raise Trouble("it is no address that a device may fetch from")
        self.hang_up()
        try:
            request = urllib.request.Request(str(row["url"]), headers=_headers(offset))
            self._response = self._opener.open(request, timeout=INTERNET_TIMEOUT_SECONDS)
            return self._response
        except urllib.error.HTTPError as error:
            error.close()
            raise Trouble(without_passwords(f"it answers {error.code} {error.reason}")) from error
        except (OSError, http.client.HTTPException) as error:
            raise _no_answer(error) from error
        except ValueError as error:
            raise Trouble(f"it is no address: {error}") from error

    def wrong(self, trouble: Trouble) -> Trouble:
        """Return what a trouble with a file means."""
        return trouble

    def finish(self, _response: http.client.HTTPResponse) -> None:
        """End with a file; each has a connection of its own."""
        self.hang_up()

    def hang_up(self) -> None:
        """Close the connection."""
        if self._response is not None:
            self._response.close()
            self._response = None


class _OnlyRemote(urllib.request.HTTPRedirectHandler):
    """Follows a redirection to another server, and to nothing else."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Optional[urllib.request.Request]:
        place = urlsplit(newurl)
        if place.scheme not in ("http", "https") or "@" in place.netloc:
            raise Trouble(f"it leads to {without_passwords(newurl)}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _headers(offset: int) -> Dict[str, str]:
    found = {"Accept-Encoding": "identity", "User-Agent": "jetson-mamba"}
    if offset:
        found["Range"] = f"bytes={offset}-"
    return found


def _no_answer(error: Exception) -> Trouble:
    reason = getattr(error, "reason", None)
    cause = reason if isinstance(reason, Exception) else error
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return Trouble(f"it does not answer ({without_passwords(str(text))})", place=True)
