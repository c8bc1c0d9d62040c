"""The device's half of debian_packages: ask dpkg, describe apt's settings, choose from an offer, install."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import stat
import struct
import subprocess
import tempfile
import time
import zlib
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Sequence

from ansible_collections.jetson.mamba.plugins.module_utils import apt_root, debs
from ansible_collections.jetson.mamba.plugins.module_utils.debs import Row, Simulation, Wish
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.files import read_text, sha256_file

STATUS = "/var/lib/dpkg/status"
UPDATES = "/var/lib/dpkg/updates"
DPKG_LOCKS = ("/var/lib/dpkg/lock-frontend", "/var/lib/dpkg/lock")
LISTS_LOCK = "/var/lib/apt/lists/lock"
# how long one call looks at the locks; the controller then says that it waits, and asks again
WAIT_SECONDS = 10.0
# taken between our look and apt's: apt itself waits so long
_LOCK_TIMEOUT = 120
_TAIL_LINES = 15
_FOLDER = "jetson-mamba-debs."
_STALE_SECONDS = 12 * 3600
_SPARE_MB = 200
_OPTIONS = (
    *("-q", "--yes", "--no-install-recommends", "-o", "APT::Install-Suggests=false"),
    *("-o", "APT::Cmd::Pattern-Only=true", "-o", "APT::Sandbox::User=root", "-o", "Dpkg::Use-Pty=0"),
    *("-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold"),
    *("-o", f"DPkg::Lock::Timeout={_LOCK_TIMEOUT}"),
    # whatever the device's own apt.conf allows
    *("-o", "APT::Get::AutomaticRemove=false", "-o", "APT::Get::allow-downgrades=false"),
    *("-o", "APT::Get::allow-remove-essential=false", "-o", "APT::Get::allow-change-held-packages=false"),
    *("-o", "APT::Get::force-yes=false"),
)
# apt with nothing but the files that it is given: no source and no pin, its cache of lists left alone. Without sources
# there is nothing to fetch; --no-download itself makes apt forget where such files are.
_ONLY_FILES = (
    *("-o", "Dir::Etc::sourcelist=/dev/null", "-o", "Dir::Etc::sourceparts=/dev/null"),
    *("-o", "Dir::Etc::preferences=/dev/null", "-o", "Dir::Etc::preferencesparts=/dev/null"),
    *("-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache="),
)


def read_status(path: str = STATUS) -> List[Row]:
    """Return the rows of dpkg's status.

    Raises:
        Problem: there is none; the device is no Debian or Ubuntu.
    """
    text = read_text(path)
    if text is None:
        raise Problem(f"no {path} on the device", "Debian or Ubuntu", "install the packages by the system's own means")
    return list(debs.stanzas(text))


def architecture() -> str:
    """Return the device's own architecture as dpkg names it, such as arm64."""
    status, printed, errors = apt_root.run(["dpkg", "--print-architecture"])
    if status != 0:
        raise Problem(f"dpkg --print-architecture failed: {errors.strip()}", "a dpkg that works", "repair dpkg first")
    return printed.strip()


def query(wishes: Sequence[Wish], tmp: str) -> Dict[str, Any]:
    """Return {missing, unfinished, architecture, architectures, tmp}.

    That is what the device lacks, what dpkg has begun and not ended, what the device can hold, and where files may go.

    Args:
        wishes: what is asked for.
        tmp: folder for transfers; before the first installation it may not be there yet, and /tmp is used.
    """
    rows, native = read_status(), architecture()
    try:
        updates = os.listdir(UPDATES)
    except FileNotFoundError:
        updates = []
    return {
        "missing": debs.missing(wishes, rows, native),
        "unfinished": debs.broken(rows, updates),
        "architecture": native,
        "architectures": [native, *_foreign()],
        "tmp": tmp if os.path.isdir(tmp) else "/tmp",
    }


def _foreign() -> List[str]:
    return apt_root.run(["dpkg", "--print-foreign-architectures"])[1].split()


# ---------------------------------------------------------------- describe


