"""The device's half of a transfer: joining, resuming, verifying, sweeping, and fetching from a relay."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import download, receive
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

PART = 1000


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def content(size: int, seed: int = 1) -> bytes:
    """Return bytes of which no two parts are the same."""
    block = b"".join(hashlib.sha256(f"{seed}.{number}".encode()).digest() for number in range(size // 32 + 1))
    return block[:size]


def row(data: bytes, *names: str, **more: Any) -> dict[str, Any]:
    return {"sha256": sha(data), "size": len(data), "names": list(names or ["file.whl"]), **more}


def put(tmp: Path, data: bytes, indexes: Any, wrong: bool = False) -> None:
    """Put parts where the controller puts them."""
    folder = Path(receive.incoming_folder(str(tmp)), sha(data))
    folder.mkdir(parents=True, exist_ok=True)
    for index in indexes:
        part = data[index * PART : (index + 1) * PART]
        (folder / receive.part_name(index, PART)).write_bytes(part[::-1] if wrong else part)


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 5 * PART, 5 * PART + 1])
def test_a_file_of_any_size_arrives_and_nothing_stays(tmp_path: Path, size: int) -> None:
    data, tmp = content(size), tmp_path / "new" / "tmp"
    answer = receive.begin(str(tmp), [row(data)], PART)
    assert answer["missing"] == {sha(data): list(range(receive.part_count(size, PART)))}
    put(tmp, data, answer["missing"][sha(data)])
    folder = receive.finish(str(tmp), [row(data)], PART)["folder"]
    assert (Path(folder) / "file.whl").read_bytes() == data
    assert os.stat(folder).st_mode & 0o777 == 0o700
    assert receive.close(str(tmp), folder, []) == {"left": []}
    assert list(tmp.iterdir()) == []


def test_an_interrupted_transfer_goes_on_where_it_stopped(tmp_path: Path) -> None:
    data, tmp = content(4 * PART + 7), str(tmp_path)
    receive.begin(tmp, [row(data)], PART)
    put(tmp_path, data, [0, 1, 2])
    cut = Path(tmp, receive.incoming_folder(tmp), sha(data), receive.part_name(3, PART))
    cut.write_bytes(data[3 * PART : 3 * PART + 5])
    assert receive.begin(tmp, [row(data)], PART)["missing"] == {sha(data): [3, 4]}
    # asked to finish too early, what is there is joined and the rest named
    assert receive.finish(tmp, [row(data)], PART)["missing"] == {sha(data): [3, 4]}
    assert os.listdir(Path(receive.incoming_folder(tmp), sha(data))).count("body") == 1
    put(tmp_path, data, [3, 4])
    assert receive.finish(tmp, [row(data)], PART)["folder"]


def test_a_kill_while_joining_costs_nothing(tmp_path: Path) -> None:
    """Half a part appended, and a whole one appended but not yet removed."""
    data, tmp = content(3 * PART), str(tmp_path)
    for had in (PART + 300, 2 * PART):
        receive.begin(tmp, [row(data)], PART)
        put(tmp_path, data, [1, 2])
        Path(receive.incoming_folder(tmp), sha(data), "body").write_bytes(data[:had])
        folder = receive.finish(tmp, [row(data)], PART)["folder"]
        assert Path(folder, "file.whl").read_bytes() == data


def test_a_damaged_part_is_found_and_only_it_and_what_follows_is_sent_again(tmp_path: Path) -> None:
    data, tmp = content(5 * PART), str(tmp_path)
    digests = [sha(data[at : at + PART]) for at in range(0, 5 * PART, PART)]
    receive.begin(tmp, [row(data)], PART)
    put(tmp_path, data, [0, 1, 2, 4])
    put(tmp_path, data, [3], wrong=True)
    answer = receive.finish(tmp, [row(data)], PART)
    assert (answer["folder"], answer["damaged"], answer["missing"]) == (None, [sha(data)], {})
    answer = receive.finish(tmp, [row(data, parts=digests)], PART)
    assert answer["missing"] == {sha(data): [3, 4]}
    put(tmp_path, data, [3, 4])
    folder = receive.finish(tmp, [row(data, parts=digests)], PART)["folder"]
    assert Path(folder, "file.whl").read_bytes() == data


def test_a_wrong_sum_of_right_parts_starts_from_zero(tmp_path: Path) -> None:
    data, tmp = content(2 * PART), str(tmp_path)
    wrong = dict(row(data), sha256="a" * 64, parts=[sha(data[:PART]), sha(data[PART:])])
    folder = Path(receive.incoming_folder(tmp), "a" * 64)
    receive.begin(tmp, [wrong], PART)
    for index in (0, 1):
        (folder / receive.part_name(index, PART)).write_bytes(data[index * PART : (index + 1) * PART])
    assert receive.finish(tmp, [wrong], PART)["missing"] == {"a" * 64: [0, 1]}


def test_one_content_under_two_names(tmp_path: Path) -> None:
    data = content(10)
    put(tmp_path, data, [0])
    folder = receive.finish(str(tmp_path), [row(data, "a", "b")], PART)["folder"]
    assert sorted(os.listdir(folder)) == ["a", "b"]
    assert Path(folder, "a").read_bytes() == Path(folder, "b").read_bytes() == data


def pack(files: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(data) if kind == tarfile.REGTYPE else 0
            member.linkname = "/etc/passwd"
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def test_an_archive_is_unpacked(tmp_path: Path) -> None:
    files = {"a": b"1", "b": content(3000)}
    data = pack(files)
    members = [{"name": name, "sha256": sha(text)} for name, text in files.items()]
    put(tmp_path, data, range(receive.part_count(len(data), PART)))
    folder = receive.finish(str(tmp_path), [dict(row(data), names=[], members=members)], PART)["folder"]
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == files


@pytest.mark.parametrize(
    ("files", "kind", "announced", "words"),
    [
        ({"../a": b"1"}, tarfile.REGTYPE, {"../a": b"1"}, "plain name"),
        ({"a": b"1", "x": b"2"}, tarfile.REGTYPE, {"a": b"1"}, "x in the archive"),
        ({"a": b""}, tarfile.SYMTYPE, {"a": b""}, "a in the archive"),
        ({"a": b"1"}, tarfile.REGTYPE, {"a": b"2"}, "has the sha256"),
        ({"a": b"1"}, tarfile.REGTYPE, {"a": b"1", "b": b"2"}, "no b in the archive"),
    ],
)
def test_an_archive_that_holds_something_else_is_refused(
    tmp_path: Path, files: dict[str, bytes], kind: bytes, announced: dict[str, bytes], words: str
) -> None:
    data = pack(files, kind)
    members = [{"name": name, "sha256": sha(text)} for name, text in announced.items()]
    put(tmp_path, data, range(receive.part_count(len(data), PART)))
    with pytest.raises(Problem) as caught:
        receive.finish(str(tmp_path), [dict(row(data), names=[], members=members)], PART)
    assert words in caught.value.render()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(receive.DELIVERY)]


def test_names_do_not_lead_elsewhere(tmp_path: Path) -> None:
    data = content(10)
    for name in ("../x", "/etc/x", "..", ""):
        put(tmp_path, data, [0])
        with pytest.raises(Problem):
            receive.finish(str(tmp_path), [row(data, name)], PART)
    with pytest.raises(Problem):
        receive.begin(str(tmp_path), [{"sha256": "../../etc", "size": 1}], PART)


def test_only_a_delivery_is_removed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    elsewhere = tmp_path / "other" / (receive.DELIVERY + "abcdefgh")
    elsewhere.mkdir(parents=True)
    for folder in (tmp_path / "precious", elsewhere, Path(f"{tmp_path}/{receive.DELIVERY}abcdefgh/..")):
        with pytest.raises(Problem):
            receive.close(str(tmp_path), str(folder), [])
    assert (tmp_path / "precious").is_dir() and elsewhere.is_dir()


def age(path: Path, hours: float = 13) -> None:
    when = time.time() - hours * 3600
    for item in [*path.rglob("*"), path]:
        os.utime(item, (when, when))


def test_what_killed_runs_left_goes_after_half_a_day_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, other, recent = content(PART, 1), content(PART, 2), content(PART, 3)
    incoming = Path(receive.incoming_folder(str(tmp_path)))
    for data in (wanted, other, recent):
        put(tmp_path, data, [0])
        age(incoming / sha(data), 1 if data is recent else 13)
    folders = {"deadbeef": 13, "freshnew": 1}
    for name, hours in folders.items():
        (tmp_path / (receive.DELIVERY + name)).mkdir()
        age(tmp_path / (receive.DELIVERY + name), hours)
    for name in (receive.DELIVERY + "bak", "deadbeef", "jetson-mamba-incoming.77777"):
        (tmp_path / name).mkdir()
        age(tmp_path / name)
    before = set(os.listdir(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert receive.sweep(str(tmp_path), set()) == []
    assert receive.begin(str(tmp_path), [row(wanted)], PART)["missing"] == {}
    assert before - set(os.listdir(tmp_path)) == {receive.DELIVERY + "deadbeef"}
    assert set(os.listdir(incoming)) == {sha(wanted), sha(recent)}


def test_folders_of_others_are_not_used(tmp_path: Path) -> None:
    incoming = Path(receive.incoming_folder(str(tmp_path)))
    (tmp_path / "target").mkdir()
    incoming.symlink_to(tmp_path / "target")
    with pytest.raises(Problem, match="no folder"):
        receive.begin(str(tmp_path), [], PART)
    incoming.unlink()
    incoming.mkdir(mode=0o777)
    incoming.chmod(0o777)
    receive.begin(str(tmp_path), [], PART)
    assert incoming.stat().st_mode & 0o777 == 0o700


def test_a_tmp_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for step in (receive.begin, receive.finish):
        with pytest.raises(Problem) as caught:
            step(str(tmp_path / "file/tmp"), [], PART)
        assert "no folder could be made" in caught.value.found
        assert "jetson_platform_tmp_root" in caught.value.next_step


def test_a_full_disk_is_said_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = content(PART)
    put(tmp_path, data, [0])

    def full(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(receive.shutil, "copyfileobj", full)
    with pytest.raises(Problem) as caught:
        receive.finish(str(tmp_path), [row(data)], PART)
    assert "is full" in caught.value.found


def test_looking_changes_nothing(tmp_path: Path) -> None:
    data = content(3 * PART)
    answer = receive.look(str(tmp_path / "no" / "such"), [row(data)], PART)
    assert answer["missing"] == {sha(data): [0, 1, 2]} and answer["free_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- from a relay


class Peer(http.server.ThreadingHTTPServer):
    """A relay that can be told to misbehave."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), PeerHandler)
        self.files = files
        self.asked: list[str | None] = []
        self.cut_after: int | None = None
        self.lies = False
        self.delay = 0.0


