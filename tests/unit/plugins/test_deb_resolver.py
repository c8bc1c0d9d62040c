"""The controller's half: what a device needs is worked out by apt itself, in a private root, and kept."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import apt_root, debs
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.plugin_utils import deb_resolver, fetch, transfer
from ansible_collections.jetson.mamba.plugins.plugin_utils.deb_resolver import Resolver

with_apt = pytest.mark.skipif(
    not (shutil.which("apt-get") and shutil.which("dpkg-deb")), reason="this machine has no apt-get"
)
STATUS = """\
Package: nvidia-l4t-core
Status: install ok installed
Architecture: arm64
Version: 36.4.7-1

Package: kept
Status: hold ok installed
Architecture: arm64
Version: 1.0
"""
# name, version, further fields
PACKAGES = (
    ("g++", "4:12.2", "Depends: gcc (>= 4:12)\nRecommends: manpages"),
    ("gcc", "4:12.2", ""),
    ("manpages", "1.0", ""),
    ("needs-l4t", "1.0", "Depends: nvidia-l4t-core (>= 36.5)"),
    ("nvidia-l4t-core", "36.5.0-1", ""),
    ("needs-kept", "1.0", "Depends: kept (>= 2)"),
    ("kept", "2.0", ""),
    ("conflicter", "1.0", "Conflicts: nvidia-l4t-core"),
    ("unmeetable", "1.0", "Depends: nowhere"),
)


def make_repository(folder: Path, architecture: str = "arm64") -> str:
    """Write a repository whose packages are any bytes, and return apt's line for it."""
    folder.mkdir()
    index = []
    for name, version, fields in PACKAGES:
        filename = f"{name}_{version.replace(':', '%3a')}_{architecture}.deb"
        data = f"{name} {version}".encode()
        (folder / filename).write_bytes(data)
        lines = [f"Package: {name}", f"Version: {version}", f"Architecture: {architecture}", fields]
        lines += [f"Filename: ./{filename}", f"Size: {len(data)}", f"SHA256: {hashlib.sha256(data).hexdigest()}"]
        index.append("\n".join(line for line in lines if line) + "\n")
    (folder / "Packages").write_text("\n".join(index))
    return f"deb [trusted=yes] file:{folder} ./"


def describe(status: str = STATUS, **changes: Any) -> dict[str, Any]:
    text = debs.canonical_status(debs.stanzas(status))
    empty: dict[str, Any] = {"keys": {}, "trusted": {}, "preferences": "", "sources": [], "unread": [], "foreign": []}
    return {"architecture": "arm64", "status": text, **empty, **changes}


def wish(*names: str) -> list[debs.Wish]:
    return [debs.parse_wish(name) for name in names]


@pytest.fixture
def cache(tmp_path: Path) -> fetch.Cache:
    return fetch.Cache(tmp_path / "cache")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def resolver(cache: fetch.Cache, said: list[str]) -> Resolver:
    return Resolver(cache, said.append)


@pytest.fixture
def line(tmp_path: Path) -> str:
    return make_repository(tmp_path / "repository")


@with_apt
def test_what_is_needed_is_found_for_another_architecture_and_fetched(resolver: Resolver, line: str) -> None:
    resolution, paths = resolver.ensure(describe(), wish("g++"), [line])
    assert [(row["name"], row["version"], row["arch"], row["old"]) for row in resolution.packages] == [
        ("g++", "4:12.2", "arm64", ""),
        ("gcc", "4:12.2", "arm64", ""),
    ]
    assert [path.read_text() for path in paths] == ["g++ 4:12.2", "gcc 4:12.2"]
    assert paths[0].name == "g++_4%3a12.2_arm64.deb"


