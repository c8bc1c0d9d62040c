"""apt in a private root: the packages, sources and keys of some device, and nothing of the machine that it runs on.

The machine's own apt.conf stays in force, so that its proxy and its credentials are used.
"""

from __future__ import annotations

import base64
import os
import re
import subprocess
import urllib.parse
from typing import Any, List, Mapping, NamedTuple, Sequence, Tuple

from ansible_collections.jetson.mamba.plugins.module_utils import debs
from ansible_collections.jetson.mamba.plugins.module_utils.debs import Change, Row, Simulation
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.files import write_atomic

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# apt can verify signatures and read its settings only where a path needs no quoting
PLAIN = re.compile(r"/[A-Za-z0-9/._+-]+")
# what a simulation says of a package; further lists in brackets, of what is broken meanwhile, may follow
_INST = re.compile(r"Inst ([^\s:]+)(?::\S+)?(?: \[([^\]]*)\])? \((\S+)[^\[]*\[([^\]\s]+)\]\)(?: \[.*)?")
_REMV = re.compile(r"(?:Remv|Purg) ([^\s:]+)(?::\S+)?(?: \[([^\]]*)\])?(?: \[.*)?")
_CONF = re.compile(r"Conf ([^\s:]+)(?::\S+)? \((\S+)[^\[]*\[([^\]\s]+)\]\)")
_ACTIONS = ("Inst", "Remv", "Purg", "Conf")
_URI = re.compile(r"'([^']+)' ([^\s_]+)_([^\s_]+)_([^\s_]+)\.deb (\d+)(?: (\w+):([0-9A-Fa-f]+))?")

_SETTINGS = """\
Dir::State "{root}";
Dir::State::lists "{root}/lists/";
Dir::State::status "{root}/status";
Dir::State::extended_states "{root}/extended_states";
Dir::Cache "{root}";
Dir::Cache::archives "{root}/archives/";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{root}/sources.list.d/";
Dir::Etc::trusted "/dev/null";
Dir::Etc::trustedparts "{root}/trusted.gpg.d/";
Dir::Etc::preferences "{root}/preferences";
Dir::Etc::preferencesparts "/dev/null";
Dir::Log "{root}";
#clear APT::Architectures;
APT::Architecture "{architecture}";
APT::Architectures {{ {architectures} }};
#clear APT::Default-Release;
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
APT::Cmd::Pattern-Only "true";
APT::Get::AllowUnauthenticated "false";
APT::Get::AutomaticRemove "false";
APT::Get::allow-downgrades "false";
APT::Get::allow-remove-essential "false";
APT::Get::allow-change-held-packages "false";
APT::Get::force-yes "false";
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Sandbox::User "root";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowDowngradeToInsecureRepositories "false";
Acquire::ForceHash "SHA256";
Acquire::Languages "none";
"""


class AptFailed(Exception):
    """apt-get ended with an error; text is what it said."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class Uri(NamedTuple):
    """One file that apt would fetch; size in bytes, sha256 "" where the repository names none."""

    url: str
    name: str
    version: str
    arch: str
    size: int
    sha256: str


def run(argv: Sequence[str]) -> Tuple[int, str, str]:
    """Run a program in the C locale; return exit status, output and errors."""
    env = {**os.environ, "LC_ALL": "C", "LANGUAGE": "C", "PATH": PATH, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        list(argv),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=env,
        cwd="/",
        text=True,
        errors="replace",
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def compare_versions(one: str, sign: str, other: str) -> bool:
    """Compare two versions as dpkg does; sign is one of < <= = >= > << >>."""
    return run(["dpkg", "--compare-versions", one, sign, other])[0] == 0


def older(one: str, other: str) -> bool:
    """Return whether a version is older than another."""
    return compare_versions(one, "<<", other)


def parse_simulation(printed: str) -> Simulation:
    """Return what `apt-get --simulate` printed.

    Raises:
        Problem: a line that names a change and cannot be read: what is not understood is not allowed.
    """
    install: List[Change] = []
    remove: List[Change] = []
    configure: List[Change] = []
    for line in map(str.rstrip, printed.splitlines()):
        if line.partition(" ")[0] not in _ACTIONS:
            continue
        inst, gone, conf = _INST.fullmatch(line), _REMV.fullmatch(line), _CONF.fullmatch(line)
        if inst:
            name, old, new, arch = inst.groups()
            install.append(Change(name, arch, old or "", new))
        elif gone:
            remove.append(Change(gone.group(1), "", gone.group(2) or "", ""))
        elif conf:
            configure.append(Change(conf.group(1), conf.group(3), conf.group(2), conf.group(2)))
        else:
            raise _unreadable(line)
    return Simulation(install, remove, configure)


def _unreadable(line: str) -> Problem:
    return Problem(
        f"apt-get prints a line that is not understood: {line!r}",
        "every change named as apt-get of Debian and Ubuntu names it; nothing was changed",
        "see what apt makes of it (apt-get --simulate install NAME, on the device) and install these packages "
        "yourself; please report the line",
    )


def parse_uris(printed: str) -> List[Uri]:
    """Return what `apt-get --print-uris` printed. Raises Problem where a line cannot be read."""
    found = []
    for line in map(str.strip, printed.splitlines()):
        if not line.startswith("'"):
            continue
        match = _URI.fullmatch(line)
        if match is None:
            raise _unreadable(line)
        url, *parts, size, kind, digest = match.groups()
        name, version, arch = map(urllib.parse.unquote, parts)
        found.append(Uri(url, name, version, arch, int(size), (digest or "").lower() if kind == "SHA256" else ""))
    return found


def complaints(printed: str) -> List[str]:
    """Return apt's warnings and errors without their letter, each once."""
    return list(dict.fromkeys(line[3:].strip() for line in printed.splitlines() if line[:3] in ("W: ", "E: ")))