class PeerHandler(http.server.BaseHTTPRequestHandler):
    server: Peer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments: Any) -> None:
        """Keep silent."""

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        data = self.server.files.get(self.path.rsplit("/", 1)[1])
        if data is None:
            self.send_error(404)
            return
        if self.server.lies:
            data = bytes(len(data))
        first = int(asked[6:-1]) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        end = len(data) if self.server.cut_after is None else first + self.server.cut_after
        for at in range(first, end, 500):
            self.wfile.write(data[at : min(at + 500, end)])
            self.wfile.flush()
            time.sleep(self.server.delay)
        if end < len(data):
            self.close_connection = True


@pytest.fixture
def files() -> list[bytes]:
    return [content(2500, 1), content(10, 2), content(0, 3)]


@pytest.fixture
def peer(files: list[bytes]) -> Iterator[Peer]:
    server = Peer({sha(data): data for data in files})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def pull(tmp: Path, peer: Peer, wanted: list[bytes], seconds: float = 30) -> dict[str, Any]:
    url = f"http://127.0.0.1:{peer.server_address[1]}/token"
    return with_reason(receive.pull(str(tmp), url, [row(data, sha(data)[:8]) for data in wanted], PART, seconds))


def with_reason(answer: dict[str, Any]) -> dict[str, Any]:
    """Add why the first of the files failed, or None."""
    return {**answer, "trouble": next(iter(answer["refused"].values()), None)}


