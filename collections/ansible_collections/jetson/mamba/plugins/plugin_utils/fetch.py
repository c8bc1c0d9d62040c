"""Bring wheels and sources into the controller's content cache: by URL, or from the package index pip is set up for.

Every file is stored under its sha256, is written atomically and is fetched once, however many hosts ask for it at the
same time. Layout of the cache:

    files/<sha256>/<filename>    what was fetched and verified
    incoming/<filename>          files that a person put there; taken in where the sha256 fits
    partial/                     downloads in flight; an interrupted one is continued
    trust.json                   checksums accepted on first use
    origins/<sha256>             the address that a file came from, empty where that needed a login
    locks/                       who is downloading what
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import ssl
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.jetson.mamba.plugins.module_utils.download import is_public
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.files import sha256_file, write_atomic
from ansible_collections.jetson.mamba.plugins.module_utils.passwords import (
    with_userinfo,
    without_passwords,
    without_userinfo,
)
from ansible_collections.jetson.mamba.plugins.module_utils.versions import (
    Target,
    parse_wheel_name,
    platform_tags,
    tag_mismatch,
)
from ansible_collections.jetson.mamba.plugins.plugin_utils.locks import Locked, read_lock
from unearth import Link, PackageFinder, TargetPython
from unearth.auth import MultiDomainBasicAuth
from unearth.errors import UnpackError, URLError
from unearth.fetchers import PyPIClient

Report = Callable[[str], None]
PROGRESS_SECONDS = 15.0
ATTEMPTS = 3
TRUST_SETTING = "torch_jetpack_trust_on_first_use"
# where a user sets the checksum of a wheel that no lock names
HASH_SETTINGS = {
    "torch": "torch_jetpack_sha256",
    "torchvision": "torch_jetpack_torchvision: {version: …, url: …, sha256: …}",
}
_BLOCK_BYTES = 1 << 20
_TRUST_SCHEMA = 1
DEFAULT_CACHE = "~/.cache/jetson-mamba"
# settings whose URLs may name a user and a password; they are used from here, and stand in no plan and no record
LOGIN_SETTINGS = (
    "wheelhouse_sources",
    "torch_jetpack_wheel",
    "torch_jetpack_torchvision",
    "jetson_platform_rows",
    "causal_conv1d_source",
    "mamba_ssm_source",
)
# names get prefixes and endings here, and a file system takes 255 bytes
_LONGEST_NAME = 180
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
# URLs with user and password that this process was told of; Ansible runs each task in a process of its own
_logins: dict[str, None] = {}


@dataclass(frozen=True)
class Artefact:
    """A verified file on the controller.

    Args:
        name: distribution name.
        version: version as the settings or the lock say it.
        filename: the name under which the file was published.
        path: where it lies.
        sha256: its checksum.
        size: bytes.
        url: where it came from, "" where from a local file or an index.
        address: where a device may fetch it by itself, "" where that is not known or needs a login.
    """

    name: str
    version: str
    filename: str
    path: str
    sha256: str
    size: int
    url: str = ""
    address: str = ""


Wheel = Artefact


@dataclass(frozen=True)
class IndexFile:
    """A file that a package index offers; sha256 and size are None where the index doesn't publish them."""

    filename: str
    url: str
    sha256: str | None
    size: int | None


class Ticker:
    """Passes messages on, at most one in 15 seconds, so that long work shows that it lives."""

    def __init__(self, report: Report | None, interval: float = PROGRESS_SECONDS) -> None:
        self._report = report
        self._interval = interval
        self._last = time.monotonic()

    def __call__(self, message: str) -> None:
        now = time.monotonic()
        if self._report is not None and now - self._last >= self._interval:
            self._last = now
            self._report(message)


def _ticker(progress: Report | None) -> Ticker:
    return progress if isinstance(progress, Ticker) else Ticker(progress)


def use_logins(value: Any) -> Any:
    """Remember the users and passwords of the URLs in plain data, for downloads of this process.

    Returns:
        The data without them.
    """
    _logins.update(dict.fromkeys(with_userinfo(value)))
    return without_userinfo(value)


def use_logins_of(variables: Mapping[str, Any], template: Callable[[Any], Any]) -> None:
    """Remember the users and passwords that a host's settings name; a plan holds its URLs without them.

    Args:
        variables: of the host.
        template: works out what a variable means.
    """
    for name in LOGIN_SETTINGS:
        if variables.get(name):
            use_logins(template(variables[name]))


