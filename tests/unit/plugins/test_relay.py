"""A relay: what it serves, to whom, how it is found again, and that it ends."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import receive, relay, relay_server
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

TOKEN = "5" * 32
DATA = bytes(range(256)) * 40
DIGEST = hashlib.sha256(DATA).hexdigest()


def row(data: bytes = DATA) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "names": ["x"]}


def ask(
    url: str, path: str, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    """Return status, body and headers of a request."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=10)
    try:
        connection.request(method, path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read(), dict(response.getheaders())
    finally:
        connection.close()


# ---------------------------------------------------------------- the server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[relay_server.Server]:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / DIGEST).write_bytes(DATA)
    (tmp_path / "secret").write_text("secret")
    made = relay_server.Server(str(tmp_path), "127.0.0.1", 0, TOKEN)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    made.thread = thread  # type: ignore[attr-defined]
    yield made
    made.shutdown()
    made.server_close()


def base(server: relay_server.Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_it_serves_whole_files_and_ranges(server: relay_server.Server) -> None:
    path = f"/{TOKEN}/{DIGEST}"
    assert ask(base(server), path)[:2] == (200, DATA)
    status, body, headers = ask(base(server), path, headers={"Range": "bytes=10000-"})
    assert (status, body, headers["Content-Range"]) == (206, DATA[10000:], "bytes 10000-10239/10240")
    assert ask(base(server), path, headers={"Range": "bytes=5-6"})[:2] == (206, DATA[5:7])
    assert ask(base(server), path, headers={"Range": "bytes=99999-"})[0] == 416
    status, body, headers = ask(base(server), path, "HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", "10240")
    assert headers["Server"] == "relay "


@pytest.mark.parametrize(
    "path",
    [
        "/",
        f"/{TOKEN}/",
        f"/{DIGEST}",
        f"/{'6' * 32}/{DIGEST}",
        f"/{TOKEN}/{'0' * 64}",
        f"/{TOKEN}/../secret",
        f"/{TOKEN}/{DIGEST}/..",
        f"/{TOKEN}/{DIGEST}?x",
    ],
)
def test_it_serves_nothing_else(server: relay_server.Server, path: str) -> None:
    status, body, _headers = ask(base(server), path)
    assert status == 404 and b"secret" not in body and DATA not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_it_only_reads(server: relay_server.Server, method: str) -> None:
    assert ask(base(server), f"/{TOKEN}/{DIGEST}", method)[0] == 501


def test_several_peers_at_once(server: relay_server.Server) -> None:
    results: list[tuple[int, bytes]] = []
    threads = [
        threading.Thread(target=lambda: results.append(ask(base(server), f"/{TOKEN}/{DIGEST}")[:2])) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(200, DATA)] * 8


class TestBound:
    """A relay answers only so many at once."""

    @pytest.fixture(autouse=True)
    def one_slot(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(relay_server, "CONNECTIONS", 1)

    def test_who_comes_too_many_is_turned_away_until_a_slot_is_free(
        self, one_slot: None, server: relay_server.Server
    ) -> None:
        holding = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        holding.request("GET", f"/{TOKEN}/{DIGEST}")
        holding.getresponse().read()
        with pytest.raises((http.client.HTTPException, OSError)):
            ask(base(server), f"/{TOKEN}/{DIGEST}")
        holding.close()
        for _attempt in range(100):
            with contextlib.suppress(http.client.HTTPException, OSError):
                assert ask(base(server), f"/{TOKEN}/{DIGEST}")[0] == 200
                return
            time.sleep(0.05)
        pytest.fail("the slot is never freed")


def test_it_ends_when_nobody_asks(server: relay_server.Server) -> None:
    server.idle_seconds = 0.6
    for _request in range(4):
        time.sleep(0.3)
        ask(base(server), f"/{TOKEN}/{DIGEST}")
    server.thread.join(5)  # type: ignore[attr-defined]
    assert not server.thread.is_alive()  # type: ignore[attr-defined]


def test_a_long_download_keeps_it(server: relay_server.Server) -> None:
    server.idle_seconds = 0.2
    with server.serving():
        server.thread.join(1)  # type: ignore[attr-defined]
        assert server.thread.is_alive()  # type: ignore[attr-defined]


# ---------------------------------------------------------------- its life on a host


def deliver(tmp: Path, *contents: bytes) -> str:
    folder = tmp / (receive.DELIVERY + "abcdefgh")
    folder.mkdir(exist_ok=True)
    for data in contents:
        (folder / hashlib.sha256(data).hexdigest()).write_bytes(data)
    return str(folder)


@pytest.fixture
def tmp(tmp_path: Path) -> Iterator[Path]:
    """Return a folder for transfers; whatever serves there is ended."""
    yield tmp_path
    relay.stop(str(tmp_path))


def is_alive(pid: int, patience: float = 0.0) -> bool:
    """Return whether a process runs, after so many seconds of waiting for its end."""
    deadline = time.monotonic() + patience
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z" or time.monotonic() >= deadline:
            return state != "Z"
        time.sleep(0.05)


def test_a_relay_from_start_to_end(tmp: Path) -> None:
    assert relay.query(str(tmp), [row()]) == {"lacking": [DIGEST], "running": False}
    assert not relay.stop(str(tmp))
    made = relay.start(str(tmp), "127.0.0.1", deliver(tmp, DATA), [row()])
    assert made["started"] and made["files"] == [DIGEST]
    place = urlsplit(made["url"])
    assert place.hostname == "127.0.0.1" and len(place.path) == 33
    # a session of its own, nobody's child, and no token in its command line
    assert os.getsid(made["pid"]) != os.getsid(0)
    assert place.path[1:] not in Path(f"/proc/{made['pid']}/cmdline").read_text()
    store = Path(relay.store_folder(str(tmp)))
    assert store.stat().st_mode & 0o777 == 0o700 and (store / "files").stat().st_mode & 0o777 == 0o700
    answer = receive.pull(str(tmp), made["url"], [row()], 1000, 30)
    assert (answer["done"], answer["refused"]) == ([DIGEST], {})
    assert relay.stop(str(tmp), check=True) and is_alive(made["pid"])
    assert relay.stop(str(tmp))
    assert not is_alive(made["pid"], 5) and not store.exists()


def test_a_second_run_finds_it(tmp: Path) -> None:
    first = relay.start(str(tmp), "127.0.0.1", deliver(tmp, DATA), [row()])
    assert relay.query(str(tmp), [row(), row(b"more")])["lacking"] == [row(b"more")["sha256"]]
    second = relay.start(str(tmp), "127.0.0.1", deliver(tmp, b"more"), [row(), row(b"more")])
    assert not second["started"] and second["url"] == first["url"] and len(second["files"]) == 2
    assert ask(second["url"], urlsplit(second["url"]).path + "/" + row(b"more")["sha256"])[:2] == (200, b"more")


def test_another_address_replaces_it(tmp: Path) -> None:
    first = relay.start(str(tmp), "127.0.0.1", deliver(tmp, DATA), [row()])
    second = relay.start(str(tmp), "127.0.0.2", deliver(tmp, DATA), [row()])
    assert second["started"] and not is_alive(first["pid"], 5)
    assert ask(second["url"], urlsplit(second["url"]).path + "/" + DIGEST)[0] == 200
    # it is bound to that address alone
    with pytest.raises(OSError):
        ask(f"http://127.0.0.1:{urlsplit(second['url']).port}", "/")


def test_what_a_killed_server_left_is_verified_and_used(tmp: Path) -> None:
    first = relay.start(str(tmp), "127.0.0.1", deliver(tmp, DATA, b"old"), [row(), row(b"old")])
    os.kill(first["pid"], 9)
    for _attempt in range(100):
        if relay.read_note(relay.store_folder(str(tmp))) is None:
            break
        time.sleep(0.05)
    assert relay.query(str(tmp), [row()]) == {"lacking": [], "running": False}
    second = relay.start(str(tmp), "127.0.0.1", None, [row()])
    assert second["started"] and second["files"] == [DIGEST] and second["url"] != first["url"]
    relay.stop(str(tmp))
    files = Path(relay.store_folder(str(tmp)), "files")
    files.mkdir(parents=True)
    (files / DIGEST).write_bytes(bytes(len(DATA)))
    with pytest.raises(Problem, match="damaged"):
        relay.start(str(tmp), "127.0.0.1", None, [row()])
    assert relay.query(str(tmp), [row()])["lacking"] == [DIGEST]


def test_its_store_goes_with_it_when_nobody_asks(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_server, "IDLE_SECONDS", 0.5)
    made = relay.start(str(tmp), "127.0.0.1", deliver(tmp, DATA), [row()])
    assert not is_alive(made["pid"], 10) and not Path(relay.store_folder(str(tmp))).exists()


@pytest.mark.parametrize(
    ("address", "words"),
    [("0.0.0.0", "not all of them"), ("::", "not all of them"), ("192.0.2.1", "does not start"), ("no such", "name")],
)
def test_an_address_that_is_none_of_the_host(tmp: Path, address: str, words: str) -> None:
    with pytest.raises(Problem) as caught:
        relay.start(str(tmp), address, deliver(tmp, DATA), [row()])
    assert "jetson_platform_relay_address" in caught.value.next_step
    assert words in caught.value.render() or address == "no such"
    assert not Path(relay.store_folder(str(tmp))).exists()


def test_a_store_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    Path(relay.store_folder(str(tmp_path))).symlink_to(tmp_path / "other")
    for step in (
        lambda: relay.stop(str(tmp_path)),
        lambda: relay.start(str(tmp_path), "127.0.0.1", None, []),
    ):
        with pytest.raises(Problem):
            step()
    assert (tmp_path / "other").is_dir()