def test_files_come_from_a_relay(tmp_path: Path, peer: Peer, files: list[bytes]) -> None:
    answer = pull(tmp_path, peer, files)
    assert (answer["trouble"], answer["received"]) == (None, 2510)
    assert answer["done"] == [sha(data) for data in files]
    again = pull(tmp_path, peer, files)
    assert (again["done"], again["received"]) == (answer["done"], 0)
    folder = receive.finish(str(tmp_path), [row(data, sha(data)[:8]) for data in files], PART)["folder"]
    assert sorted(os.listdir(folder)) == sorted(sha(data)[:8] for data in files)


def test_a_relay_that_dies_is_gone_on_with_by_the_controller(tmp_path: Path, peer: Peer, files: list[bytes]) -> None:
    peer.cut_after = 1700
    answer = pull(tmp_path, peer, files[:1])
    assert answer["trouble"] == "it ended at 1700 of 2500 bytes" and answer["done"] == []
    # the controller needs to send only what is not whole
    assert receive.begin(str(tmp_path), [row(files[0])], PART)["missing"] == {sha(files[0]): [1, 2]}
    put(tmp_path, files[0], [1, 2])
    folder = receive.finish(str(tmp_path), [row(files[0])], PART)["folder"]
    assert Path(folder, "file.whl").read_bytes() == files[0]


