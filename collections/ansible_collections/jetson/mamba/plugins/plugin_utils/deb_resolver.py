"""What a device needs for a set of Debian packages, worked out and fetched on the controller.

In the controller's cache:

    debs/<digest>.json       what was worked out for a state of a device (a lock: the next such device gets the same)
    debs/lists/<digest>/     apt's private root for one set of sources; its package lists are kept
    debs/folder-sums.json    checksums of a user's own packages, by path, size and time
    files/<sha256>/          the packages themselves, beside all other files of the cache
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible_collections.jetson.mamba.plugins.module_utils import apt_root, debs, passwords
from ansible_collections.jetson.mamba.plugins.module_utils.debs import Row, Wish
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.files import sha256_file, write_atomic
from ansible_collections.jetson.mamba.plugins.plugin_utils import fetch, transfer

SCHEMA = 1
HELPER = "/usr/lib/apt/apt-helper"
# this machine's own, which stays in force
APT_LOGINS = Path("/etc/apt/auth.conf")
_PACKAGE_KEYS = {"name", "version", "arch", "old", "filename", "sha256", "size", "url"}
_HEAD_BYTES = 32 << 20


@dataclass(frozen=True)
class Resolution:
    """The files that bring a device to what was asked for.

    Args:
        packages: {name, version, arch, old, filename, sha256, size, url} each; old is the version there, or "".
        lock: the file that keeps it.
        reused: whether it was worked out before.
        warnings: what apt complained about.
        logins: the sources with user and password; nothing else here has any, and no file does.
    """

    packages: list[dict[str, Any]]
    lock: Path
    reused: bool = False
    warnings: list[str] = field(default_factory=list)
    logins: list[str] = field(default_factory=list, repr=False)


def alternatives(names: Sequence[str]) -> str:
    """Return how else packages come onto a device."""
    return (
        f"install them yourself: sudo apt-get install {' '.join(names)}; or let the device's own apt do it: "
        "-e debian_packages_source=device; or put the .deb files of them and of all they need into a folder: "
        "-e debian_packages_source=folder -e debian_packages_folder=FOLDER"
    )


class Resolver:
    """Works out and fetches packages, once for all devices in the same state.

    Args:
        cache: the controller's content cache.
        say: shows one line to the user.
    """

    def __init__(self, cache: fetch.Cache, say: Callable[[str], None]) -> None:
        self._cache = cache
        self._tick = fetch.Ticker(say)
        self._say = say

    def resolve(
        self, description: Mapping[str, Any], wishes: Sequence[Wish], repositories: Sequence[str], fresh: bool = False
    ) -> Resolution:
        """Return what a device needs. Fetches package lists, no package.

        Args:
            description: as deb_install.describe gives it.
            wishes: the packages that are missing.
            repositories: apt sources; "device" stands for the device's own, and so does an empty list.
            fresh: do not look at what was worked out before.

        Raises:
            Problem: no apt-get here; a package that no source has; apt finds no way; a change that is not allowed.
        """
        sources, dropped, logins = _sources(description, repositories)
        place = {name: description[name] for name in ("architecture", "foreign", "keys", "trusted", "preferences")}
        place_digest = _digest([place, sources])
        names = sorted(wish.text for wish in wishes)
        lock = self._cache.root / "debs" / (_digest([place_digest, description["status"], names]) + ".json")
        known = None if fresh else _read_lock(lock)
        if known is not None:
            return Resolution(known, lock, reused=True, logins=logins)
        if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
            raise Problem(
                f"the device lacks {', '.join(names)}, and this controller has no apt-get to find out what they need",
                "a controller with Debian or Ubuntu, or another source of packages",
                alternatives(names),
            )
        with self._cache.locked(f"debs-{place_digest[:32]}", self._tick, "package lists"):
            known = None if fresh else _read_lock(lock)
            if known is not None:
                return Resolution(known, lock, reused=True, logins=logins)
            self._say(f"working out what {' '.join(names)} need on {description['architecture']}")
            folder = self._cache.root / "debs" / "lists" / place_digest[:32]
            packages, warnings = _work_out(folder, description, sources, dropped, list(wishes), logins)
        data = {
            "schema": SCHEMA,
            "architecture": description["architecture"],
            "names": names,
            "sources": [f"{row['URIs']} {row['Suites']}" for row in sources],
            "resolved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "packages": packages,
        }
        write_atomic(str(lock), (json.dumps(data, indent=2, sort_keys=True) + "\n").encode("utf-8"), 0o644)
        return Resolution(packages, lock, warnings=warnings, logins=logins)

    def ensure(
        self, description: Mapping[str, Any], wishes: Sequence[Wish], repositories: Sequence[str]
    ) -> tuple[Resolution, list[Path]]:
        """Return what a device needs and where the files of it are, in the same order.

        Raises:
            Problem: as resolve; or a file that cannot be fetched.
        """
        resolution = self.resolve(description, wishes, repositories)
        try:
            return resolution, self.files(resolution)
        except Problem:
            if not resolution.reused:
                raise
        # repositories drop a version when they get its successor
        self._say("a package that was worked out earlier cannot be fetched any more: working it out again")
        resolution = self.resolve(description, wishes, repositories, fresh=True)
        return resolution, self.files(resolution)

    def files(self, resolution: Resolution) -> list[Path]:
        """Return the packages' files, fetched where the cache lacks them. Raises Problem."""
        paths = []
        total = sum(row["size"] for row in resolution.packages) >> 20
        for number, row in enumerate(resolution.packages, start=1):
            count = len(resolution.packages)
            self._tick(f"fetching package {number} of {count} ({total} MB in all): {row['filename']}")
            paths.append(self._file(row, resolution.logins))
        return paths

    def absent(self, resolution: Resolution) -> list[dict[str, Any]]:
        """Return the packages whose files the cache lacks. Fetches nothing."""
        return [
            row for row in resolution.packages if self._cache.find(str(row["sha256"]), str(row["filename"])) is None
        ]

    def _file(self, row: Mapping[str, Any], logins: Sequence[str]) -> Path:
        name, digest, url = str(row["filename"]), str(row["sha256"]), str(row["url"])
        found = self._cache.find(digest, name)
        if found is not None:
            return found
        remote = urllib.parse.urlsplit(url).scheme in ("http", "https")
        with self._cache.locked(digest[:32], self._tick, name):
            found = self._cache.find(digest, name)
            if found is not None:
                return found
            if not (remote and os.access(HELPER, os.X_OK)):
                path = fetch.ensure_url(url, digest, self._cache, self._tick)
                return self._cache.take(path, digest, name, move=False)
            # apt's own way out: it knows the proxy and the credentials of this machine
            partial = self._cache.root / "partial" / f"{digest[:32]}-{name}"
            partial.parent.mkdir(parents=True, exist_ok=True)
            with _logins_of_apt(logins) as options:
                words = ["-o", "APT::Sandbox::User=root", *options, "download-file", url]
                status, printed, errors = apt_root.run([HELPER, *words, str(partial), f"SHA256:{digest}"])
            if status != 0 or sha256_file(str(partial)) != digest:
                with contextlib.suppress(OSError):
                    partial.unlink()
                reason = "; ".join(apt_root.complaints(printed + errors)) or errors.strip() or "another checksum"
                raise Problem(
                    f"{url} cannot be fetched: {reason}",
                    f"{name} with sha256 {digest}",
                    f"check this machine's network and proxy and try again; or put {name} into "
                    f"{self._cache.incoming}/ by hand",
                )
            return self._cache.take(partial, digest, name)