@with_apt
def test_the_next_device_in_that_state_gets_the_same_without_apt(
    resolver: Resolver, line: str, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, paths = resolver.ensure(describe(), wish("gcc", "g++"), [line])
    assert len(said) == 1
    shutil.rmtree(tmp_path / "repository")
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    second, again = resolver.ensure(describe(), wish("g++", "gcc"), [line])
    assert second.reused
    assert not first.reused
    assert (second.packages, again) == (first.packages, paths)
    assert len(said) == 1
    data = json.loads(first.lock.read_text())
    assert data["names"] == ["g++", "gcc"]
    assert data["packages"] == first.packages


@with_apt
@pytest.mark.parametrize(
    "changes",
    [
        {"status": describe(STATUS.replace("36.4.7", "36.4.8"))["status"]},
        {"preferences": "Package: *\nPin: release *\nPin-Priority: 500\n"},
        {"architecture": "amd64"},
    ],
)
def test_a_device_in_another_state_is_worked_out_anew(resolver: Resolver, line: str, changes: dict[str, Any]) -> None:
    first = resolver.resolve(describe(), wish("gcc"), [line])
    try:
        second = resolver.resolve({**describe(), **changes}, wish("gcc"), [line])
    except Problem as problem:
        # the repository is for arm64, and the first answer is not taken for another architecture
        assert changes.get("architecture") == "amd64"
        assert problem.found.startswith("no apt source has gcc")
        return
    assert second.lock != first.lock


@with_apt
def test_a_damaged_lock_is_worked_out_anew(resolver: Resolver, line: str) -> None:
    first = resolver.resolve(describe(), wish("gcc"), [line])
    for text in ("{", json.dumps({"schema": 1, "packages": [{"name": "gcc"}]}), json.dumps({"schema": 2})):
        first.lock.write_text(text)
        again = resolver.resolve(describe(), wish("gcc"), [line])
        assert not again.reused
        assert again.packages == first.packages


@with_apt
def test_what_cannot_be_fetched_any_more_is_worked_out_anew(
    resolver: Resolver, line: str, said: list[str], tmp_path: Path
) -> None:
    resolver.resolve(describe(), wish("gcc"), [line])
    folder = tmp_path / "repository"
    (folder / "gcc_4%3a12.2_arm64.deb").unlink()
    data = b"the successor"
    (folder / "gcc_5.deb").write_bytes(data)
    index = f"Package: gcc\nVersion: 5\nArchitecture: arm64\nFilename: ./gcc_5.deb\nSize: {len(data)}\n"
    (folder / "Packages").write_text(index + f"SHA256: {hashlib.sha256(data).hexdigest()}\n")
    resolution, paths = resolver.ensure(describe(), wish("gcc"), [line])
    assert resolution.packages[0]["version"] == "5"
    assert paths[0].read_bytes() == data
    assert any("cannot be fetched any more" in text for text in said)


@with_apt
def test_a_file_that_is_not_what_the_index_says_is_refused(resolver: Resolver, line: str, tmp_path: Path) -> None:
    (tmp_path / "repository" / "gcc_4%3a12.2_arm64.deb").write_bytes(b"gcc 4:12.3")
    with pytest.raises(Problem, match="sha256"):
        resolver.ensure(describe(), wish("gcc"), [line])


@with_apt
@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("needs-l4t", "nvidia-l4t-core 36.4.7-1 -> 36.5.0-1 (part of L4T)"),
        ("needs-kept", "kept (>= 2) but 1.0 is to be installed"),  # apt itself heeds a hold of a dependency
        ("conflicter", "nvidia-l4t-core 36.4.7-1 removed"),
    ],
)
def test_a_change_that_nobody_asked_for_is_refused(resolver: Resolver, line: str, name: str, named: str) -> None:
    with pytest.raises(Problem) as caught:
        resolver.resolve(describe(), wish(name), [line])
    assert named in caught.value.found
    assert not list((resolver._cache.root / "debs").glob("*.json"))


@with_apt
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("nowhere-to-be-found", "no apt source has nowhere-to-be-found"),
        ("gc.", "no apt source has gc."),
        ("gcc=9", "apt finds no way to install g++ gcc=9: Version '9' for 'gcc' was not found"),
    ],
)
def test_what_no_source_has_is_named(resolver: Resolver, line: str, name: str, found: str) -> None:
    """And a name is no pattern."""
    with pytest.raises(Problem) as caught:
        resolver.resolve(describe(), wish("g++", name), [line])
    assert caught.value.found == found


