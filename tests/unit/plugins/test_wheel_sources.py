"""Other sources of wheels: the user's order, checksums, what does not fit, and servers that fail."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.versions import Target
from ansible_collections.jetson.mamba.plugins.plugin_utils import fetch, wheel_sources

DATA = bytes(range(256)) * 400
DIGEST = hashlib.sha256(DATA).hexdigest()
NAME = "causal_conv1d-1.6.0-cp310-cp310-linux_aarch64.whl"
ORIN = Target("aarch64", "3.10", "2.35")
CLASS = "aarch64-glibc2.35-cu12.6-cp310-torch2.5.0a0+872d972e41.nv24.8-cxx11-sm87"
SDIST = "causal_conv1d-1.6.0.tar.gz"


class Server(http.server.ThreadingHTTPServer):
    """Serves pages by their path, and DATA below /files/; can cut answers short, refuse or ask for a password."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, tuple[str, str]] = {}
        self.requests: list[str] = []
        self.cut = 0
        self.error = 0
        self.password = ""
        self.redirects: dict[str, str] = {}

    def url(self, path: str = "simple") -> str:
        """Return an address of this server."""
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def index(self, *links: str, kind: str = "text/html") -> str:
        """Serve a project page with these links; returns the index's URL."""
        body = "".join(links) if kind != "text/html" else f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>"
        self.pages["/simple/causal-conv1d/"] = (kind, body)
        return self.url()