def parcels(files: Sequence[Mapping[str, Any]], cache: fetch.Cache) -> list[transfer.Parcel]:
    """Return packages as they travel to a device.

    Args:
        files: {filename, sha256} each, as the plan's package_files has them; what the cache lacks is left out.
        cache: the controller's content cache.
    """
    found = [(row, cache.find(str(row["sha256"]), str(row["filename"]))) for row in files]
    return [
        transfer.Parcel(str(path), str(row["sha256"]), str(row["filename"])) for row, path in found if path is not None
    ]


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()


def _read_lock(path: Path) -> list[dict[str, Any]] | None:
    """Return the packages of a lock, or None where there is none that can be used."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        packages = data["packages"] if data["schema"] == SCHEMA else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = isinstance(packages, list) and all(isinstance(row, dict) and set(row) >= _PACKAGE_KEYS for row in packages)
    return packages if whole else None


def _sources(description: Mapping[str, Any], repositories: Sequence[str]) -> tuple[list[Row], list[str], list[str]]:
    """Return the sources to use, in words those of the device that the controller does not reach, and the logins.

    A user and password in a source's URL are taken out of it.

    Raises:
        Problem: what a user set is no source; there is none.
    """
    sources: list[Row] = []
    dropped: list[str] = []
    for text in repositories or [debs.DEVICE]:
        if text.strip() == debs.DEVICE:
            own, left = debs.split_remote(description["sources"])
            sources += own
            dropped += left
            continue
        found = debs.parse_sources(text)
        if not found:
            raise Problem(
                f"debian_packages_repositories: {text!r}",
                "'device', a line such as 'deb [signed-by=/path/key.gpg] https://host/path suite component', or a "
                "paragraph of a .sources file",
                "correct it where it is set",
            )
        sources += found
    if not sources:
        raise Problem(
            "no apt source for the controller" + (f"; the device has {', '.join(dropped)}" if dropped else ""),
            "http or https sources on the device, or sources of your own",
            "let the device's own apt install from what it reaches: debian_packages_source: device; or name sources "
            "for the controller: debian_packages_repositories; or fill a folder: debian_packages_source: folder",
        )
    # apt gets them by _logins_of_apt; where there is no apt, the cache fetches
    logins = passwords.with_userinfo([uri for row in sources for uri in row["URIs"].split()])
    fetch.use_logins(logins)
    return passwords.without_userinfo(sources), dropped, logins


@contextlib.contextmanager
def _logins_of_apt(logins: Sequence[str]) -> Iterator[list[str]]:
    """Yield the options with which apt uses logins. They stand in a short-lived file that only its owner can read.

    Args:
        logins: URLs with user and password.

    Raises:
        Problem: apt's format for logins has no way to write one.
    """
    if not logins:
        yield []
        return
    lines = []
    for url in dict.fromkeys(logins):
        parts = urllib.parse.urlsplit(url)
        user, password = (urllib.parse.unquote(word or "") for word in (parts.username, parts.password))
        if any(not word.isprintable() or " " in word for word in (user, password)):
            raise Problem(
                f"{url}: a user or password with a blank or a control character in it",
                "words that apt's auth.conf can hold",
                "give this repository another password; or use debian_packages_source: device",
            )
        place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        lines.append(f"machine {place} login {user} password {password}\n")
    try:
        own = APT_LOGINS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # none, or not this user's
        own = ""
    with tempfile.NamedTemporaryFile("w", prefix="apt-auth-", errors="surrogateescape") as handle:
        handle.write("".join(lines) + own)
        handle.flush()
        yield ["-o", f"Dir::Etc::netrc={handle.name}"]


@contextlib.contextmanager
def _plain(folder: Path) -> Iterator[str]:
    """Yield a path of a folder that apt can use: one without blanks and the like."""
    folder.mkdir(parents=True, exist_ok=True)
    if apt_root.PLAIN.fullmatch(str(folder)):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory(prefix="debs-", dir="/tmp") as parent:
        link = os.path.join(parent, "root")
        os.symlink(folder, link)
        yield link


def _work_out(
    folder: Path,
    description: Mapping[str, Any],
    sources: list[Row],
    dropped: list[str],
    wishes: list[Wish],
    logins: list[str],
) -> tuple[list[dict[str, Any]], list[str]]:
    names = [wish.text for wish in wishes]
    with _plain(folder) as path:
        root = apt_root.AptRoot(path, description["architecture"], description["foreign"])
        root.write(description, sources)
        with _logins_of_apt(logins) as options:
            warnings = root.update(options)
        unknown = [wish.text for wish in wishes if _lookup(wish) not in root.known(wishes)]
        if unknown:
            hints = [*warnings, *dropped, *(f"{path} (not readable on the device)" for path in description["unread"])]
            raise Problem(
                f"no apt source has {', '.join(unknown)}" + ("; " + "; ".join(hints) if hints else ""),
                "these packages in " + ", ".join(f"{row['URIs']} {row['Suites']}" for row in sources),
                "name the repository that has them in debian_packages_repositories (libcusparselt0 and CUDA are in "
                f"NVIDIA's CUDA repository); or {alternatives(unknown)}",
            )
        try:
            simulation, uris = root.simulate(names), root.uris(names)
        except apt_root.AptFailed as error:
            raise Problem(
                f"apt finds no way to install {' '.join(names)}: {error.text}" + "".join(f"\n{w}" for w in warnings),
                "a set of packages that fits what the device has",
                f"try on the device: apt-get --simulate install {' '.join(names)}; or ask for other versions",
            ) from error
    debs.judge(simulation, debs.held(debs.stanzas(description["status"])), apt_root.older)
    old = {(change.name, change.arch): change.old for change in simulation.install}
    weak = [uri.url for uri in uris if not uri.sha256]
    if weak or {(uri.name, uri.arch) for uri in uris} != set(old):
        raise Problem(
            f"no sha256 for {', '.join(weak)}" if weak else "apt names other files than packages: " + str(sorted(old)),
            "a repository that publishes SHA256 checksums for every package",
            "use another repository, or debian_packages_source: folder",
        )
    packages = [
        {
            "name": uri.name,
            "version": uri.version,
            "arch": uri.arch,
            "old": old[uri.name, uri.arch],
            "filename": f"{uri.name}_{uri.version.replace(':', '%3a')}_{uri.arch}.deb",
            "sha256": uri.sha256,
            "size": uri.size,
            "url": uri.url,
        }
        for uri in uris
    ]
    return sorted(packages, key=lambda row: (row["name"], row["arch"])), warnings


def _lookup(wish: Wish) -> str:
    return wish.name + (":" + wish.arch if wish.arch else "")


# ---------------------------------------------------------------- a folder that the user fills


@dataclass(frozen=True)
class Offer:
    """A package file of the user's; size in bytes."""

    path: Path
    filename: str
    sha256: str
    size: int

    def row(self) -> dict[str, Any]:
        """Return it as the device is told of it."""
        return {"filename": self.filename, "sha256": self.sha256, "size": self.size}

    def maybe_for(self, architectures: Sequence[str]) -> bool:
        """Return whether its name leaves open that it fits a device; only its control fields are sure."""
        ending = self.filename[: -len(".deb")].rpartition("_")[2]
        return ending in ("all", *architectures) or not ending.isalnum() or "_" not in self.filename


