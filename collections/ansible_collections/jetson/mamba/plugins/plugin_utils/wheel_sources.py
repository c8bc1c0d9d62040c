"""Find a component's ready wheel where the user says that wheels may be had: folders, find-links pages, indexes.

The sources are asked in the user's order. Only wheels are taken, never source distributions, and only by checksum: the
index's own, a pinned one, or one that was accepted on first use. What is found is not yet inspected.
"""

from __future__ import annotations

import difflib
import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.files import sha256_file
from ansible_collections.jetson.mamba.plugins.module_utils.passwords import without_passwords
from ansible_collections.jetson.mamba.plugins.module_utils.versions import (
    Target,
    WheelName,
    canonical_name,
    parse_wheel_name,
    platform_tags,
    tag_mismatch,
)
from ansible_collections.jetson.mamba.plugins.plugin_utils import fetch
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheelhouse import parse_class_id, satisfies
from unearth import Link
from unearth.collector import (
    LinkCollectError,
    fetch_page,
    is_secure_origin,
    parse_html_page,
    parse_json_response,
)

Report = Callable[[str], Any]

KINDS = ("folder", "index", "find_links")
HASH_SETTING = "wheelhouse_sha256"
TRUST_SETTING = "wheelhouse_trust_on_first_use"
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
# as the projects name the wheels that they publish: 1.6.0+cu12torch2.5cxx11abiTRUE
_LOCAL = re.compile(
    r"cu(?P<cuda>\d+)(?:[._-]?torch(?P<torch>\d+\.\d+))(?:[._-]?cxx11abi(?P<abi>true|false))?", re.IGNORECASE
)


@dataclass(frozen=True)
class Offer:
    """A wheel that a source has, on the controller.

    Args:
        path: where it lies: the user's own file, or one in the cache.
        filename: as it was published.
        sha256: of the file.
        origin: in words: "folder PATH", "index URL", "find-links URL".
    """

    path: Path
    filename: str
    sha256: str
    origin: str


class Search(NamedTuple):
    """What the sources said: the first offer, or None, and one line for each thing that did not serve."""

    offer: Offer | None
    reasons: list[str]


@dataclass(frozen=True)
class _Candidate:
    """A wheel by name, at a path or a URL."""

    name: WheelName
    filename: str
    path: Path | None = None
    url: str = ""
    sha256: str | None = None


class _Unreachable(Exception):
    """A source does not answer, in words."""


def describe(source: Mapping[str, Any]) -> str:
    """Return a source in words, without its credentials."""
    kind, where = next(iter(source.items()))
    return f"{str(kind).replace('_', '-')} {without_passwords(str(where))}"