def test_a_relay_is_gone_on_with_by_range(tmp_path: Path, peer: Peer, files: list[bytes]) -> None:
    put(tmp_path, files[0], [0])
    answer = pull(tmp_path, peer, files[:1])
    assert answer["done"] == [sha(files[0])]
    assert (peer.asked, answer["received"]) == (["bytes=1000-"], 1500)


def test_a_relay_is_left_when_the_time_is_up(
    tmp_path: Path, peer: Peer, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receive, "_PIECE_BYTES", 500)
    monkeypatch.setattr(receive, "SLOWEST_PULL_BYTES", 1)
    peer.delay = 0.2
    answer = pull(tmp_path, peer, files[:1], seconds=0.3)
    assert answer["trouble"] is None and answer["done"] == [] and 0 < answer["had"][sha(files[0])] < 2500
    peer.delay = 0
    assert pull(tmp_path, peer, files[:1])["done"] == [sha(files[0])]
    assert peer.asked[1] == f"bytes={answer['received']}-"


def test_a_relay_that_is_too_slow_is_left(tmp_path: Path, peer: Peer, files: list[bytes]) -> None:
    assert "bytes in" in pull(tmp_path, peer, files[:1], seconds=0)["trouble"]


def test_a_relay_that_lies_is_not_believed(tmp_path: Path, peer: Peer, files: list[bytes]) -> None:
    peer.lies = True
    answer = pull(tmp_path, peer, files[:1])
    assert answer["done"] == [] and "another sha256" in answer["trouble"]
    assert receive.begin(str(tmp_path), [row(files[0])], PART)["missing"] == {sha(files[0]): [0, 1, 2]}


def test_a_relay_without_the_file_and_no_relay(tmp_path: Path, peer: Peer) -> None:
    assert "404" in pull(tmp_path, peer, [content(9, 9)])["trouble"]
    wanted = [row(content(9, seed)) for seed in (8, 9)]
    answer = receive.pull(str(tmp_path), "http://127.0.0.1:9/token", wanted, PART, 30)
    assert sorted(answer["refused"]) == sorted(item["sha256"] for item in wanted)
    assert "does not answer" in with_reason(answer)["trouble"]


def test_a_pull_that_does_not_fit_is_refused(
    tmp_path: Path, peer: Peer, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receive, "free_bytes", lambda _path: 2000)
    with pytest.raises(Problem, match="0 MB free"):
        pull(tmp_path, peer, files)
    assert peer.asked == []


# ---------------------------------------------------------------- from the internet