def is_filename(name: Any) -> bool:
    """Return whether a name from elsewhere can only be that of a file in one folder."""
    return (
        isinstance(name, str)
        and 0 < len(name.encode("utf-8", "replace")) <= _LONGEST_NAME
        and name.isprintable()
        and name[0] not in ".-"
        and not {"/", "\\"} & set(name)
    )


def check_filename(name: Any, origin: str) -> None:
    """Raise a Problem for a name that is none of a plain file.

    Args:
        name: of the file.
        origin: where the name comes from.
    """
    if not is_filename(name):
        shown = repr(name) if len(repr(name)) < 2 * _LONGEST_NAME else repr(name)[:_LONGEST_NAME] + "…"
        raise Problem(
            f"{origin} names a file {shown}",
            f"a plain file name of at most {_LONGEST_NAME} bytes, without / or \\, that begins with neither . nor -",
            "do not use it; look at who publishes such a name, or give the file a plain one",
        )


class Cache:
    """The content cache in one folder."""

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root or DEFAULT_CACHE).expanduser().absolute()

    @classmethod
    def of(cls, cache: Cache | str | Path) -> Cache:
        """Return a cache, given as one or as its folder."""
        return cache if isinstance(cache, Cache) else cls(cache)

    @property
    def incoming(self) -> Path:
        """Where a person may put files that this controller cannot fetch."""
        return self.root / "incoming"

    def find(self, sha256: str, filename: str | None = None) -> Path | None:
        """Return the verified file with this checksum, or None; a file that was changed since is removed."""
        folder = self.root / "files" / sha256
        names = [filename] if filename else sorted(path.name for path in folder.glob("*.whl"))
        for name in names:
            path = folder / name
            if path.is_file() and self._is_intact(path, sha256):
                return path
        if filename:
            candidate = self.incoming / filename
            if candidate.is_file() and sha256_file(str(candidate)) == sha256:
                return self.take(candidate, sha256, filename, move=False)
        return None

    def _is_intact(self, path: Path, sha256: str) -> bool:
        """Compare with the note of the last verification; hash again only where size or time differ from it."""
        note = path.with_name(path.name + ".verified")
        with contextlib.suppress(OSError):
            if note.read_text() == _stamp(path):
                return True
        if sha256_file(str(path)) == sha256:
            note.write_text(_stamp(path))
            return True
        path.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        return False

    def take(self, source: Path, sha256: str, filename: str, move: bool = True) -> Path:
        """Put a file, whose checksum was just computed, into the cache under that checksum.

        Raises:
            Problem: the name leads out of the cache, or is no file's.
        """
        check_filename(filename, str(source))
        target = self.root / "files" / sha256 / filename
        target.parent.mkdir(parents=True, exist_ok=True)
        if not move:
            copy = target.with_name(f".{filename}.{os.getpid()}")
            try:
                _copy(source, copy)
                source = copy
            except OSError:
                copy.unlink(missing_ok=True)
                raise
        with open(source, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(source, target)
        target.with_name(filename + ".verified").write_text(_stamp(target))
        return target

    def note_origin(self, sha256: str, address: str) -> None:
        """Keep the address that a file came from; "" where nobody else may use it."""
        folder = self.root / "origins"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(str(folder / sha256), f"{address}\n".encode(), 0o644)

    def origin(self, sha256: str) -> str | None:
        """Return the address that a file came from, "" where nobody else may use it, None where it is not known."""
        try:
            return (self.root / "origins" / sha256).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return None

    @contextlib.contextmanager
    def locked(self, key: str, tick: Report, what: str) -> Iterator[None]:
        """Hold the lock of a key among all processes of this machine; waiting is reported."""
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / (key + ".lock"), "w") as handle:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    tick(f"waiting for {what}, which another host's task is fetching")
                    time.sleep(0.2)
            yield

    def read_trust(self) -> dict[str, dict[str, Any]]:
        """Return {url: {sha256, size, accepted}} of what was accepted on first use.

        Raises:
            Problem: the file is damaged; believing nothing would silently accept another file.
        """
        path = self.root / "trust.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            # earlier runs recorded URLs as they stood in the settings
            return {without_userinfo(str(url)): dict(entry) for url, entry in data["files"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise Problem(
                f"{path} cannot be read: {error}",
                "the checksums that were accepted on first use",
                f"restore it from a backup, or remove it to accept the files anew: rm {path}",
            ) from error

    def trust(self, url: str, sha256: str, size: int) -> None:
        """Record that this checksum was accepted for a URL."""
        with self.locked("trust", lambda _message: None, "trust.json"):
            files = self.read_trust()
            files[without_userinfo(url)] = {
                "sha256": sha256,
                "size": size,
                "accepted": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            text = json.dumps({"schema": _TRUST_SCHEMA, "files": files}, indent=2, sort_keys=True) + "\n"
            write_atomic(str(self.root / "trust.json"), text.encode("utf-8"), 0o644)


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as reader, open(target, "wb") as writer:
        for block in iter(lambda: reader.read(_BLOCK_BYTES), b""):
            writer.write(block)


def filename_of(url: str) -> str:
    """Return the file name at the end of a URL, unquoted (torch-2.5.0a0%2B… -> torch-2.5.0a0+…)."""
    return os.path.basename(urllib.parse.unquote(urllib.parse.urlsplit(url).path))


def known_sha256(url: str, sha256: str | None, cache: Cache | str | Path) -> str | None:
    """Return the checksum that a URL must have: the given one, else the one accepted on first use, else None."""
    if sha256:
        return sha256.lower()
    entry = Cache.of(cache).read_trust().get(without_userinfo(url))
    return str(entry["sha256"]) if entry else None


def unknown_checksum(url: str, hash_setting: str, trust_setting: str) -> Problem:
    """Return the problem that no checksum is known for a URL; its next step prints one."""
    return Problem(
        f"no checksum is known for {url}: its publisher names none",
        "a sha256, so that every device gets the same file",
        f"print it with\n  curl -L '{url}' | sha256sum\nand set {hash_setting} to it; or accept what the first "
        f"download brings, recorded and enforced from then on: -e {trust_setting}=true",
    )


def ensure_url(
    url: str,
    sha256: str | None,
    cache: Cache | str | Path,
    progress: Report | None = None,
    *,
    trust_on_first_use: bool = False,
    hash_setting: str = "sha256",
    trust_setting: str = TRUST_SETTING,
) -> Path:
    """Return the file of a URL in the cache, fetched and verified where it is not there.

    Args:
        url: http, https or file; a user and password in it are used, and neither shown nor recorded.
        sha256: what the file must have; None where no publisher says it.
        cache: the content cache, or its folder.
        progress: called with a line of text, at most every 15 seconds.
        trust_on_first_use: without a checksum, take what comes, record its sha256 and enforce it from then on.
        hash_setting, trust_setting: the variables that a message names.

    Returns:
        A path whose file is named as the URL's; its folder is named by the sha256.

    Raises:
        Problem: no checksum known; another checksum found; not reachable.
    """
    cache, tick = Cache.of(cache), _ticker(progress)
    url = use_logins(url)
    filename = filename_of(url)
    check_filename(filename, url)
    if sha256 and not _DIGEST.fullmatch(sha256):
        raise Problem(f"the sha256 of {url} is {sha256!r}", "64 hex digits", f"correct {hash_setting}")
    digest = known_sha256(url, sha256, cache)
    if not digest and not trust_on_first_use:
        raise unknown_checksum(url, hash_setting, trust_setting)
    found = cache.find(digest, filename) if digest else None
    if found is not None:
        return found
    with cache.locked(hashlib.sha256(url.encode()).hexdigest()[:32], tick, filename):
        # asked again under the lock: another process may have fetched, and recorded, it meanwhile
        digest = known_sha256(url, sha256, cache)
        found = cache.find(digest, filename) if digest else None
        if found is None:
            partial, is_free = _download(url, digest, filename, cache, tick)
            actual, size = str(sha256_file(str(partial))), partial.stat().st_size
            if digest and actual != digest:
                partial.unlink()
                raise _wrong_checksum(url, filename, actual, digest, size, bool(sha256), hash_setting, cache)
            found = cache.take(partial, actual, filename)
            cache.note_origin(actual, url if is_free and is_public(url) else "")
            if not digest:
                cache.trust(url, actual, size)
    return found


def _wrong_checksum(
    url: str, filename: str, actual: str, expected: str, size: int, given: bool, setting: str, cache: Cache
) -> Problem:
    origin = f"as {setting} says" if given else f"as accepted on first use ({cache.root / 'trust.json'})"
    return Problem(
        f"sha256 {actual} ({size} bytes) for {url}",
        f"sha256 {expected}, {origin}",
        "try again in case the download was cut short or a proxy answered in its place; if it stays, the publisher "
        f"changed the file: compare with the publisher, then correct {setting if given else 'the entry in trust.json'}"
        f", or put the right {filename} into {cache.incoming}/",
    )


def wheel_filename(wheel: Mapping[str, Any]) -> str:
    """Return the file name of a wheel that is given by url or by path."""
    return os.path.basename(str(wheel["path"])) if wheel.get("path") else filename_of(str(wheel["url"]))


def _hash_setting(wheel: Mapping[str, Any]) -> str:
    return HASH_SETTINGS.get(str(wheel["name"]), f"the sha256 of {wheel['name']}")


def check_digest_known(wheel: Mapping[str, Any], cache: Cache | str | Path, trust: bool = False) -> None:
    """Raise a Problem where no checksum is known for a wheel's URL and trust on first use is not accepted.

    Args:
        wheel: {name, version, url or path, sha256}; a path is the user's own file and needs no checksum.
        cache: the content cache, or its folder.
        trust: whether trust on first use is accepted.
    """
    if wheel.get("path") or trust or known_sha256(str(wheel["url"]), wheel.get("sha256"), cache):
        return
    raise unknown_checksum(str(wheel["url"]), _hash_setting(wheel), TRUST_SETTING)


def find_wheel(wheel: Mapping[str, Any], cache: Cache | str | Path) -> Wheel | None:
    """Return a wheel given by url or path where it is on the controller already, or None. Fetches nothing."""
    if wheel.get("path"):
        return _own_wheel(wheel) if os.path.isfile(os.path.expanduser(str(wheel["path"]))) else None
    digest = known_sha256(str(wheel["url"]), wheel.get("sha256"), cache)
    path = Cache.of(cache).find(digest, wheel_filename(wheel)) if digest else None
    return _artefact(path, wheel, cache) if path else None


def ensure_wheel(
    wheel: Mapping[str, Any], cache: Cache | str | Path, trust: bool = False, progress: Report | None = None
) -> Wheel:
    """Return a wheel that no lock names, fetched where needed.

    Args:
        wheel: {name, version, url or path, sha256}. A path names the user's own file, which stays where it is.
        cache: the content cache, or its folder.
        trust: accept what the first download brings where no checksum is known.
        progress: called with a line of text, at most every 15 seconds.

    Raises:
        Problem: no checksum known; another checksum found; no such file; not reachable.
    """
    if wheel.get("path"):
        return _own_wheel(wheel)
    path = ensure_url(
        str(wheel["url"]),
        wheel.get("sha256"),
        cache,
        progress,
        trust_on_first_use=trust,
        hash_setting=_hash_setting(wheel),
    )
    return _artefact(path, wheel, cache)


def _own_wheel(wheel: Mapping[str, Any]) -> Wheel:
    file, expected = Path(str(wheel["path"])).expanduser().absolute(), wheel.get("sha256")
    actual = sha256_file(str(file))
    if actual is None:
        raise Problem(f"no file at {file}", f"the wheel of {wheel['name']}", "correct the path in the settings")
    if expected and actual != expected.lower():
        raise Problem(
            f"sha256 {actual} for {file}",
            f"sha256 {expected}, as the settings say",
            f"copy the right file there, or correct {_hash_setting(wheel)}",
        )
    return Artefact(str(wheel["name"]), str(wheel["version"]), file.name, str(file), actual, file.stat().st_size)


def _artefact(path: Path, wheel: Mapping[str, Any], cache: Cache | str | Path) -> Wheel:
    """Return a file of the cache, whose folder is named by its sha256."""
    url = str(wheel.get("url") or "")
    return Artefact(
        str(wheel["name"]),
        str(wheel["version"]),
        path.name,
        str(path),
        path.parent.name,
        path.stat().st_size,
        without_userinfo(url),
        _address(url, path.parent.name, Cache.of(cache)),
    )


def _address(url: str, sha256: str, cache: Cache) -> str:
    """Return where a device may fetch a file of the cache by itself.

    Args:
        url: what the settings say, "" where they name none.
        sha256: of the file.
        cache: the content cache, which knows where the file came from and whether that needed a login; what was put
            there by hand, or by a bundle, came from nowhere.
    """
    origin = cache.origin(sha256)
    if origin is None:
        hosts = {urllib.parse.urlsplit(login).hostname for login in _logins}
        origin = url if is_public(url) and urllib.parse.urlsplit(url).hostname not in hosts else ""
    return origin if is_public(origin) else ""


# ---------------------------------------------------------------- the network


@functools.lru_cache(maxsize=1)
def pip_settings() -> dict[str, str]:
    """Return what this interpreter's pip is configured with (index-url, extra-index-url, find-links, cert, …).

    Raises:
        Problem: there is no pip beside this interpreter.
    """
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    if done.returncode:
        raise Problem(
            f"{sys.executable} -m pip config list: {done.stderr.strip()[-300:]}",
            "a pip beside the controller's Python: its configuration says where packages come from",
            "make the controller's environment again: tools/bootstrap",
        )
    # environment variables beat a command's section, which beats [global]
    ranks = {"global": 0, "download": 1, ":env:": 2}
    settings: dict[str, tuple[int, str]] = {}
    for line in done.stdout.splitlines():
        key, _equals, value = line.partition("=")
        section, _dot, option = key.rpartition(".")
        if section in ranks and ranks[section] >= settings.get(option, (-1, ""))[0]:
            with contextlib.suppress(ValueError, SyntaxError):
                settings[option] = (ranks[section], str(ast.literal_eval(value)))
    return {option: value for option, (_rank, value) in settings.items()}


def _default_index() -> str:
    """Return pip's own default index: it is pip's to know."""
    code = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise Problem(
            "this pip does not say its default index: " + done.stderr.strip()[-200:],
            "an index to take packages from",
            "name one: pip config set global.index-url URL",
        )
    return done.stdout.strip()


def _session(index_urls: Iterable[str] = ()) -> PyPIClient:
    """Return a client with pip's settings, that logs in as known URLs, pip's settings or ~/.netrc say."""
    settings = pip_settings()
    pip_urls = [*settings.get("index-url", "").split(), *settings.get("extra-index-url", "").split()]
    options: dict[str, Any] = {"timeout": 60.0, "follow_redirects": True}
    if settings.get("cert"):
        options["verify"] = ssl.create_default_context(cafile=settings["cert"])
    if settings.get("proxy"):
        options["proxy"] = settings["proxy"]
    client = PyPIClient(trusted_hosts=settings.get("trusted-host", "").split(), **options)
    client.auth = MultiDomainBasicAuth(prompting=False, index_urls=[*_logins, *with_userinfo(pip_urls), *index_urls])
    client.event_hooks["response"].append(_stay_remote)
    return client


def _stay_remote(response: Any) -> None:
    """Refuse a server's redirection to a file of this machine."""
    where = str(response.headers.get("location", ""))
    if response.has_redirect_location and urllib.parse.urlsplit(where).scheme not in ("", "http", "https"):
        raise URLError(f"it leads to {where}")


def _index_urls() -> list[str]:
    settings = pip_settings()
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        return []
    return [settings.get("index-url") or _default_index(), *settings.get("extra-index-url", "").split()]


def _finder(target: Target | None, cache: Cache | None) -> PackageFinder:
    index_urls = _index_urls()
    find_links = pip_settings().get("find-links", "").split()
    if cache is not None and cache.incoming.is_dir():
        find_links.append(str(cache.incoming))
    session = _session(index_urls)
    options: dict[str, Any] = {"session": session, "ignore_compatibility": True}
    if target is not None:
        major, minor = (int(part) for part in target.python.split("."))
        platforms = platform_tags(target.machine, target.glibc)
        options = {"session": session, "target_python": TargetPython((major, minor), [target.abi], "cp", platforms)}
    return PackageFinder(index_urls=index_urls, find_links=find_links, **options)


def _index_problem(project: str, reason: str, filename: str, sha256: str | None, cache: Cache | None) -> Problem:
    folder = cache.incoming if cache else Cache().incoming
    checksum = f" (sha256 {sha256})" if sha256 else ""
    return Problem(
        f"{project} from the package index: {reason}",
        f"{filename}{checksum}",
        "check that 'pip config list' names an index that this machine reaches, and try again; or put the file into "
        f"{folder}/ by hand",
    )


def _candidates(requirement: str, target: Target | None, cache: Cache | None) -> list[Link]:
    finder = _finder(target, cache)
    return [package.link for package in finder.find_matches(requirement, allow_yanked=True, allow_prereleases=True)]


def _published_sha256(link: Link) -> str | None:
    return (link.hashes or {}).get("sha256") or (link.hash if link.hash_name == "sha256" else None)


def find_wheel_link(name: str, version: str, target: Target, cache: Cache | None = None) -> IndexFile:
    """Return the best wheel that the configured indexes offer for a target, with sha256 and size.

    Raises:
        Problem: there is none, or no index answers.
    """
    wanted = f"{name}=={version}"
    try:
        wheels = [link for link in _candidates(wanted, target, cache) if link.is_wheel]
        if not wheels:
            raise _index_problem(wanted, "no wheel fits", f"a wheel for {target.describe()}", None, cache)
        session = _session()
        link = wheels[0]
        digest, size = _published_sha256(link), None
        with session.get_stream(use_logins(link.url_without_fragment)) as response:
            response.raise_for_status()
            size = int(response.headers.get("Content-Length") or 0) or None
            if digest is None or size is None:
                hasher, size = hashlib.sha256(), 0
                for block in response.iter_bytes(_BLOCK_BYTES):
                    hasher.update(block)
                    size += len(block)
                digest = hasher.hexdigest()
    except _network_errors() as error:
        raise _index_problem(wanted, _describe(error), f"a wheel for {target.describe()}", None, cache) from error
    return IndexFile(link.filename, use_logins(link.url_without_fragment), digest, size)


def ensure_index_file(
    project: str, filename: str, sha256: str, cache: Cache | str | Path, progress: Report | None = None
) -> Path:
    """Return a file (an sdist or a wheel) of a project out of the cache, or from the configured package index.

    Raises:
        Problem: no index has it; another checksum; not reachable.
    """
    cache = Cache.of(cache)
    check_filename(filename, project)
    found = cache.find(sha256, filename)
    if found is not None:
        return found
    try:
        links = [link for link in _candidates(project, None, cache) if link.filename == filename]
    except _network_errors() as error:
        raise _index_problem(project, _describe(error), filename, sha256, cache) from error
    links = [link for link in links if _published_sha256(link) in (sha256, None)] or links
    if not links:
        raise _index_problem(project, f"no file named {filename}", filename, sha256, cache)
    return _ensure_link(links[0], sha256, cache, progress)


def _ensure_link(link: Link, sha256: str, cache: Cache, progress: Report | None) -> Path:
    return ensure_url(link.url_without_fragment, sha256, cache, progress, hash_setting="the lock")


def _network_errors() -> tuple[type[Exception], ...]:
    """Return what unearth and the HTTP library beneath it raise where something is unreachable or refused."""
    http = {name: base for base in PyPIClient.__mro__ for name in [base.__module__.split(".")[0]]}
    library = sys.modules[next(name for name in http if name.startswith("httpx"))]
    return (library.HTTPError, library.InvalidURL, URLError, UnpackError, OSError)


def _describe(error: Exception) -> str:
    return without_passwords(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def _download(url: str, digest: str | None, filename: str, cache: Cache, tick: Report) -> tuple[Path, bool]:
    """Fetch a URL to a file in partial/; an interrupted fetch of a known checksum is continued.

    Returns:
        The file, and whether anybody may fetch it from there: it was sent without a login.
    """
    partial = cache.root / "partial" / (hashlib.sha256(f"{url} {digest}".encode()).hexdigest()[:32] + "-" + filename)
    partial.parent.mkdir(parents=True, exist_ok=True)
    if not digest:
        partial.unlink(missing_ok=True)  # nothing could tell that two halves belong together
    reason = ""
    for attempt in range(ATTEMPTS):
        try:
            return partial, _stream(url, partial, filename, tick)
        except _network_errors() as error:
            reason = _describe(error)
            if isinstance(error, OSError) and error.errno in (28, 30, 13, 122):
                raise Problem(
                    f"{partial}: {error.strerror}",
                    "room and the right to write in the controller's cache",
                    "free space there, or name another folder: -e jetson_platform_cache=FOLDER",
                ) from error
            if not digest:
                partial.unlink(missing_ok=True)
        if attempt + 1 < ATTEMPTS:
            time.sleep(min(2**attempt, 5))
    raise Problem(
        f"{url} cannot be fetched: {reason}",
        f"{filename} with sha256 {digest or '(to be accepted on first use)'}",
        f"check this machine's network and proxy and try again; or put {filename} into {cache.incoming}/ by hand"
        + ("" if digest else ", together with its sha256 in the settings"),
    )


def _stream(url: str, partial: Path, filename: str, tick: Report) -> bool:
    """Append the rest of a URL to a file; returns whether it was sent without a login."""
    if urllib.parse.urlsplit(url).scheme == "file":
        _copy(Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)), partial)
        return False
    have = partial.stat().st_size if partial.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with _session() as session, session.get_stream(url, headers=headers) as response:
        if response.status_code == 416:  # more is there than the server has: begin again
            partial.unlink()
            raise ConnectionError("the partial download does not fit any more")
        response.raise_for_status()
        is_free = not any("authorization" in step.request.headers for step in [*response.history, response])
        if response.status_code != 206:
            have = 0
        total = have + int(response.headers.get("Content-Length") or 0)
        with open(partial, "ab" if have else "wb") as handle:
            for block in response.iter_bytes():  # as it comes, so that a cut connection loses nothing
                handle.write(block)
                have += len(block)
                tick(f"fetching {filename}: {have >> 20} of {total >> 20 if total else '?'} MB")
            handle.flush()
            os.fsync(handle.fileno())
    if total and have < total:
        raise ConnectionError(f"the connection ended after {have} of {total} bytes")
    return is_free


# ---------------------------------------------------------------- locks


def find_locked(entry: Locked, cache: Cache | str | Path) -> Wheel | None:
    """Return the cached wheel of a lock's line, or None. Fetches nothing."""
    for digest in entry.hashes:
        path = Cache.of(cache).find(digest, entry.filename)
        if path is not None:
            return _artefact(path, vars(entry), cache)
    return None


def check_lock_fits(entries: Iterable[Locked], target: Target, origin: str) -> None:
    """Raise a Problem where a lock names a wheel that is for something else than the target."""
    for entry in entries:
        if entry.filename is None:
            continue
        reason = tag_mismatch(parse_wheel_name(entry.filename), target)
        if reason:
            raise Problem(
                f"{entry.filename} in {origin}: {reason}",
                f"wheels for {target.describe()}",
                f"lock for this target: tools/lock.py {target.abi}-linux_{target.machine} --glibc {target.glibc}",
            )


def ensure_locked(entry: Locked, target: Target, cache: Cache | str | Path, progress: Report | None = None) -> Wheel:
    """Return the wheel of one line of a lock, fetched from the configured package index where needed.

    Raises:
        Problem: no index has a wheel with this checksum for the target; not reachable.
    """
    cache = Cache.of(cache)
    found = find_locked(entry, cache)
    if found is not None:
        return found
    wanted = f"{entry.name}=={entry.version}"
    expected = entry.filename or f"a wheel for {target.describe()}"
    try:
        links = [link for link in _candidates(wanted, target, cache) if link.is_wheel]
    except _network_errors() as error:
        raise _index_problem(wanted, _describe(error), expected, entry.hashes[0], cache) from error
    for link in links:
        published = _published_sha256(link)
        if published in entry.hashes:
            return _artefact(_ensure_link(link, str(published), cache, progress), vars(entry), cache)
    unnamed = [link for link in links if _published_sha256(link) is None]
    if unnamed and len(entry.hashes) == 1:
        return _artefact(_ensure_link(unnamed[0], entry.hashes[0], cache, progress), vars(entry), cache)
    offered = ", ".join(f"{link.filename} (sha256 {_published_sha256(link)})" for link in links) or "no wheel that fits"
    raise _index_problem(wanted, "it has " + offered, expected, entry.hashes[0], cache)


def ensure_lock(
    lock_path: str | Path, target: Target, cache: Cache | str | Path, progress: Report | None = None
) -> list[Wheel]:
    """Return the wheels of a whole lock, in its order, fetching what the cache lacks.

    Raises:
        Problem: the lock is malformed or for another target; a wheel cannot be had.
    """
    tick = _ticker(progress)
    entries = read_lock(lock_path, target)
    check_lock_fits(entries, target, str(lock_path))
    wheels = []
    for number, entry in enumerate(entries, start=1):
        tick(f"fetching wheel {number} of {len(entries)}: {entry.name} {entry.version}")
        wheels.append(ensure_locked(entry, target, cache, tick))
    return wheels