def refusal(printed: str, errors: str) -> str:
    """Return why apt-get finds no way: its errors, and the unmet dependencies that it prints with its output."""
    _before, found, rest = printed.partition("The following packages have unmet dependencies:\n")
    unmet = [found.strip(), *(line for line in rest.splitlines() if line.startswith(" "))] if found else []
    return "\n".join([*unmet, *(complaints(errors) or [errors.strip()])])


class AptRoot:
    """A folder in which apt-get works out what a device needs.

    Args:
        folder: an absolute path that PLAIN matches; made where it is absent, lists in it are kept.
        architecture: the device's own, such as arm64.
        foreign: further architectures that dpkg is set up for.
    """

    def __init__(self, folder: str, architecture: str, foreign: Sequence[str] = ()) -> None:
        self.folder = folder
        self._architectures = [architecture, *foreign]
        self._settings = os.path.join(folder, "apt.conf")

    def write(self, description: Mapping[str, Any], sources: Sequence[Row], trusted_keys: bool = True) -> None:
        """Put down what a device has.

        Args:
            description: {status, preferences, keys: {path: base64}, trusted: {file name: base64}}.
            sources: where to look; a keyring that keys holds is taken from there.
            trusted_keys: whether sources that name no key may be signed with one of trusted.
        """
        for name in ("lists/partial", "archives/partial", "sources.list.d", "trusted.gpg.d", "keys"):
            os.makedirs(os.path.join(self.folder, name), exist_ok=True)
        for folder in ("trusted.gpg.d", "keys"):
            for old in os.listdir(os.path.join(self.folder, folder)):
                os.unlink(os.path.join(self.folder, folder, old))
        places = {}
        for number, (path, data) in enumerate(sorted(description.get("keys", {}).items())):
            name = "{}{}".format(number, ".asc" if path.endswith(".asc") else ".gpg")
            places[path] = self._put(f"keys/{name}", base64.b64decode(data))
        for name, data in description.get("trusted", {}).items() if trusted_keys else ():
            self._put("trusted.gpg.d/" + os.path.basename(name), base64.b64decode(data))
        quoted = " ".join(f'"{name}";' for name in self._architectures)
        text = _SETTINGS.format(root=self.folder, architecture=self._architectures[0], architectures=quoted)
        self._put("apt.conf", text.encode("utf-8"))
        self._put("status", (description["status"] + "\n").encode("utf-8", "surrogateescape"))
        self._put("preferences", description.get("preferences", "").encode("utf-8", "surrogateescape"))
        rendered = debs.render_sources([debs.with_keyrings(row, places) for row in sources])
        self._put("sources.list.d/all.sources", rendered.encode("utf-8", "surrogateescape"))

    def _put(self, name: str, data: bytes) -> str:
        path = os.path.join(self.folder, name)
        write_atomic(path, data, 0o644)
        return path

    def update(self, options: Sequence[str] = ()) -> List[str]:
        """Fetch the package lists; return what apt complained about (lists that it already has stay).

        Args:
            options: further ones of apt-get.
        """
        status, printed, errors = self._apt_get(*options, "update")
        found = complaints(printed + errors)
        return found or ([f"apt-get update ended with {status}"] if status else [])

    def known(self, wishes: Sequence[debs.Wish]) -> List[str]:
        """Return the names that the package lists or the device know, real or provided."""
        names = sorted({wish.name + (":" + wish.arch if wish.arch else "") for wish in wishes})
        _status, printed, _errors = run(["apt-cache", "-c", self._settings, "showpkg", *names])
        known = []
        for block in re.split(r"^Package: ", printed, flags=re.M)[1:]:
            name = block.splitlines()[0].strip()
            versions = re.search(r"^Versions: *\n(.+?)\n", block, re.M)
            provides = re.search(r"^Reverse Provides: *\n(.+)", block, re.M)
            if (versions and versions.group(1).strip()) or (provides and provides.group(1).strip()):
                known.append(name)
        return known

    def simulate(self, names: Sequence[str]) -> Simulation:
        """Return what installing these would do.

        Raises:
            AptFailed: apt finds no way.
            Problem: what it says cannot be read.
        """
        return parse_simulation(self._ask("--simulate", names))

    def uris(self, names: Sequence[str]) -> List[Uri]:
        """Return the files that installing these takes.

        Raises:
            AptFailed: apt finds no way.
            Problem: what it says cannot be read.
        """
        return parse_uris(self._ask("--print-uris", names))

    def _ask(self, option: str, names: Sequence[str]) -> str:
        status, printed, errors = self._apt_get("install", "--yes", "--no-install-recommends", option, "--", *names)
        if status != 0:
            raise AptFailed(refusal(printed, errors))
        return printed

    def _apt_get(self, *words: str) -> Tuple[int, str, str]:
        return run(["apt-get", "-c", self._settings, "-q", *words])