class Publisher(http.server.ThreadingHTTPServer):
    """A server on the internet: files by path, and what else it does at a path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), PublisherHandler)
        self.files: dict[str, bytes] = {}
        self.moved: dict[str, str] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.headers: list[dict[str, str]] = []
        # after how many bytes each answer ends, one after the other
        self.cuts: list[int] = []
        self.knows_range = True
        self.delay = 0.0

    def url(self, name: str) -> str:
        """Return the address of a file."""
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def offer(self, data: bytes, name: str) -> dict[str, Any]:
        """Serve a file and return what a device is told of it."""
        self.files["/" + name] = data
        return row(data, name, url=self.url(name))


class PublisherHandler(http.server.BaseHTTPRequestHandler):
    server: Publisher

    def log_message(self, *_arguments: Any) -> None:
        """Keep silent."""

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append((self.path, wanted))
        server.headers.append(dict(self.headers))
        if self.path in server.moved:
            self.send_response(302)
            self.send_header("Location", server.moved[self.path])
            self.end_headers()
            return
        data = server.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        first = int(wanted[6:-1]) if wanted and server.knows_range else 0
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        end = min(len(data), first + server.cuts.pop(0)) if server.cuts else len(data)
        for at in range(first, end, 500):
            self.wfile.write(data[at : min(at + 500, end)])
            self.wfile.flush()
            time.sleep(server.delay)


@pytest.fixture
def publisher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Publisher]:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    with Publisher() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(tmp: Path, wanted: list[dict[str, Any]], seconds: float = 30) -> dict[str, Any]:
    return receive.pull(str(tmp), "", wanted, PART, seconds)


def test_a_device_fetches_files_from_their_addresses(tmp_path: Path, publisher: Publisher, files: list[bytes]) -> None:
    wanted = [publisher.offer(data, f"{number}%2B.whl") for number, data in enumerate(files)]
    answer = fetch(tmp_path, wanted)
    assert (answer["refused"], answer["received"]) == ({}, 2510)
    assert answer["done"] == [sha(data) for data in files]
    assert [path for path, _range in publisher.asked] == ["/0%2B.whl", "/1%2B.whl", "/2%2B.whl"]
    folder = receive.finish(str(tmp_path), wanted, PART)["folder"]
    assert [Path(folder, f"{number}%2B.whl").read_bytes() for number in range(3)] == files
    assert all(headers["Accept-Encoding"] == "identity" for headers in publisher.headers)


def test_a_cut_download_is_gone_on_with(tmp_path: Path, publisher: Publisher, files: list[bytes]) -> None:
    publisher.cuts = [1200, 900]
    answer = fetch(tmp_path, [publisher.offer(files[0], "a.whl")])
    assert answer["refused"] == {} and answer["received"] == 2500
    assert [asked for _path, asked in publisher.asked] == [None, "bytes=1200-", "bytes=2100-"]


def test_what_is_cut_again_and_again_is_given_up_and_its_beginning_kept(
    tmp_path: Path, publisher: Publisher, files: list[bytes]
) -> None:
    publisher.cuts = [1100, 0, 0]
    answer = fetch(tmp_path, [publisher.offer(files[0], "a.whl"), publisher.offer(files[1], "b.whl")])
    assert answer["refused"] == {sha(files[0]): "it ended at 1100 of 2500 bytes"}
    assert len(publisher.asked) == 3 + 1 and answer["had"][sha(files[0])] == 1100
    # the controller sends the rest
    assert receive.begin(str(tmp_path), [row(files[0])], PART)["missing"] == {sha(files[0]): [1, 2]}


def test_a_download_goes_on_in_the_next_call(
    tmp_path: Path, publisher: Publisher, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receive, "_PIECE_BYTES", 500)
    monkeypatch.setattr(receive, "SLOWEST_PULL_BYTES", 1)
    publisher.delay = 0.2
    wanted = [publisher.offer(files[0], "a.whl")]
    answer = fetch(tmp_path, wanted, seconds=0.3)
    assert answer["refused"] == {} and answer["done"] == [] and 0 < answer["received"] < 2500
    publisher.delay = 0
    assert fetch(tmp_path, wanted)["done"] == [sha(files[0])]
    assert publisher.asked[1] == ("/a.whl", f"bytes={answer['received']}-")


def test_a_server_that_cannot_go_on_is_left(tmp_path: Path, publisher: Publisher, files: list[bytes]) -> None:
    put(tmp_path, files[0], [0])
    publisher.knows_range = False
    answer = fetch(tmp_path, [publisher.offer(files[0], "a.whl")])
    assert "cannot go on" in answer["refused"][sha(files[0])] and answer["had"] == {sha(files[0]): 1000}


def test_what_a_server_lacks_or_has_otherwise_fails_alone(
    tmp_path: Path, publisher: Publisher, files: list[bytes]
) -> None:
    wrong, short = content(2500, 7), content(40, 8)
    wanted = [
        row(files[0], url=publisher.url("none.whl")),
        {**publisher.offer(bytes(2500), "wrong.whl"), "sha256": sha(wrong)},
        {**publisher.offer(b"<html>Log in here", "short.whl"), "sha256": sha(short), "size": 40},
        publisher.offer(files[1], "b.whl"),
    ]
    answer = fetch(tmp_path, wanted)
    assert answer["done"] == [sha(files[1])]
    assert answer["refused"] == {
        sha(files[0]): "it answers 404 Not Found",
        sha(wrong): f"what it sent as {sha(wrong)[:12]}… has another sha256",
        sha(short): "it has a file of 17 bytes there, not of 40",
    }
    # nothing wrong stays to be gone on with
    assert answer["had"] == {sha(files[0]): 0, sha(wrong): 0, sha(short): 0, sha(files[1]): 10}


def test_a_server_that_does_not_answer_is_asked_once(
    tmp_path: Path, publisher: Publisher, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []
    real = socket.create_connection

    def connect(address: Any, *more: Any, **options: Any) -> Any:
        tried.append(address[1])
        return real(address, *more, **options)

    monkeypatch.setattr(socket, "create_connection", connect)
    wanted = [row(content(9, seed), url=f"http://127.0.0.1:9/{seed}.whl") for seed in range(5)]
    answer = fetch(tmp_path, [*wanted, publisher.offer(files[1], "b.whl")])
    assert answer["done"] == [sha(files[1])] and len(answer["refused"]) == 5
    assert set(answer["refused"].values()) == {"it does not answer (Connection refused)"}
    assert tried.count(9) == 1


def test_a_redirection_is_followed_to_servers_only(tmp_path: Path, publisher: Publisher, files: list[bytes]) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(files[0])
    publisher.files["/cdn/a.whl"] = files[0]
    for where in (f"file://{secret}", "ftp://127.0.0.1/a", "data:,x", "http://me:hunter2@127.0.0.1/a", str(secret)):
        publisher.moved["/a.whl"] = where
        answer = fetch(tmp_path, [row(files[0], url=publisher.url("a.whl"))])
        assert answer["done"] == [] and answer["received"] == 0, where
        assert "hunter2" not in str(answer)
    # signed addresses, as file hosts hand them out, are the server's own business
    publisher.moved["/a.whl"] = "/cdn/a.whl"
    publisher.cuts = [700]
    assert fetch(tmp_path, [row(files[0], url=publisher.url("a.whl"))])["done"] == [sha(files[0])]
    assert publisher.asked[-2:] == [("/a.whl", "bytes=700-"), ("/cdn/a.whl", "bytes=700-")]


@pytest.mark.parametrize("url", ["", None, "file:///etc/passwd", "/etc/passwd", "ftp://h/a", "http://", "http://h:x/a"])
def test_what_is_no_address_is_not_opened(tmp_path: Path, files: list[bytes], url: Any) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(files[0])
    for where in (url, f"file://{secret}"):
        answer = fetch(tmp_path / "tmp", [row(files[0], url=where)])
        assert answer["done"] == [] and "no address" in answer["refused"][sha(files[0])]


def test_the_devices_own_proxy_is_used(
    tmp_path: Path, publisher: Publisher, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{publisher.server_port}")
    publisher.files["http://files.invalid/a.whl"] = files[0]
    assert fetch(tmp_path, [row(files[0], url="http://files.invalid/a.whl")])["done"] == [sha(files[0])]


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://example.com/a-1.0%2Bcpu.whl", True),
        ("http://[::1]:8080/a.whl#sha256=00", True),
        ("https://me:secret@example.com/a.whl", False),
        ("https://token@example.com/a.whl", False),
        ("https://example.com/a.whl?X-Signature=secret", False),
        ("file:///srv/a.whl", False),
        ("ssh://git@example.com/a", False),
        ("https:///a.whl", False),
        ("https://example.com:port/a.whl", False),
        ("https://example.com/a\n.whl", False),
        ("https://example.com/a b.whl", False),
        ("https://example.com/ä.whl", False),
        ("", False),
        (None, False),
    ],
)
def test_addresses_that_devices_may_be_told(url: Any, public: bool) -> None:
    assert download.is_public(url) is public
