"""The controller's cache: checksums, trust on first use, resumption, one download for many processes."""

from __future__ import annotations

import hashlib
import http.server
import json
import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.versions import Target
from ansible_collections.jetson.mamba.plugins.plugin_utils import fetch, locks

DATA = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(DATA).hexdigest()
NAME = "thing-1.0-py3-none-any.whl"
ORIN = Target("aarch64", "3.10", "2.35")


class Server(http.server.ThreadingHTTPServer):
    """Serves DATA under any path; counts requests; can cut the first answers short."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str | None] = []
        self.cut = 0
        self.data = DATA
        self.pages: dict[str, str] = {}
        self.delay = 0.0

    def url(self, name: str = NAME) -> str:
        """Return the address of a file."""
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Understands Range."""

    server: Server

    def do_GET(self) -> None:
        """Answer with a page, or with the data from the wanted byte on."""
        page = self.server.pages.get(self.path)
        if page is not None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())
            return
        if "absent" in self.path:
            self.send_error(404)
            return
        if "moved" in self.path:
            self.send_response(302)
            self.send_header("Location", "/" + NAME)
            self.end_headers()
            return
        wanted = self.headers.get("Range")
        self.server.requests.append(wanted)
        time.sleep(self.server.delay)
        start = int(wanted.partition("=")[2].rstrip("-")) if wanted else 0
        body = self.server.data[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.cut > 0:
            self.server.cut -= 1
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)

    def log_message(self, *_arguments: Any) -> None:
        """Keep quiet."""


@pytest.fixture(autouse=True)
def no_pip_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "pip_settings", lambda: {})
    monkeypatch.setattr(fetch, "_logins", {})
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds, real=time.sleep: real(min(seconds, 0.05)))


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> fetch.Cache:
    return fetch.Cache(tmp_path / "cache")


def test_a_file_is_fetched_once_and_lies_under_its_checksum(server: Server, cache: fetch.Cache) -> None:
    first = fetch.ensure_url(server.url(), DIGEST, cache)
    again = fetch.ensure_url(server.url(), DIGEST.upper(), cache.root)
    assert first == again == cache.root / "files" / DIGEST / NAME
    assert first.read_bytes() == DATA
    assert len(server.requests) == 1
    assert not list((cache.root / "partial").iterdir())


def test_redirects_are_followed_and_percent_signs_are_names(server: Server, cache: fetch.Cache) -> None:
    url = server.url("moved/a%2Bb-1-py3-none-any.whl")
    assert fetch.ensure_url(url, DIGEST, cache).name == "a+b-1-py3-none-any.whl"


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(server: Server, cache: fetch.Cache) -> None:
    with pytest.raises(Problem) as refusal:
        fetch.ensure_url(server.url(), "0" * 64, cache, hash_setting="torch_jetpack_sha256")
    assert DIGEST in refusal.value.found
    assert "0" * 64 in refusal.value.expected and "torch_jetpack_sha256" in refusal.value.expected
    assert not list(cache.root.glob("files/*")) and not list((cache.root / "partial").iterdir())


def test_an_interrupted_download_goes_on_where_it_stopped(server: Server, cache: fetch.Cache) -> None:
    server.cut = 1
    assert fetch.ensure_url(server.url(), DIGEST, cache).read_bytes() == DATA
    assert server.requests[0] is None and server.requests[1] is not None


def test_a_partial_file_of_a_killed_run_is_used(server: Server, cache: fetch.Cache) -> None:
    server.cut = fetch.ATTEMPTS
    with pytest.raises(Problem):
        fetch.ensure_url(server.url(), DIGEST, cache)
    assert list((cache.root / "partial").iterdir())
    assert fetch.ensure_url(server.url(), DIGEST, cache).read_bytes() == DATA
    assert server.requests[-1] is not None


def test_unreachable_says_what_to_put_where(cache: fetch.Cache) -> None:
    with pytest.raises(Problem) as refusal:
        fetch.ensure_url("http://127.0.0.1:9/" + NAME, DIGEST, cache)
    assert str(cache.incoming) in refusal.value.next_step and NAME in refusal.value.next_step
    assert DIGEST in refusal.value.expected


def test_absent_on_the_server(server: Server, cache: fetch.Cache) -> None:
    with pytest.raises(Problem, match="404"):
        fetch.ensure_url(server.url("absent/" + NAME), DIGEST, cache)