def describe(prefix: str = "") -> Dict[str, Any]:
    """Return what apt needs to know to work out, elsewhere, what this device needs.

    Args:
        prefix: where the device's file system is found, empty for /.

    Returns:
        {architecture, foreign, status, preferences, sources, keys, trusted, unread}; keys and trusted are base64;
        unread names what this user may not read.
    """
    unread: List[str] = []
    sources: List[Row] = []
    apt = prefix + "/etc/apt"
    for path in [apt + "/sources.list", *_files(apt + "/sources.list.d", (".list", ".sources"))]:
        text = _readable(path, unread)
        parse = debs.parse_deb822 if path.endswith(".sources") else debs.parse_one_line
        sources += parse((text or b"").decode("utf-8", "surrogateescape"))
    keys = {}
    for path in sorted({path for row in sources for path in debs.keyrings(row)}):
        data = _readable(prefix + path, unread)
        if data is not None:
            keys[path] = base64.b64encode(data).decode("ascii")
    trusted = {}
    for path in [apt + "/trusted.gpg", *_files(apt + "/trusted.gpg.d", (".gpg", ".asc"))]:
        data = _readable(path, unread)
        if data:
            trusted[os.path.basename(path)] = base64.b64encode(data).decode("ascii")
    pins = [_readable(path, unread) for path in [apt + "/preferences", *_files(apt + "/preferences.d", ("", ".pref"))]]
    return {
        "architecture": architecture(),
        "foreign": _foreign(),
        "status": debs.canonical_status(read_status(prefix + STATUS)),
        "preferences": "\n\n".join(pin.decode("utf-8", "surrogateescape") for pin in pins if pin),
        "sources": sources,
        "keys": keys,
        "trusted": trusted,
        "unread": unread,
    }


def _files(folder: str, endings: Iterable[str]) -> List[str]:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [os.path.join(folder, name) for name in names if os.path.splitext(name)[1] in endings and name[0] != "."]


def _readable(path: str, unread: List[str]) -> bytes | None:
    try:
        with open(path, "rb") as handle:
            return handle.read()
    except (FileNotFoundError, IsADirectoryError):
        return None
    except OSError:
        unread.append(path)
        return None


def pack(description: Mapping[str, Any]) -> str:
    """Return a description as short text."""
    return base64.b64encode(zlib.compress(json.dumps(description).encode("ascii"), 9)).decode("ascii")


def unpack(text: str) -> Dict[str, Any]:
    """Return the description that pack made."""
    found: Dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(text)).decode("ascii"))
    return found


# ---------------------------------------------------------------- choose from an offer


def choose(wishes: Sequence[Wish], files: Sequence[Mapping[str, Any]], folder: str) -> List[Dict[str, Any]]:
    """Return which of the offered files have to be installed.

    Args:
        wishes: what is asked for.
        files: {sha256, filename, size} of each; the beginning of each, up to its control fields, is in folder as
            <sha256>.deb.
        folder: a folder of ours; apt's private root is made in it.

    Returns:
        {name, version, arch, old, sha256, filename} each.

    Raises:
        Problem: something is missing in the offer, with its name; the change is one that is not allowed.
    """
    rows, native = read_status(), architecture()
    index, offered = [], []
    for file in files:
        status, control, errors = apt_root.run(["dpkg-deb", "--field", os.path.join(folder, file["sha256"] + ".deb")])
        fields = next(debs.stanzas(control), {})
        if status != 0 or "package" not in fields:
            raise Problem(
                "{} is no Debian package that can be read: {}".format(file["filename"], errors.strip()),
                "files as apt-get download makes them",
                "copy it again, or remove it from the folder",
            )
        offered.append(fields)
        index.append(control.strip() + "\nFilename: {filename}\nSize: {size}\nSHA256: {sha256}\n".format(**file))
    names = [wish.text for wish in wishes]
    # our own folder in it: this may be root, and what root leaves the connecting user could not remove
    with tempfile.TemporaryDirectory(prefix="choose-", dir=folder) as place:
        repository = os.path.join(place, "offer")
        os.mkdir(repository)
        with open(os.path.join(repository, "Packages"), "w", encoding="utf-8", errors="surrogateescape") as handle:
            handle.write("\n".join(index))
        root = apt_root.AptRoot(os.path.join(place, "root"), native, _foreign())
        source = {"Types": "deb", "URIs": f"file:{repository}", "Suites": "./", "Trusted": "yes"}
        root.write({"status": debs.canonical_status(rows)}, [source])
        complaints = root.update()
        try:
            simulation, uris = root.simulate(names), root.uris(names)
        except apt_root.AptFailed as error:
            fitting = [row for row in offered if row.get("architecture") in (native, "all", *_foreign())]
            lacking = debs.unmet(wishes, fitting, rows, apt_root.compare_versions)
            raise Problem(
                "the folder lacks " + "; ".join(lacking) if lacking else "\n".join([*complaints, error.text]),
                f"everything that {' '.join(names)} needs and the device has not, for {native}",
                "put these packages into the folder and run again",
            ) from error
    debs.judge(simulation, debs.held(rows), apt_root.older)
    by_digest = {file["sha256"]: file for file in files}
    old = {(change.name, change.arch): change.old for change in simulation.install}
    return [
        {
            "name": uri.name,
            "version": uri.version,
            "arch": uri.arch,
            "old": old.get((uri.name, uri.arch), ""),
            "sha256": uri.sha256,
            "filename": by_digest[uri.sha256]["filename"],
        }
        for uri in uris
    ]