class Handler(http.server.BaseHTTPRequestHandler):
    """Understands Range."""

    server: Server

    def do_GET(self) -> None:
        """Answer."""
        self.server.requests.append(self.path)
        if self.server.error:
            self.send_error(self.server.error)
            return
        if self.path in self.server.redirects:
            self.send_response(302)
            self.send_header("Location", self.server.redirects[self.path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        wanted = "Basic " + base64.b64encode(self.server.password.encode()).decode()
        if self.server.password and self.headers.get("Authorization") != wanted:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="wheels"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path in self.server.pages:
            kind, text = self.server.pages[self.path]
            self._answer(200, text.encode(), kind)
        elif self.path.startswith("/files/"):
            asked = self.headers.get("Range")
            start = int(asked.partition("=")[2].rstrip("-")) if asked else 0
            self._answer(206 if asked else 200, DATA[start:], "application/octet-stream")
        else:
            self.send_error(404)

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.cut > 0 and self.path.startswith("/files/"):
            self.server.cut -= 1
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)

    def log_message(self, *_arguments: Any) -> None:
        """Keep quiet."""


def link(name: str = NAME, digest: str | None = DIGEST, attributes: str = "") -> str:
    """Return a link of a project page."""
    fragment = f"#sha256={digest}" if digest else ""
    return f'<a href="../../files/{name.replace("+", "%2B")}{fragment}"{attributes}>{name}</a>'


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


class Asking:
    """Asks sources with a cache of its own; keeps what was said."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.said: list[str] = []

    def __call__(self, *sources: dict[str, str], **changes: Any) -> wheel_sources.Search:
        """Look for causal_conv1d 1.6.0 for an Orin."""
        options: dict[str, Any] = {"version": "1.6.0", "pins": {}, "trust": False, "target": ORIN, **changes}
        keywords = {name: options.pop(name) for name in ("class_id", "accept") if name in options}
        return wheel_sources.find(
            list(sources),
            "causal_conv1d",
            "causal-conv1d",
            options["version"],
            options["target"],
            options["pins"],
            options["trust"],
            self.cache,
            self.said.append,
            **keywords,
        )


@pytest.fixture
def ask(tmp_path: Path) -> Asking:
    return Asking(tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "archive"
    made.mkdir()
    (made / NAME).write_bytes(DATA)
    return made


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ("folder", "is 'folder'"),
        ({"folder": "x"}, "wheelhouse_sources is"),
        (["x"], r"wheelhouse_sources\[0\] is 'x'"),
        ([{"folder": "x"}, {}], r"wheelhouse_sources\[1\]"),
        ([{"folder": "x", "index": "https://x"}], r"wheelhouse_sources\[0\]"),
        ([{"foldr": "x"}], "did you mean folder"),
        ([{"find-links": "x"}], "did you mean find_links"),
        ([{"folder": ""}], r"\[0\]\.folder"),
        ([{"folder": 3}], r"\[0\]\.folder"),
        ([{"index": "x/y"}], r"\[0\]\.index is x/y"),
        ([{"index": "ftp://x/y"}], r"\[0\]\.index"),
        ([{"find_links": "ftp://x/y"}], r"\[0\]\.find_links"),
        ([{"folder": "https://x/y"}], r"\[0\]\.folder"),
    ],
)
def test_a_setting_that_means_nothing_is_named(sources: Any, found: str) -> None:
    with pytest.raises(Problem, match=found):
        wheel_sources.check_sources(sources)


@pytest.mark.parametrize("pins", [["x"], {NAME: "abc"}, {NAME: None}])
def test_a_pin_is_a_sha256(pins: Any) -> None:
    with pytest.raises(Problem, match="wheelhouse_sha256"):
        wheel_sources.check_sources([], pins)


def test_right_settings_pass() -> None:
    wheel_sources.check_sources(
        [{"folder": "~/x"}, {"index": "https://x/simple"}, {"find_links": "https://x/"}, {"find_links": "wheels"}],
        {NAME: DIGEST.upper()},
    )
    wheel_sources.check_sources([])


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("kind", ["folder", "find_links"])
def test_an_archive_folder_is_used_in_place(ask: Asking, folder: Path, kind: str) -> None:
    offer = ask({kind: str(folder)}).offer
    assert offer is not None and offer.path == folder / NAME
    assert (offer.filename, offer.sha256) == (NAME, DIGEST)
    assert offer.origin == f"{kind.replace('_', '-')} {folder}"
    assert not ask.cache.exists() and ask.said == []


def test_no_sources_no_offer(ask: Asking) -> None:
    assert ask() == (None, [])


def test_what_does_not_fit_is_named(ask: Asking, folder: Path) -> None:
    (folder / NAME).unlink()
    for name in (
        "causal_conv1d-1.6.0-cp311-cp311-linux_aarch64.whl",
        "causal_conv1d-1.6.0-cp310-cp310-linux_x86_64.whl",
        "causal_conv1d-1.5.2-cp310-cp310-linux_aarch64.whl",
        "mamba_ssm-1.6.0-cp310-cp310-linux_aarch64.whl",
        SDIST,
        "notes.txt",
    ):
        (folder / name).write_bytes(DATA)
    search = ask({"folder": str(folder)})
    assert search.offer is None
    text = "\n".join(search.reasons)
    assert "cp311-cp311-linux_aarch64.whl: it is for cp311-cp311" in text
    assert "linux_x86_64.whl: it is for linux_x86_64" in text
    assert "no wheel of causal_conv1d 1.6.0 for Python 3.10 on aarch64 with glibc 2.35 (it has 1.5.2)" in text
    assert "mamba" not in text and "notes" not in text and "tar.gz" not in text


def test_a_local_version_counts_as_the_version(ask: Asking, folder: Path) -> None:
    local = folder / "causal_conv1d-1.6.0+cu126torch2.5-cp310-cp310-linux_aarch64.whl"
    (folder / NAME).rename(local)
    offer = ask({"folder": str(folder)}).offer
    assert offer is not None and offer.path == local
    (folder / NAME).write_bytes(DATA)
    offer = ask({"folder": str(folder)}).offer
    assert offer is not None and offer.path == folder / NAME


@pytest.mark.parametrize(
    ("local", "reason"),
    [
        ("cu12torch2.5cxx11abiTRUE", None),
        ("cu126torch2.5", None),
        ("mine", None),
        ("cu118torch2.5", "CUDA 118"),
        ("cu128torch2.5", "CUDA 128"),
        ("cu12torch2.8cxx11abiTRUE", "torch 2.8"),
        ("cu12torch2.5cxx11abiFALSE", "C++ ABI"),
    ],
)
def test_a_version_that_names_another_torch_is_passed_over(
    ask: Asking, folder: Path, local: str, reason: str | None
) -> None:
    (folder / NAME).rename(folder / f"causal_conv1d-1.6.0+{local}-cp310-cp310-linux_aarch64.whl")
    assert ask({"folder": str(folder)}).offer is not None
    search = ask({"folder": str(folder)}, class_id=CLASS)
    assert (search.offer is None) is bool(reason) and (not reason or reason in search.reasons[0])


def test_the_first_source_in_the_users_order_wins(ask: Asking, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / NAME).write_bytes(b"other")
    for first, second in [(folder, other), (other, folder)]:
        offer = ask({"folder": str(first)}, {"folder": str(second)}).offer
        assert offer is not None and offer.path == first / NAME


def test_a_folder_that_is_not_there_is_said_and_skipped(ask: Asking, folder: Path) -> None:
    search = ask({"folder": "/nowhere"}, {"folder": str(folder)})
    assert search.offer is not None and search.offer.path == folder / NAME
    assert len(ask.said) == 1 and "folder /nowhere is skipped" in ask.said[0]
    assert search.reasons == ["folder /nowhere: No such file or directory (/nowhere)"]


def test_a_pinned_file_must_be_that_file(ask: Asking, folder: Path) -> None:
    assert ask({"folder": str(folder)}, pins={NAME: DIGEST.upper()}).offer is not None
    with pytest.raises(Problem, match=DIGEST) as refusal:
        ask({"folder": str(folder)}, pins={NAME: "0" * 64})
    assert "wheelhouse_sha256" in refusal.value.expected


def test_an_offer_that_is_not_accepted_gives_way_to_the_next(ask: Asking, folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / NAME).write_bytes(b"x86")

    def accept(offer: wheel_sources.Offer) -> None:
        if offer.path.read_bytes() == b"x86":
            raise Problem("it holds x86-64 code", "aarch64", "take another")

    search = ask({"folder": str(trap)}, {"folder": str(folder)}, accept=accept)
    assert search.offer is not None and search.offer.path == folder / NAME
    assert search.reasons == [f"folder {trap}: it holds x86-64 code"] and "x86-64" in ask.said[0]


# ---------------------------------------------------------------- indexes and pages


@pytest.mark.parametrize("slash", ["", "/"])
def test_an_index_with_hashes(ask: Asking, server: Server, slash: str) -> None:
    url = server.index(link(SDIST, "1" * 64), link("causal_conv1d-1.5.2-cp310-cp310-linux_aarch64.whl"), link())
    search = ask({"index": url + slash})
    assert search.offer is not None and search.offer.path.read_bytes() == DATA
    assert search.offer.path.is_relative_to(ask.cache) and search.offer.path.name == NAME
    assert search.offer.sha256 == DIGEST and search.offer.origin == f"index {url}{slash}"
    assert ask.said == [f"fetching {NAME} from index {url}{slash}"]
    fetched = server.requests.count(f"/files/{NAME}")
    assert ask({"index": url}).offer is not None
    assert server.requests.count(f"/files/{NAME}") == fetched == 1
    assert not [path for path in server.requests if SDIST in path]


def test_an_index_in_json(ask: Asking, server: Server) -> None:
    files = [
        {"filename": NAME, "url": f"../../files/{NAME}", "hashes": {"sha256": DIGEST}, "yanked": False},
        {"filename": SDIST, "url": f"../../files/{SDIST}", "hashes": {"sha256": DIGEST}},
    ]
    kind = "application/vnd.pypi.simple.v1+json"
    url = server.index(json.dumps({"meta": {"api-version": "1.0"}, "files": files}), kind=kind)
    offer = ask({"index": url}).offer
    assert offer is not None and offer.sha256 == DIGEST


def test_a_find_links_page_and_a_direct_link(ask: Asking, server: Server, tmp_path: Path) -> None:
    server.pages["/wheels/a/"] = ("text/html", link())
    assert ask({"find_links": server.url("wheels/a/")}).offer is not None
    assert ask({"find_links": server.url(f"files/{NAME}")}, pins={NAME: DIGEST}).offer is not None
    page = tmp_path / "page.html"
    page.write_text(f'<a href="{server.url(f"files/{NAME}")}#sha256={DIGEST}">wheel</a>')
    assert ask({"find_links": str(page)}).offer is not None
    assert ask({"find_links": page.as_uri()}).offer is not None


def test_only_a_source_distribution_is_nothing(ask: Asking, server: Server) -> None:
    search = ask({"index": server.index(link(SDIST))})
    assert search.offer is None and "no wheel of causal_conv1d 1.6.0" in search.reasons[0]
    assert not [path for path in server.requests if path.startswith("/files")]


def test_a_yanked_wheel_is_not_taken(ask: Asking, server: Server) -> None:
    assert ask({"index": server.index(link(attributes=' data-yanked="broken"'))}).offer is None


def test_without_a_hash_the_command_that_prints_it_is_named(ask: Asking, server: Server) -> None:
    url = server.index(link(digest=None))
    with pytest.raises(Problem) as refusal:
        ask({"index": url})
    address = server.url(f"files/{NAME}")
    assert f"curl -L '{address}' | sha256sum" in refusal.value.next_step
    assert f"wheelhouse_sha256 ({NAME}: …)" in refusal.value.next_step
    assert "wheelhouse_trust_on_first_use=true" in refusal.value.next_step
    assert f"/files/{NAME}" not in server.requests
    assert ask({"index": url}, pins={NAME: DIGEST}).offer is not None


def test_trust_on_first_use_is_recorded_and_enforced(ask: Asking, server: Server) -> None:
    url = server.index(link(digest=None))
    offer = ask({"index": url}, trust=True).offer
    assert offer is not None and offer.sha256 == DIGEST
    assert ask({"index": url}).offer == offer  # known from now on, without the setting
    record = json.loads((ask.cache / "trust.json").read_text())
    record["files"][server.url(f"files/{NAME}")]["sha256"] = "2" * 64
    (ask.cache / "trust.json").write_text(json.dumps(record))
    with pytest.raises(Problem, match=DIGEST):
        ask({"index": url}, trust=True)


def test_an_index_and_a_pin_that_disagree(ask: Asking, server: Server) -> None:
    with pytest.raises(Problem) as refusal:
        ask({"index": server.index(link())}, pins={NAME: "3" * 64})
    assert DIGEST in refusal.value.found and "3" * 64 in refusal.value.expected
    assert f"/files/{NAME}" not in server.requests


def test_a_file_that_is_not_what_its_index_says_ends_the_run(ask: Asking, server: Server, folder: Path) -> None:
    with pytest.raises(Problem, match=DIGEST):
        ask({"index": server.index(link(digest="4" * 64))}, {"folder": str(folder)})


# ---------------------------------------------------------------- servers that fail


def test_a_cut_download_goes_on(ask: Asking, server: Server) -> None:
    url = server.index(link())
    server.cut = 1
    offer = ask({"index": url}).offer
    assert offer is not None and offer.path.read_bytes() == DATA
    assert server.requests.count(f"/files/{NAME}") == 2


def test_a_server_that_always_dies_mid_way_is_said_and_skipped(ask: Asking, server: Server, folder: Path) -> None:
    url = server.index(link())
    server.cut = 100
    search = ask({"index": url}, {"folder": str(folder)})
    assert search.offer is not None and search.offer.path == folder / NAME
    assert "is skipped" in ask.said[-1] and "cannot be fetched" in search.reasons[0]


def test_a_server_that_is_not_there_is_said_and_skipped(ask: Asking, server: Server, folder: Path) -> None:
    gone = {"index": "http://127.0.0.1:9/simple"}
    search = ask(gone, {"folder": str(folder)})
    assert search.offer is not None and "index http://127.0.0.1:9/simple is skipped" in ask.said[0]
    assert ask(gone).offer is None


@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_server_that_refuses_is_said_with_its_words(ask: Asking, server: Server, status: int) -> None:
    server.error = status
    search = ask({"index": server.url()})
    assert search.offer is None and str(status) in search.reasons[0] and str(status) in ask.said[0]


def test_an_index_without_the_project_is_no_failure(ask: Asking, server: Server) -> None:
    search = ask({"index": server.url()})
    assert search.offer is None and ask.said == []
    assert search.reasons == [
        f"index {server.url()}: no wheel of causal_conv1d 1.6.0 for Python 3.10 on aarch64 with glibc 2.35"
    ]


@pytest.mark.parametrize("kind", ["application/vnd.pypi.simple.v1+json", "application/octet-stream"])
def test_a_page_that_is_none(ask: Asking, server: Server, kind: str) -> None:
    search = ask({"index": server.index("<html>", kind=kind)})
    assert search.offer is None and len(ask.said) == 1


def test_plain_http_is_trusted_only_where_pip_trusts_it(ask: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    search = ask({"index": "http://devpi.example/simple"})
    assert search.offer is None and "trusted-host devpi.example" in search.reasons[0]


def test_a_password_is_used_and_never_shown(ask: Asking, server: Server, folder: Path) -> None:
    url = server.index(link())
    server.password = "ada:secret"
    refused = ask({"index": url})
    assert refused.offer is None and "401" in refused.reasons[0]
    search = ask({"index": url.replace("://", "://ada:secret@")})
    assert search.offer is not None and search.offer.path.read_bytes() == DATA
    server.cut = 100
    (ask.cache / "files" / DIGEST / NAME).unlink()
    failed = ask({"index": url.replace("://", "://ada:secret@")})
    assert failed.offer is None
    texts = [*ask.said, *search.reasons, *failed.reasons, search.offer.origin]
    assert not [text for text in texts if "secret" in text] and "***@127.0.0.1" in search.offer.origin


def test_a_password_that_the_settings_named_is_used_for_an_url_without(ask: Asking, server: Server) -> None:
    url = server.index(link())
    server.password = "ada:sec@ret"
    settings = {"wheelhouse_sources": [{"index": url.replace("://", "://ada:sec%40ret@")}]}
    fetch.use_logins_of(settings, lambda value: value)
    search = ask({"index": url})
    assert search.offer is not None and search.offer.path.read_bytes() == DATA


def test_a_password_of_netrc_is_used_for_pages_and_files(
    ask: Asking, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login ada password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.password = "ada:secret"
    search = ask({"index": server.index(link())})
    assert search.offer is not None and search.offer.path.read_bytes() == DATA


def test_no_file_keeps_a_password(ask: Asking, server: Server) -> None:
    url = server.index(link(digest=None)).replace("://", "://ada:secret@")
    server.password = "ada:secret"
    assert ask({"index": url}, trust=True).offer is not None
    for path in ask.cache.rglob("*"):
        assert "secret" not in str(path) and not (path.is_file() and b"secret" in path.read_bytes())
    recorded = json.loads((ask.cache / "trust.json").read_text())["files"]
    assert [name.partition("/files/")[0] for name in recorded] == [server.url("").rstrip("/")]


@pytest.mark.parametrize("value", ["https://alice:pw#1@host/simple", "https://alice:pw/1@host/simple"])
def test_a_password_that_breaks_its_url_is_not_shown(value: str) -> None:
    with pytest.raises(Problem, match="cannot be read") as caught:
        wheel_sources.check_sources([{"index": value}])
    assert "pw" not in caught.value.render() and "%2F" in caught.value.expected


# ---------------------------------------------------------------- servers that mean no good


@pytest.mark.parametrize("way", ["..%2F..%2F..%2F", "%2E%2E/", "%2Ftmp%2F"])
def test_no_file_name_leads_out_of_the_cache(ask: Asking, server: Server, way: str) -> None:
    search = ask({"index": server.index(f'<a href="/files/{way}{NAME}#sha256={DIGEST}">x</a>')})
    if search.offer is not None:
        assert search.offer.path == ask.cache / "files" / DIGEST / NAME
    assert {path.parent.parent for path in ask.cache.parent.rglob(NAME)} <= {ask.cache / "files"}


@pytest.mark.parametrize("name", ["..%5C" + NAME, "-" + NAME, "." + NAME, "%00" + NAME, "a%0A" + NAME])
def test_what_is_no_file_name_is_refused(ask: Asking, server: Server, name: str) -> None:
    search = ask({"index": server.index(f'<a href="/files/{name}#sha256={DIGEST}">x</a>')})
    assert search.offer is None and "is no plain file name" in ask.said[0] and "\n" not in ask.said[0]


def test_a_name_that_is_too_long_for_a_file_system(ask: Asking, server: Server) -> None:
    long = NAME.replace("1.6.0", "1.6.0+" + "a" * 200)
    assert ask({"index": server.index(link(long))}).offer is None
    assert "is no plain file name" in ask.said[0] and len(ask.said[0]) < 400


def test_a_remote_page_leads_to_no_file_of_this_machine(ask: Asking, server: Server, folder: Path) -> None:
    search = ask({"index": server.index(f'<a href="{(folder / NAME).as_uri()}">x</a>')})
    assert search.offer is None and "offered as a file: URL" in search.reasons[0] and "not from" in ask.said[0]
    page = folder / "page.html"
    page.write_text(f'<a href="{(folder / NAME).as_uri()}">x</a>')
    assert ask({"find_links": str(page)}).offer is not None, "a page of this machine may"


def test_a_server_redirects_to_no_file_of_this_machine(ask: Asking, server: Server, folder: Path) -> None:
    (folder / "page.html").write_text("root:x:0:0")
    server.redirects = {"/simple/causal-conv1d/": (folder / "page.html").as_uri()}
    search = ask({"index": server.url()})
    assert search.offer is None and "it leads to file:" in search.reasons[0]


JSON = "application/vnd.pypi.simple.v1+json"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"files": [{"filename": 3, "url": 5}]}, "its page cannot be read"),
        ({"files": 7}, "its page cannot be read"),
        ([1], "its page cannot be read"),
        ({"files": [{"filename": NAME, "url": "/files/" + NAME, "hashes": 4}]}, "its page cannot be read"),
        ({"files": [{"filename": NAME, "url": "/files/" + NAME, "hashes": {"sha256": 5}}]}, "its sha256 is given as 5"),
        (
            {"files": [{"filename": NAME, "url": "/files/" + NAME, "hashes": {"sha256": "../../../etc"}}]},
            "its sha256 is given as '../../../etc'",
        ),
    ],
)
def test_what_an_index_garbles_is_said_and_the_next_source_is_asked(
    ask: Asking, server: Server, folder: Path, body: Any, words: str
) -> None:
    index = server.index(json.dumps(body), kind=JSON)
    search = ask({"index": index}, {"folder": str(folder)})
    assert words in ask.said[0] and search.offer is not None and search.offer.origin == f"folder {folder}"