def test_a_file_put_into_incoming_is_taken_where_its_checksum_fits(cache: fetch.Cache) -> None:
    cache.incoming.mkdir(parents=True)
    (cache.incoming / NAME).write_bytes(b"something else")
    assert cache.find(DIGEST, NAME) is None
    (cache.incoming / NAME).write_bytes(DATA)
    assert fetch.ensure_url("http://127.0.0.1:9/" + NAME, DIGEST, cache).read_bytes() == DATA


def test_a_damaged_cache_file_is_fetched_again(server: Server, cache: fetch.Cache) -> None:
    path = fetch.ensure_url(server.url(), DIGEST, cache)
    path.write_bytes(b"x" + DATA[1:])
    assert fetch.ensure_url(server.url(), DIGEST, cache).read_bytes() == DATA
    assert len(server.requests) == 2


def test_file_urls(tmp_path: Path, cache: fetch.Cache) -> None:
    source = tmp_path / "with space" / NAME
    source.parent.mkdir()
    source.write_bytes(DATA)
    assert fetch.ensure_url(source.as_uri(), DIGEST, cache).read_bytes() == DATA


# ---------------------------------------------------------------- trust on first use


def test_without_a_checksum_the_command_that_prints_it_is_named(server: Server, cache: fetch.Cache) -> None:
    wheel = {"name": "torch", "version": "1.0", "url": server.url(), "sha256": None}
    for call in (lambda: fetch.check_digest_known(wheel, cache), lambda: fetch.ensure_wheel(wheel, cache)):
        with pytest.raises(Problem) as refusal:
            call()
        assert f"curl -L '{server.url()}' | sha256sum" in refusal.value.next_step
        assert "torch_jetpack_sha256" in refusal.value.next_step
        assert "torch_jetpack_trust_on_first_use=true" in refusal.value.next_step
    assert server.requests == []


def test_trust_is_recorded_and_enforced_from_then_on(server: Server, cache: fetch.Cache) -> None:
    wheel = {"name": "torch", "version": "1.0", "url": server.url(), "sha256": None}
    found = fetch.ensure_wheel(wheel, cache, trust=True)
    assert (found.sha256, found.url, found.size) == (DIGEST, server.url(), len(DATA))
    record = json.loads((cache.root / "trust.json").read_text())
    assert record["files"][server.url()]["sha256"] == DIGEST

    fetch.check_digest_known(wheel, cache)  # known now, also without the setting
    assert fetch.find_wheel(wheel, cache) == found
    Path(found.path).unlink()
    server.data = b"another file"
    for trust in (False, True):
        with pytest.raises(Problem, match="sha256") as refusal:
            fetch.ensure_wheel(wheel, cache, trust=trust)
        assert "trust.json" in refusal.value.expected


def test_a_damaged_trust_file_is_not_taken_for_an_empty_one(server: Server, cache: fetch.Cache) -> None:
    cache.root.mkdir()
    (cache.root / "trust.json").write_text("{")
    with pytest.raises(Problem, match=r"trust\.json"):
        fetch.ensure_url(server.url(), None, cache, trust_on_first_use=True)


# ---------------------------------------------------------------- wheels by path, many processes, progress


def test_a_wheel_of_the_users_own(tmp_path: Path, cache: fetch.Cache) -> None:
    path = tmp_path / NAME
    wheel = {"name": "thing", "version": "1.0", "path": str(path), "sha256": None}
    assert fetch.find_wheel(wheel, cache) is None
    with pytest.raises(Problem, match="no file"):
        fetch.ensure_wheel(wheel, cache)
    path.write_bytes(DATA)
    assert fetch.ensure_wheel(wheel, cache).sha256 == DIGEST
    with pytest.raises(Problem, match=DIGEST):
        fetch.ensure_wheel(dict(wheel, sha256="0" * 64), cache)


def _fetch_in_child(url: str, root: str) -> None:
    fetch.ensure_url(url, DIGEST, root)


def test_many_processes_fetch_once(server: Server, cache: fetch.Cache) -> None:
    server.delay = 0.3
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_fetch_in_child, args=(server.url(), str(cache.root))) for _ in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0] * 8
    assert len(server.requests) == 1


def test_progress_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(fetch.time, "monotonic", lambda: now[0])
    said: list[str] = []
    tick = fetch.Ticker(said.append)
    for second in range(61):
        now[0] = second
        tick(f"at {second}")
    assert said == ["at 15", "at 30", "at 45", "at 60"]