def read_folder(folder: str, cache: fetch.Cache) -> list[Offer]:
    """Return the packages in a folder.

    Raises:
        Problem: no folder is named; none in it; another checksum than SHA256SUMS there says.
    """
    root = Path(folder).expanduser().absolute()
    if not folder or not root.is_dir():
        raise Problem(
            f"debian_packages_folder {folder!r} is no folder on the controller",
            "a folder with the .deb files that the devices need",
            "make it and fill it, on a machine that has the network: apt-get download NAME …",
        )
    paths = sorted(path for path in root.glob("*.deb") if path.is_file())
    sums = _read_sums(root / "SHA256SUMS")
    digests = _digests(paths, cache)
    faults = [
        f"{path.name} has sha256 {digests[path]}, SHA256SUMS says {sums.get(path.name, 'nothing of it')}"
        for path in paths
        if sums is not None and sums.get(path.name) != digests[path]
    ]
    if faults:
        raise Problem(
            "; ".join(faults),
            f"the files that {root / 'SHA256SUMS'} names",
            "copy them again; or, if they are meant to be as they are, write SHA256SUMS anew: sha256sum *.deb",
        )
    return [Offer(path, path.name, digests[path], path.stat().st_size) for path in paths]


def _read_sums(path: Path) -> dict[str, str] | None:
    if not path.is_file():
        return None
    sums = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _blank, name = line.strip().partition(" ")
        name = name.strip()
        sums[os.path.basename(name[1:] if name.startswith("*") else name)] = digest.lower()
    return sums