@with_apt
def test_a_dependency_that_nothing_meets_is_apts_to_explain(resolver: Resolver, line: str) -> None:
    with pytest.raises(Problem, match="nowhere"):
        resolver.resolve(describe(), wish("unmeetable"), [line])


@with_apt
def test_a_cache_whose_path_has_a_blank_serves_apt_too(tmp_path: Path, line: str) -> None:
    resolver = Resolver(fetch.Cache(tmp_path / "my cache"), lambda _text: None)
    assert len(resolver.resolve(describe(), wish("g++"), [line]).packages) == 2


@with_apt
def test_sources_that_are_not_signed_are_not_believed(resolver: Resolver, line: str) -> None:
    with pytest.raises(Problem, match="no apt source has gcc"):
        resolver.resolve(describe(), wish("gcc"), [line.replace("[trusted=yes] ", "")])


def test_without_apt_the_other_ways_are_named(resolver: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(Problem) as caught:
        resolver.resolve(describe(), wish("g++", "python3-dev"), ["deb http://a/ x main"])
    assert "g++, python3-dev" in caught.value.found
    assert "no apt-get" in caught.value.found
    assert "debian_packages_source=folder" in caught.value.next_step
    assert "debian_packages_source=device" in caught.value.next_step


def test_sources_of_the_device_and_the_users_own_are_put_together() -> None:
    own = debs.parse_one_line("deb http://ports/ jammy main\ndeb file:/var/cuda /\n")
    mine = "deb [signed-by=/k.gpg] https://nvidia/ /"
    sources, dropped, logins = deb_resolver._sources(describe(sources=own), [debs.DEVICE, mine])
    assert logins == []
    assert [row["URIs"] for row in sources] == ["http://ports/", "https://nvidia/"]
    assert dropped == ["file:/var/cuda (reached on the device only)"]
    assert [row["URIs"] for row in deb_resolver._sources(describe(sources=own), [])[0]] == ["http://ports/"]
    assert [row["URIs"] for row in deb_resolver._sources(describe(sources=own), [mine])[0]] == ["https://nvidia/"]
    with pytest.raises(Problem, match="debian_packages_repositories: 'ppa:x'"):
        deb_resolver._sources(describe(), ["ppa:x"])
    with pytest.raises(Problem, match="file:/var/cuda") as caught:
        deb_resolver._sources(describe(sources=own[1:]), [])
    for setting in ("debian_packages_source: device", "debian_packages_repositories", "debian_packages_source: folder"):
        assert setting in caught.value.next_step


# ---------------------------------------------------------------- passwords

SECRET = "pw@99"


class Guarded(http.server.SimpleHTTPRequestHandler):
    """Serves a folder to bob alone."""

    def do_GET(self) -> None:
        if self.headers.get("Authorization") == "Basic " + base64.b64encode(f"bob:{SECRET}".encode()).decode():
            return super().do_GET()
        self.send_error(401)

    def log_message(self, *_words: Any) -> None:
        pass


@pytest.fixture
def guarded(line: str, tmp_path: Path) -> Iterator[str]:
    """Return the address of the repository on a server that asks for a password."""
    handler = functools.partial(Guarded, directory=str(tmp_path / "repository"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@with_apt
@pytest.mark.parametrize("helper", [deb_resolver.HELPER, "/no/apt-helper"])
@pytest.mark.parametrize("of_the_device", [True, False])
def test_a_password_in_a_source_is_used_and_kept_nowhere(
    resolver: Resolver,
    cache: fetch.Cache,
    guarded: str,
    said: list[str],
    helper: str,
    of_the_device: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(deb_resolver, "HELPER", helper)
    run = apt_root.run
    monkeypatch.setattr(apt_root, "run", lambda argv: (commands.append(list(argv)), run(argv))[1])
    source = f"deb [trusted=yes] http://bob:pw%4099@{guarded}/ ./"
    repositories = [] if of_the_device else [source]
    described = describe(sources=debs.parse_sources(source) if of_the_device else [])
    resolution, paths = resolver.ensure(described, wish("gcc"), repositories)
    assert [path.read_text() for path in paths] == ["gcc 4:12.2"]
    assert resolution.packages[0]["url"].startswith(f"http://{guarded}/")
    kept = [path.name.encode() + path.read_bytes() for path in cache.root.rglob("*") if path.is_file()]
    shown = [resolution.lock.read_bytes(), repr((resolution, commands, said)).encode(), *kept]
    assert len(kept) > 4
    assert not [data for data in shown if b"bob" in data or b"pw%40" in data or SECRET.encode() in data]
    # another password, the same packages
    changed = [row | {"URIs": row["URIs"].replace("pw%4099", "new")} for row in described["sources"]]
    again = resolver.resolve(
        {**described, "sources": changed}, wish("gcc"), [s.replace("99", "1") for s in repositories]
    )
    assert again.reused


@with_apt
def test_a_wrong_password_is_told_and_not_shown(resolver: Resolver, cache: fetch.Cache, guarded: str) -> None:
    with pytest.raises(Problem, match=r"no apt source has gcc.*401") as caught:
        resolver.resolve(describe(), wish("gcc"), [f"deb [trusted=yes] http://bob:hush@{guarded}/ ./"])
    assert "hush" not in caught.value.render()
    assert not any(b"hush" in path.read_bytes() for path in cache.root.rglob("*") if path.is_file())
    with pytest.raises(Problem, match="a blank") as caught:
        resolver.resolve(describe(), wish("gcc"), [f"deb [trusted=yes] http://bob:hush%20it@{guarded}/ ./"])
    assert "hush" not in caught.value.render()
    with pytest.raises(Problem, match="debian_packages_repositories") as caught:
        resolver.resolve(describe(), wish("gcc"), ["http://bob:hush@host/"])
    assert "hush" not in caught.value.render()


def test_the_logins_for_apt_are_its_owners_alone_and_the_machines_own_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deb_resolver, "APT_LOGINS", tmp_path / "auth.conf")
    (tmp_path / "auth.conf").write_text("machine own login me password mine\n")
    with deb_resolver._logins_of_apt(["https://a:b%23@host:8443/deb/", "https://a:b%23@host:8443/deb/"]) as options:
        path = Path(options[1].partition("=")[2])
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.read_text() == (
            "machine https://host:8443/deb login a password b#\nmachine own login me password mine\n"
        )
    assert not path.exists()
    with deb_resolver._logins_of_apt([]) as options:
        assert options == []


def test_the_packages_travel_under_their_names_as_far_as_they_are_here(cache: fetch.Cache, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("gcc")
    digest = hashlib.sha256(b"gcc").hexdigest()
    path = cache.take(tmp_path / "x", digest, "gcc_1_arm64.deb")
    rows = [{"filename": "gcc_1_arm64.deb", "sha256": digest}, {"filename": "g++_1_arm64.deb", "sha256": "0" * 64}]
    assert deb_resolver.parcels(rows, cache) == [transfer.Parcel(str(path), digest, "gcc_1_arm64.deb")]


def test_the_private_root_holds_the_devices_keys_and_pins(tmp_path: Path) -> None:
    root = apt_root.AptRoot(str(tmp_path / "root"), "arm64", ["armhf"])
    key = base64.b64encode(b"key").decode()
    description = describe(keys={"/usr/share/keyrings/n.asc": key}, trusted={"jetson.gpg": key}, preferences="Pin")
    source = {"Types": "deb", "URIs": "http://a/", "Suites": "/", "Signed-By": "/usr/share/keyrings/n.asc"}
    root.write(description, [source])
    root.write(description, [source])
    assert (tmp_path / "root/keys/0.asc").read_bytes() == b"key"
    assert (tmp_path / "root/trusted.gpg.d/jetson.gpg").read_bytes() == b"key"
    assert (tmp_path / "root/preferences").read_text() == "Pin"
    assert f"Signed-By: {tmp_path}/root/keys/0.asc" in (tmp_path / "root/sources.list.d/all.sources").read_text()
    settings = (tmp_path / "root/apt.conf").read_text()
    assert 'APT::Architectures { "arm64"; "armhf"; };' in settings
    root.write(describe(), [source])
    assert not list((tmp_path / "root/trusted.gpg.d").iterdir()), "a key that the device gave up is not believed"


# ---------------------------------------------------------------- folders


def make_deb(folder: Path, name: str, size: int = 0) -> Path:
    """Write what begins like a package: the member with its control fields, then size bytes."""

    def member(title: str, data: bytes) -> bytes:
        return f"{title:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)

    folder.mkdir(exist_ok=True)
    path = folder / name
    head = member("debian-binary", b"2.0\n") + member("control.tar.xz", name.encode())
    path.write_bytes(b"!<arch>\n" + head + member("data.tar.xz", bytes(size)))
    return path


def test_a_folder_is_read_and_its_sums_enforced(tmp_path: Path, cache: fetch.Cache) -> None:
    one, two = make_deb(tmp_path / "f", "a_1_arm64.deb"), make_deb(tmp_path / "f", "b_1_all.deb")
    offers = deb_resolver.read_folder(str(tmp_path / "f"), cache)
    assert [offer.filename for offer in offers] == ["a_1_arm64.deb", "b_1_all.deb"]
    assert offers[0].sha256 == hashlib.sha256(one.read_bytes()).hexdigest()
    sums = tmp_path / "f" / "SHA256SUMS"
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (one, two)]
    sums.write_text(f"{digests[0]}  a_1_arm64.deb\n{digests[1]} *./b_1_all.deb\n")
    assert len(deb_resolver.read_folder(str(tmp_path / "f"), cache)) == 2
    two.write_bytes(two.read_bytes() + b"x")
    with pytest.raises(Problem, match=r"b_1_all\.deb has sha256"):
        deb_resolver.read_folder(str(tmp_path / "f"), cache)
    sums.write_text(f"{digests[0]}  a_1_arm64.deb\n")
    with pytest.raises(Problem, match="SHA256SUMS says nothing of it"):
        deb_resolver.read_folder(str(tmp_path / "f"), cache)
    with pytest.raises(Problem, match="is no folder"):
        deb_resolver.read_folder("", cache)


def test_which_files_may_fit_a_device() -> None:
    names = {"a_1_arm64.deb": True, "a_1_all.deb": True, "a_1_amd64.deb": False, "mine.deb": True}
    for name, fits in names.items():
        assert deb_resolver.Offer(Path(name), name, "", 0).maybe_for(["arm64"]) is fits


def test_the_head_of_a_package_is_small_and_what_is_none_is_refused(tmp_path: Path) -> None:
    path = make_deb(tmp_path, "odd_.deb", size=100_000)
    head = deb_resolver.head_of(path)
    assert len(head) < 300
    assert path.read_bytes().startswith(head)
    assert b"odd_.deb" in head
    for data in (b"", b"not one", b"!<arch>\n", b"!<arch>\n" + bytes(60), path.read_bytes()[:130]):
        path.write_bytes(data)
        with pytest.raises(Problem, match="is no Debian package"):
            deb_resolver.head_of(path)


@with_apt
def test_dpkg_reads_the_head_of_a_real_package(tmp_path: Path) -> None:
    (tmp_path / "x/DEBIAN").mkdir(parents=True)
    text = "Package: real\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
    (tmp_path / "x/DEBIAN/control").write_text(text)
    (tmp_path / "x/big").write_bytes(bytes(1 << 20))
    subprocess.run(["dpkg-deb", "-Znone", "-b", "x", "real.deb"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    head = tmp_path / "head.deb"
    head.write_bytes(deb_resolver.head_of(tmp_path / "real.deb"))
    assert head.stat().st_size < 20_000
    status, printed, _errors = apt_root.run(["dpkg-deb", "--field", str(head), "Package"])
    assert (status, printed.strip()) == (0, "real")