def check_sources(sources: Any, pins: Any = None) -> None:
    """Check the settings wheelhouse_sources and wheelhouse_sha256.

    Raises:
        Problem: something else than a list of {folder: PATH}, {index: URL} or {find_links: URL or PATH}; a pin that is
            no sha256.
    """
    expected = "a list, each entry one of {folder: PATH}, {index: URL}, {find_links: URL or PATH}"
    if not isinstance(sources, Sequence) or isinstance(sources, (str, bytes)):
        raise Problem(f"wheelhouse_sources is {sources!r}", expected, "write it as a YAML list")
    for number, source in enumerate(sources):
        where = f"wheelhouse_sources[{number}]"
        if not isinstance(source, Mapping) or len(source) != 1:
            raise Problem(f"{where} is {source!r}", expected, f"give {where} exactly one of {', '.join(KINDS)}")
        kind, value = next(iter(source.items()))
        if kind not in KINDS:
            near = difflib.get_close_matches(str(kind), KINDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise Problem(f"{where} is a '{kind}'{hint}", expected, f"correct the key in {where}")
        if not isinstance(value, str) or not value.strip():
            raise Problem(f"{where}.{kind} is {value!r}", "a path or a URL", f"correct {where}.{kind}")
        try:
            scheme = urllib.parse.urlsplit(value).scheme
            if "://" in value:
                _port = urllib.parse.urlsplit(value).port
        except ValueError as error:  # the value is not shown: what is malformed may be its password
            raise Problem(
                f"{where}.{kind} is no URL: its host or port cannot be read",
                "a URL such as https://host/simple; in a password / is written %2F, @ %40, # %23, ? %3F and : %3A",
                f"correct {where}.{kind}",
            ) from error
        if (kind == "index" and scheme not in ("http", "https", "file")) or (
            kind == "find_links" and "://" in value and scheme not in ("http", "https", "file")
        ):
            raise Problem(f"{where}.{kind} is {value}", "a URL with http, https or file", f"correct {where}.{kind}")
        if kind == "folder" and "://" in value:
            raise Problem(
                f"{where}.folder is {value}", "a folder on the controller", f"call it find_links or index in {where}"
            )
    for name, digest in (_pins(pins)).items():
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise Problem(
                f"wheelhouse_sha256 says {digest!r} for {name}", "64 hex digits", "copy them from sha256sum's output"
            )


def _pins(pins: Any) -> Mapping[str, Any]:
    if pins is None:
        return {}
    if not isinstance(pins, Mapping):
        raise Problem(f"wheelhouse_sha256 is {pins!r}", "a mapping {file name: sha256}", "correct wheelhouse_sha256")
    return pins


def find(
    sources: Sequence[Mapping[str, Any]],
    component: str,
    project: str,
    version: str,
    target: Target,
    pins: Mapping[str, str],
    trust: bool,
    cache: fetch.Cache | str | Path,
    say: Report,
    *,
    class_id: str = "",
    accept: Callable[[Offer], Any] | None = None,
) -> Search:
    """Return the first wheel of a component's version that a source has for the target, downloaded and verified.

    A source that cannot be reached is announced and skipped.

    Args:
        sources: as check_sources() takes them, in the order in which they are asked.
        component: its name for people.
        project: its name in an index.
        version: a wheel's local part that is not asked for (1.6.0+cu126) does not matter.
        target: machine, Python and glibc.
        pins: {file name: sha256}.
        trust: accept what the first download brings where no checksum is known.
        cache: of downloads.
        say: shows one line.
        class_id: passes over wheels whose version names another CUDA, torch or C++ ABI (1.6.0+cu12torch2.5).
        accept: looks into an offer; after a Problem that it raises the next wheel is tried.

    Raises:
        Problem: no checksum is known for a wheel that fits; a file has another checksum than it must have.
    """
    check_sources(sources, pins)
    cache = fetch.Cache.of(cache)
    reasons: list[str] = []
    wanted = _Wanted(component, project, version, target, class_id)
    for source in sources:
        origin = describe(source)
        try:
            refused: list[str] = []
            listing = _listing(fetch.use_logins(source), project, refused)
            for reason in refused:
                reasons.append(f"{origin}: {reason}")
                say(f"{component} {version}: not from {reasons[-1]}")
            for candidate in wanted.choose(listing, origin, reasons):
                offer = _have(candidate, origin, pins, trust, cache, say)
                try:
                    if accept is not None:
                        accept(offer)
                except Problem as problem:
                    reasons.append(f"{origin}: {problem.found}")
                    say(f"{component} {version}: not from {reasons[-1]}")
                    continue
                return Search(offer, reasons)
        except _Unreachable as error:
            reasons.append(f"{origin}: {error}")
            say(f"{component} {version}: {origin} is skipped: {error}")
    return Search(None, reasons)


class _Wanted:
    """Chooses among the wheels that a source lists."""

    def __init__(self, component: str, project: str, version: str, target: Target, class_id: str) -> None:
        self._text = f"{component} {version}"
        self._project = canonical_name(project)
        self._version = version
        self._target = target
        self._parts = parse_class_id(class_id) if class_id else None

    def choose(self, listing: Sequence[_Candidate], origin: str, reasons: list[str]) -> list[_Candidate]:
        """Return the wheels that fit by name, best first; why others do not is added to the reasons."""
        fitting, others = [], []
        for candidate in listing:
            if canonical_name(candidate.name.name) != self._project:
                continue
            if not satisfies(candidate.name.version, self._version):
                others.append(candidate.name.version)
                continue
            mismatch = tag_mismatch(candidate.name, self._target) or self._local_mismatch(candidate.name.version)
            if mismatch:
                reasons.append(f"{origin}: {candidate.filename}: {mismatch}")
            else:
                fitting.append(candidate)
        if not fitting:
            has = f" (it has {', '.join(sorted(set(others)))})" if others else ""
            reasons.append(f"{origin}: no wheel of {self._text} for {self._target.describe()}{has}")
        return sorted(fitting, key=self._rank)

    def _local_mismatch(self, version: str) -> str | None:
        match = _LOCAL.search(version.partition("+")[2])
        if self._parts is None or match is None:
            return None
        parts = self._parts
        cuda = parts.cuda.replace(".", "")
        # cu12 stands for every 12.x, cu126 for 12.6
        if parts.cuda != "none" and match["cuda"] not in (cuda, parts.cuda.split(".")[0]):
            return f"it is for CUDA {match['cuda']}, not for {parts.cuda}"
        if ".".join(parts.torch.split(".")[:2]) != match["torch"]:
            return f"it is for torch {match['torch']}, not for {parts.torch}"
        if match["abi"] and (match["abi"].lower() == "true") != parts.cxx11_abi:
            return "it is for torch's other C++ ABI"
        return None

    def _rank(self, candidate: _Candidate) -> tuple[int, int, str, str]:
        """Order: the version as wanted before one with a local part, the newest platform tag, then by name."""
        tags = platform_tags(self._target.machine, self._target.glibc)
        place = min((tags.index(tag) for tag in candidate.name.platforms if tag in tags), default=len(tags))
        local = int("+" in candidate.name.version and "+" not in self._version)
        return (local, place, "" if candidate.name.build else "z", candidate.filename)


def _listing(source: Mapping[str, Any], project: str, refused: list[str]) -> list[_Candidate]:
    """Return the wheels that a source lists; what it lists and no source may is added to refused.

    Raises:
        _Unreachable: it cannot be asked.
    """
    kind, where = next(iter(source.items()))
    if kind == "index":
        return _links(f"{where.rstrip('/')}/{canonical_name(project)}/", refused)
    path = _local_path(where)
    if path is None:
        if urllib.parse.urlsplit(where).path.endswith(".whl"):
            return _candidates([Link(where)], True, refused)
        return _links(where, refused)
    try:
        if path.is_file() and path.suffix != ".whl":
            return _links(path.as_uri(), refused)
        files = [path] if path.is_file() else sorted(path.iterdir())
    except OSError as error:
        raise _Unreachable(f"{error.strerror} ({path})") from error
    found = []
    for file in files:
        name = _wheel_name(file.name)
        if name is not None and file.is_file():
            found.append(_Candidate(name, file.name, path=file.absolute()))
    return found


def _local_path(where: str) -> Path | None:
    """Return the path that a setting names, or None where it is a remote URL."""
    parts = urllib.parse.urlsplit(where)
    if parts.scheme == "file":
        return Path(urllib.parse.unquote(parts.path))
    return None if "://" in where else Path(where).expanduser()


def _wheel_name(filename: str) -> WheelName | None:
    try:
        return parse_wheel_name(filename)
    except ValueError:
        return None


def _links(page: str, refused: list[str]) -> list[_Candidate]:
    """Return the wheels that a page links to (PEP 503 and 691).

    Raises:
        _Unreachable: it does not answer, or answers with something else.
    """
    client: Any = fetch._session()
    try:
        with client as session:
            if not is_secure_origin(session, Link(page)):
                raise _Unreachable(
                    "plain http is not trusted; use https, or: pip config set global.trusted-host "
                    f"{urllib.parse.urlsplit(page).hostname}"
                )
            answer = fetch_page(session, Link(page))
        reader = parse_json_response if "json" in answer.content_type.lower() else parse_html_page
        remote = urllib.parse.urlsplit(page).scheme != "file"
        return _candidates(list(reader(answer)), remote, refused)
    except LinkCollectError as error:
        if "(404)" in str(error):
            return []  # the index answers: it has nothing of this project
        raise _Unreachable(without_passwords(str(error))) from error
    except fetch._network_errors() as error:
        raise _Unreachable(fetch._describe(error)) from error
    except (ValueError, AttributeError, TypeError, LookupError, RecursionError) as error:
        raise _Unreachable(f"its page cannot be read: {without_passwords(str(error))}") from error


def _candidates(links: Sequence[Link], remote: bool, refused: list[str]) -> list[_Candidate]:
    """Return the wheels among links; those that lead where no source may lead are added to refused.

    Args:
        links: what a page, or a setting, names.
        remote: whether another machine wrote them.
        refused: takes one line for each.
    """
    found = []
    for link in links:
        if not link.filename.endswith(".whl") or link.is_yanked:
            continue
        name, digest = _wheel_name(link.filename), fetch._published_sha256(link)
        scheme = urllib.parse.urlsplit(link.url).scheme
        if scheme not in ("http", "https") and (remote or scheme != "file"):
            refused.append(f"{_shown(link.filename)} is offered as a {scheme or 'local'}: URL, which no index may do")
        elif not fetch.is_filename(fetch.filename_of(link.url)) or fetch.filename_of(link.url) != link.filename:
            refused.append(f"{_shown(link.filename)} is no plain file name")
        elif digest is not None and not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
            refused.append(f"{_shown(link.filename)}: its sha256 is given as {_shown(digest)}, which is none")
        elif name is not None:
            path = link.file_path if link.is_file else None
            url = fetch.use_logins(link.url_without_fragment)
            found.append(_Candidate(name, link.filename, path, url, digest))
    return found


def _shown(value: Any) -> str:
    """Return what another machine has sent, quoted and cut."""
    text = repr(value)
    return text if len(text) <= 120 else text[:120] + "…"


def _have(
    candidate: _Candidate,
    origin: str,
    pins: Mapping[str, str],
    trust: bool,
    cache: fetch.Cache,
    say: Report,
) -> Offer:
    """Return a candidate's file with its checksum verified.

    Raises:
        Problem: no checksum is known, or the file has another one.
        _Unreachable: it cannot be downloaded.
    """
    filename, pin = candidate.filename, str(pins.get(candidate.filename, "")).lower() or None
    published = candidate.sha256.lower() if candidate.sha256 else None
    if pin and published and pin != published:
        raise Problem(
            f"{origin} publishes sha256 {published} for {filename}",
            f"sha256 {pin}, as {HASH_SETTING} says",
            f"compare with the publisher, then correct {HASH_SETTING}, or take this source out of wheelhouse_sources",
        )
    known = pin or published
    if candidate.path is not None:
        found = sha256_file(str(candidate.path))
        if found is None:
            raise _Unreachable(f"{candidate.path} is gone")
        if known and found != known:
            raise Problem(
                f"{candidate.path} has sha256 {found}",
                f"sha256 {known}, as {HASH_SETTING if pin else origin} says",
                f"replace the file by the one that was meant, or correct {HASH_SETTING} if the file is right",
            )
        return Offer(candidate.path, filename, found, origin)
    setting = f"{HASH_SETTING} ({filename}: …)"
    if not trust and fetch.known_sha256(candidate.url, known, cache) is None:
        raise fetch.unknown_checksum(candidate.url, setting, TRUST_SETTING)
    say(f"fetching {filename} from {origin}")
    try:
        path = fetch.ensure_url(
            candidate.url,
            known,
            cache,
            say,
            trust_on_first_use=trust,
            hash_setting=setting if pin else f"{origin}",
            trust_setting=TRUST_SETTING,
        )
    except Problem as problem:
        if problem.found.startswith("sha256 "):  # it was reached, and has another file
            raise
        raise _Unreachable(problem.found) from problem
    return Offer(path, filename, path.parent.name, origin)