def _digests(paths: Sequence[Path], cache: fetch.Cache) -> dict[Path, str]:
    """Return the checksum of each file, computed where size or time are not what they were."""
    store = cache.root / "debs" / "folder-sums.json"
    try:
        known = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    found, changed = {}, False
    for path in paths:
        status = path.stat()
        stamp = f"{status.st_size} {status.st_mtime_ns}"
        row = known.get(str(path))
        if not isinstance(row, dict) or row.get("stamp") != stamp:
            row, changed = {"stamp": stamp, "sha256": str(sha256_file(str(path)))}, True
            known[str(path)] = row
        found[path] = str(row["sha256"])
    if changed:
        write_atomic(str(store), (json.dumps(known, indent=1, sort_keys=True) + "\n").encode("utf-8"), 0o644)
    return found


def head_of(path: Path) -> bytes:
    """Return the beginning of a package up to the end of its control fields: enough for dpkg-deb --field.

    Raises:
        Problem: the file is no Debian package.
    """
    with open(path, "rb") as handle:
        head = handle.read(8)
        while head[:8] == b"!<arch>\n":
            entry = handle.read(60)
            size = entry[48:58].strip()
            if len(entry) < 60 or entry[58:] != b"`\n" or not size.isdigit() or int(size) > _HEAD_BYTES:
                break
            length = int(size) + int(size) % 2
            body = handle.read(length)
            head += entry + body
            if entry.startswith(b"control.tar") and len(body) >= int(size):
                return head
    raise Problem(
        f"{path} is no Debian package", "files as apt-get download makes them", "copy it again, or remove it there"
    )