# ---------------------------------------------------------------- the package index


@pytest.fixture
def index(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Serve an index with one project, and have pip configured with it."""
    settings = {"index-url": f"http://127.0.0.1:{server.server_port}/simple"}
    monkeypatch.setattr(fetch, "pip_settings", lambda: settings)
    files = [NAME, "thing-1.0-cp311-cp311-manylinux_2_17_x86_64.whl", "thing-1.0.tar.gz"]
    other = {files[1]: "1" * 64}
    links = "".join(f'<a href="/{name}#sha256={other.get(name, DIGEST)}">{name}</a>' for name in files)
    server.pages["/simple/thing/"] = f"<html><body>{links}</body></html>"
    return server


URL_WHEEL = {"name": "thing", "version": "1.0"}


def locked(digest: str = DIGEST, name: str = "thing") -> locks.Locked:
    """Return a line of a lock."""
    return locks.Locked(name, "1.0", (digest,), NAME, len(DATA))


def test_a_locked_wheel_comes_from_the_configured_index(index: Server, cache: fetch.Cache, tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(f"# {NAME} {len(DATA)}\nthing==1.0 --hash=sha256:{DIGEST}\n")
    assert fetch.find_locked(locked(), cache) is None
    (wheel,) = fetch.ensure_lock(lock, ORIN, cache)
    assert (wheel.name, wheel.version, wheel.filename, wheel.sha256, wheel.url) == ("thing", "1.0", NAME, DIGEST, "")
    assert fetch.find_locked(locked(), cache) == wheel
    fetch.ensure_lock(lock, ORIN, cache)
    assert len(index.requests) == 1


def test_the_address_of_an_index_file_is_kept_for_devices(index: Server, cache: fetch.Cache) -> None:
    assert fetch.ensure_locked(locked(), ORIN, cache).address == index.url()
    found = fetch.find_locked(locked(), cache)
    assert found is not None and (found.address, found.url) == (index.url(), "")
    # what came from nowhere has no address
    (cache.root / "origins" / DIGEST).unlink()
    found = fetch.find_locked(locked(), cache)
    assert found is not None and found.address == ""


@pytest.mark.parametrize("how", ["url", "index", "netrc"])
def test_an_address_that_needs_a_login_is_not_kept(
    index: Server, cache: fetch.Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    server = index.url().replace("http://", "http://ada:hunter2@").rpartition("/")[0]
    if how == "url":
        wheel = fetch.ensure_wheel({**URL_WHEEL, "url": f"{server}/{NAME}", "sha256": DIGEST}, cache)
    elif how == "index":
        monkeypatch.setattr(fetch, "pip_settings", lambda: {"index-url": f"{server}/simple"})
        wheel = fetch.ensure_locked(locked(), ORIN, cache)
    else:
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login ada password hunter2\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        wheel = fetch.ensure_wheel({**URL_WHEEL, "url": index.url(), "sha256": DIGEST}, cache)
    assert (Path(wheel.path).read_bytes(), wheel.address, cache.origin(DIGEST)) == (DATA, "", "")
    # a later run, which was told of no login, does not hand it on either
    monkeypatch.setattr(fetch, "_logins", {})
    found = fetch.find_wheel({**URL_WHEEL, "url": index.url(), "sha256": DIGEST}, cache)
    assert found is not None and found.address == ""


def test_the_address_of_a_wheel_that_the_settings_name(server: Server, cache: fetch.Cache, tmp_path: Path) -> None:
    wheel = {**URL_WHEEL, "url": server.url("moved.whl"), "sha256": DIGEST}
    assert fetch.ensure_wheel(wheel, cache).address == server.url("moved.whl")
    # as it was cached before addresses were kept
    (cache.root / "origins" / DIGEST).unlink()
    assert fetch.ensure_wheel(wheel, cache).address == server.url("moved.whl")
    fetch.use_logins(server.url("x").replace("http://", "http://ada:hunter2@"))
    assert fetch.ensure_wheel(wheel, cache).address == ""
    (tmp_path / NAME).write_bytes(DATA)
    for url in (f"file://{tmp_path / NAME}", server.url(NAME + "?token=hunter2")):
        other = fetch.Cache(tmp_path / "other")
        assert fetch.ensure_wheel({**URL_WHEEL, "url": url, "sha256": DIGEST}, other).address == ""
    assert fetch.ensure_wheel({**URL_WHEEL, "path": str(tmp_path / NAME)}, cache).address == ""


def test_an_index_with_other_files_only_is_a_problem(index: Server, cache: fetch.Cache) -> None:
    with pytest.raises(Problem) as refusal:
        fetch.ensure_locked(locked("2" * 64), ORIN, cache)
    assert NAME in refusal.value.expected and "2" * 64 in refusal.value.expected
    assert index.requests == []


def test_an_index_without_the_project(index: Server, cache: fetch.Cache) -> None:
    with pytest.raises(Problem, match="nothing"):
        fetch.ensure_locked(locked(name="nothing"), ORIN, cache)


def test_an_sdist_by_its_name(index: Server, cache: fetch.Cache) -> None:
    path = fetch.ensure_index_file("thing", "thing-1.0.tar.gz", DIGEST, cache)
    assert path.name == "thing-1.0.tar.gz" and path.read_bytes() == DATA
    with pytest.raises(Problem, match="no file named"):
        fetch.ensure_index_file("thing", "thing-2.0.tar.gz", DIGEST, cache)


def test_find_wheel_link_takes_what_fits(index: Server) -> None:
    assert fetch.find_wheel_link("thing", "1.0", ORIN) == fetch.IndexFile(NAME, index.url(), DIGEST, len(DATA))
    better = fetch.find_wheel_link("thing", "1.0", Target("x86_64", "3.11", "2.36"))
    assert better.filename.endswith("x86_64.whl")


def test_pip_configuration_is_read_as_pip_ranks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = "\n".join(
        [
            ":env:.find-links='/env'",
            "download.index-url='https://download.example'",
            "global.extra-index-url='file:///a\\nfile:///b'",
            "global.find-links='/global'",
            "global.index-url='https://global.example'",
            "install.index-url='https://install.example'",
        ]
    )

    class Done:
        returncode, stdout, stderr = 0, printed, ""

    monkeypatch.undo()
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_arguments, **_options: Done)
    fetch.pip_settings.cache_clear()
    try:
        found = fetch.pip_settings()
    finally:
        fetch.pip_settings.cache_clear()
    assert found == {
        "find-links": "/env",
        "index-url": "https://download.example",
        "extra-index-url": "file:///a\nfile:///b",
    }


# ---------------------------------------------------------------- names and passwords


@pytest.mark.parametrize("name", ["..%2F..%2Fa.whl", "%2Fetc%2Fa.whl", "x/../a.whl", "a.whl?x=../b", "..%2f.%2fa.whl"])
def test_the_name_at_the_end_of_an_url_is_one_of_a_file(name: str) -> None:
    assert fetch.filename_of("https://h/" + name) == "a.whl"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "a\0b", "-a", ".a", "a" * 181, "ü" * 91, "a\nb", 7, None]
)
def test_what_is_no_file_name_is_kept_out_of_the_cache(tmp_path: Path, name: Any) -> None:
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(Problem, match="names a file"):
        fetch.Cache(tmp_path / "cache").take(tmp_path / "x", "a" * 64, name)
    assert (tmp_path / "x").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("url", ["https://h/", "https://h/..", "https://h/a%5Cb", "file:///tmp/-x"])
def test_an_url_without_a_file_name_is_a_named_problem(tmp_path: Path, url: str) -> None:
    with pytest.raises(Problem, match="names a file"):
        fetch.ensure_url(url, "a" * 64, tmp_path)


def test_a_checksum_that_is_none_is_a_named_problem(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"the sha256 of https://h/a.whl is '\.\./"):
        fetch.ensure_url("https://h/a.whl", "../" * 20, tmp_path)


def test_a_checksum_that_was_accepted_holds_with_and_without_a_password(tmp_path: Path) -> None:
    cache = fetch.Cache(tmp_path)
    cache.trust("https://ada:secret@h/a.whl", "a" * 64, 4)
    assert "secret" not in (tmp_path / "trust.json").read_text()
    for url in ("https://h/a.whl", "https://ada:secret@h/a.whl", "https://bob@h/a.whl"):
        assert fetch.known_sha256(url, None, cache) == "a" * 64
    # an earlier version wrote the URL as it stood
    (tmp_path / "trust.json").write_text((tmp_path / "trust.json").read_text().replace("//h", "//ada:secret@h"))
    assert fetch.known_sha256("https://h/a.whl", None, cache) == "a" * 64
    cache.trust("https://h/b.whl", "b" * 64, 4)
    assert "secret" not in (tmp_path / "trust.json").read_text()