# ---------------------------------------------------------------- install


def lock_holder(paths: Sequence[str]) -> str | None:
    """Return who holds one of apt's locks, such as "unattended-upgr (pid 812)", or None."""
    for path in paths:
        try:
            with open(path, "rb") as handle:
                asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
                kind, _whence, _start, _length, pid = struct.unpack("hhqqi", fcntl.fcntl(handle, fcntl.F_GETLK, asked))
        except FileNotFoundError:
            continue
        if kind != fcntl.F_UNLCK:
            name = (read_text(f"/proc/{pid}/comm") or "a process").strip() if pid > 0 else "a process"
            return f"{name} (pid {pid})" if pid > 0 else name
    return None


def wait(paths: Sequence[str], seconds: float) -> str | None:
    """Wait a while for apt's locks; return who still holds one, or None.

    Raises:
        Problem: only root can look at them, and this is another user.
    """
    _require_root()
    until = time.monotonic() + seconds
    while True:
        holder = lock_holder(paths)
        if holder is None or time.monotonic() >= until:
            return holder
        time.sleep(0.5)


def _require_root() -> None:
    if os.geteuid() != 0:
        raise Problem(
            f"user id {os.geteuid()} on the device",
            "root, to install packages",
            "put become: true on the task (the role debian_packages does)",
        )


def simulate(words: Sequence[str], only_files: bool) -> Simulation:
    """Return what apt would do on this device.

    Args:
        words: names, or absolute paths of .deb files.
        only_files: whether these files are all that apt may use.

    Raises:
        Problem: apt finds no way.
    """
    options = [*_OPTIONS, *(_ONLY_FILES if only_files else ())]
    status, printed, errors = apt_root.run(["apt-get", *options, "--simulate", "install", "--", *words])
    if status != 0:
        raise Problem(
            "apt finds no way to install these packages: " + apt_root.refusal(printed, errors),
            "a set of packages that fits what the device has",
            "if it says that something is broken: sudo apt-get --fix-broken install, on the device; otherwise compare "
            "the versions with: apt-cache policy NAME",
        )
    return apt_root.parse_simulation(printed)


def install(wishes: Sequence[Wish], files: Sequence[Mapping[str, Any]], folder: str | None) -> Dict[str, Any]:
    """Install packages, and nothing that judge refuses.

    Args:
        wishes: what shall be there afterwards.
        files: {filename, sha256} of what is to be installed from folder.
        folder: where the files are; None: from the device's own apt sources.

    Returns:
        {packages: [{name, version, arch, old}]} of what was installed or upgraded.

    Raises:
        Problem: not root; a file is not what its sha256 says; no room; the change is not allowed; apt or dpkg failed.
    """
    _require_root()
    if folder is None:
        _status, printed, errors = apt_root.run(["apt-get", *_OPTIONS, "update"])
        return _install(wishes, [wish.text for wish in wishes], False, apt_root.complaints(printed + errors))
    with _own_files(folder, files) as paths:
        _check_room(paths)
        return _install(wishes, paths, True, [])


def _install(wishes: Sequence[Wish], words: Sequence[str], only_files: bool, complaints: List[str]) -> Dict[str, Any]:
    rows = read_status()
    try:
        simulation = simulate(words, only_files)
    except Problem as problem:
        if not complaints:
            raise
        raise Problem(
            "\n".join([problem.found, *complaints]),
            "apt sources that the device reaches, with these packages",
            "repair the device's network or sources (sudo apt-get update), or have the controller fetch the packages: "
            "-e debian_packages_source=controller",
        ) from problem
    debs.judge(simulation, debs.held(rows), apt_root.older)
    automatic = set(apt_root.run(["apt-mark", "showauto"])[1].split())
    # a simulation has to name what would go, so only here it is forbidden
    _apt_get_install([*_OPTIONS, "--no-remove", *(_ONLY_FILES if only_files else ()), "install", "--", *words])
    lacking = debs.missing(wishes, read_status(), architecture())
    if lacking:
        raise Problem(
            "apt-get ended well, and yet the device lacks " + ", ".join(row["name"] for row in lacking),
            "all that was asked for",
            "look at /var/log/apt/term.log on the device",
        )
    _mark_automatic(simulation, wishes, automatic)
    done = [
        {"name": change.name, "version": change.new, "arch": change.arch, "old": change.old}
        for change in simulation.install
    ]
    return {"packages": done}


@contextlib.contextmanager
def _own_files(folder: str, files: Sequence[Mapping[str, Any]]) -> Iterator[List[str]]:
    """Yield the files, verified, in a folder of root: the delivery goes when the controller does, and apt goes on."""
    parent = os.path.dirname(folder.rstrip("/"))
    for name in os.listdir(parent):
        path = os.path.join(parent, name)
        # what a run left that was killed together with its cleaning
        if name.startswith(_FOLDER) and _is_stale(path):
            shutil.rmtree(path, ignore_errors=True)
    place = tempfile.mkdtemp(prefix=_FOLDER, dir=parent)
    try:
        paths = []
        for file in files:
            sent, path = os.path.join(folder, file["filename"]), os.path.join(place, file["filename"])
            try:
                os.link(sent, path)
            except OSError:
                shutil.copyfile(sent, path)
            os.chown(path, os.geteuid(), -1)
            actual = sha256_file(path)
            if actual != file["sha256"]:
                expected = "sha256 {}".format(file["sha256"])
                raise Problem(f"sha256 {actual} for {sent}", expected, "run again: the file is then sent anew")
            paths.append(path)
        yield paths
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _is_stale(path: str) -> bool:
    status = os.lstat(path)
    own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return own and time.time() - status.st_mtime > _STALE_SECONDS


def _check_room(paths: Sequence[str]) -> None:
    """Refuse to begin what would fill the disk: dpkg leaves half of it then."""
    needed = 0
    for path in paths:
        size = apt_root.run(["dpkg-deb", "--field", path, "Installed-Size"])[1].strip()
        needed += int(size) if size.isdigit() else os.path.getsize(path) >> 10
    root = os.statvfs("/usr")
    free_mb = root.f_bavail * root.f_frsize >> 20
    if (needed >> 10) + _SPARE_MB > free_mb:
        raise Problem(
            f"{free_mb} MB free for /usr on the device",
            f"{(needed >> 10) + _SPARE_MB} MB for {len(paths)} packages",
            "free space there and run again; nothing was changed",
        )


def _apt_get_install(words: Sequence[str]) -> None:
    """Run apt-get so that it ends its work even where the connection does not last."""
    env = {
        **os.environ,
        "LC_ALL": "C",
        "LANGUAGE": "C",
        "PATH": apt_root.PATH,
        "DEBIAN_FRONTEND": "noninteractive",
        "NEEDRESTART_MODE": "l",
    }
    with tempfile.TemporaryFile() as log:
        status = subprocess.call(
            ["apt-get", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            cwd="/",
            start_new_session=True,
        )
        log.seek(0)
        lines = log.read().decode("utf-8", "replace").strip().splitlines()
    if status != 0:
        raise Problem(
            f"apt-get install ended with {status}; its last lines:\n  " + "\n  ".join(lines[-_TAIL_LINES:]),
            "every package installed and configured",
            "/var/log/apt/term.log on the device has all of it; mend what it names, then on the device: "
            "sudo dpkg --configure -a && sudo apt-get --fix-broken install, and run again",
        )


def _mark_automatic(simulation: Simulation, wishes: Sequence[Wish], before: Iterable[str]) -> None:
    """Leave as manually installed only what was asked for, as apt does with names; files would all count as such."""
    asked = {wish.name for wish in wishes}
    if not asked <= {row["package"] for row in debs.installed(read_status())}:
        return  # a provided name: which package stands for it is not ours to guess
    kept = set(before)
    automatic = [
        change.name if change.arch == "all" else f"{change.name}:{change.arch}"
        for change in simulation.install
        if (change.name in kept if change.old else change.name not in asked)
    ]
    if automatic:
        apt_root.run(["apt-mark", "auto", *automatic])
