"""Debian packages as data: what is asked for, what dpkg has, where apt looks, and which changes are allowed.

Nothing here runs a program; module_utils/apt_root.py and module_utils/deb_install.py do.
"""

from __future__ import annotations

import fnmatch
import re
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Sequence, Tuple

from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

ARGUMENTS: Dict[str, Any] = {
    "names": {"type": "list", "elements": "str", "required": True},
    "state": {"type": "str", "choices": ["query", "fetched", "present"], "default": "present"},
    "source": {"type": "str", "choices": ["controller", "folder", "device", "none"]},
    "folder": {"type": "str"},
    "repositories": {"type": "list", "elements": "str"},
    "lock_minutes": {"type": "int"},
    "cache": {"type": "str"},
    "tmp": {"type": "path", "default": "/tmp"},
    "transfer": {"type": "dict"},
    "mode": {"type": "str", "choices": ["query", "describe", "choose", "wait", "simulate", "install"]},
    "source_dir": {"type": "path"},
    "files": {"type": "list", "elements": "dict"},
}
# What these variables say holds for every task that does not say it itself, so that a fleet is told once.
SETTINGS: Dict[str, Any] = {"source": "controller", "folder": "", "repositories": [], "lock_minutes": 10}
VARIABLE = "debian_packages_"
# The kernel, the boot chain and the driver of a Jetson. Another release of them is the user's own decision.
FROZEN = "nvidia-l4t-*"
# stands for the device's own sources in the list of repositories
DEVICE = "device"

_WISH = re.compile(r"([a-z0-9][a-z0-9+.-]*[a-z0-9+.])(?::([a-z0-9][a-z0-9-]*))?(?:=([A-Za-z0-9][A-Za-z0-9.+:~-]*))?")
_THERE = ("installed", "triggers-awaited", "triggers-pending")
_BROKEN = ("unpacked", "half-configured", "half-installed")
# what apt's solver reads of an installed package; with Installed-Size among it, it tells a build from a rebuild
_KEPT = (
    *("package", "status", "architecture", "multi-arch", "essential", "important", "protected", "priority"),
    *("section", "installed-size", "source", "version", "provides", "pre-depends", "depends", "conflicts"),
    *("breaks", "replaces"),
)
# options of the one-line format whose deb822 field is not their own name
_FIELDS = {"arch": "Architectures", "lang": "Languages", "target": "Targets"}
_ONE_LINE = re.compile(r"deb\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)\s*(.*)")
_DEPENDENCY = re.compile(r"([a-z0-9][a-z0-9+.-]+)(?::[a-z0-9-]+)?\s*(?:\(\s*([<>=]+)\s*([^\s)]+)\s*\))?")

Row = Dict[str, str]
Compare = Callable[[str, str, str], bool]


class Wish(NamedTuple):
    """A package that shall be there; arch "" is the device's own, version "" is any."""

    text: str
    name: str
    arch: str
    version: str


class Change(NamedTuple):
    """One package that apt would install (old ""), upgrade, or remove (new "")."""

    name: str
    arch: str
    old: str
    new: str

    def words(self) -> str:
        """Return the change as people read it."""
        if not self.new:
            return f"{self.name} {self.old} removed"
        return f"{self.name} {self.old} -> {self.new}" if self.old else f"{self.name} {self.new}"


class Simulation(NamedTuple):
    """What apt would do; configure also names packages that are there and only wait for their configuration."""

    install: List[Change]
    remove: List[Change]
    configure: Sequence[Change] = ()


def parse_wish(text: str) -> Wish:
    """Return what name, name:arch or name=version asks for.

    Raises:
        Problem: it is no package name; apt would take it for a pattern, a path or an option.
    """
    match = _WISH.fullmatch(text)
    if match is None:
        raise Problem(
            f"the package name {text!r}",
            "a Debian package's name, such as g++ or python3.10-dev; name:arch and name=version are understood",
            "correct the list of names",
        )
    return Wish(text, match.group(1), match.group(2) or "", match.group(3) or "")


# ---------------------------------------------------------------- what dpkg has


def stanzas(text: str) -> Iterator[Row]:
    """Yield the paragraphs of a control file as {lower-case field: value}; continuation lines keep their newline."""
    row: Row = {}
    field = ""
    for line in text.splitlines():
        if not line.strip():
            if row:
                yield row
            row, field = {}, ""
        elif line[0] in " \t":
            if field:
                row[field] += "\n" + line
        elif line[0] != "#":
            name, colon, value = line.partition(":")
            if colon:
                field = name.strip().lower()
                row[field] = value.strip()
    if row:
        yield row


def _state(row: Row) -> str:
    return row.get("status", "").split()[-1] if row.get("status") else ""


def installed(rows: Iterable[Row]) -> List[Row]:
    """Return the rows of dpkg's status whose package is there."""
    return [row for row in rows if _state(row) in _THERE]


def held(rows: Iterable[Row]) -> List[str]:
    """Return the names of the packages that an administrator holds."""
    return sorted({row["package"] for row in rows if row.get("status", "").startswith("hold ")})


def broken(rows: Iterable[Row], updates: Sequence[str] = ()) -> List[str]:
    """Return what dpkg left unfinished, in words; empty where all is well.

    Args:
        rows: dpkg's status.
        updates: names of the files in /var/lib/dpkg/updates: an interrupted dpkg leaves numbered ones.
    """
    found = ["dpkg was interrupted"] if any(name.isdigit() for name in updates) else []
    for row in rows:
        words = row.get("status", "").split()
        if len(words) == 3 and (words[2] in _BROKEN or words[1] != "ok"):
            found.append(f"{row['package']} is {words[2] if words[1] == 'ok' else words[1]}")
    return found


def broken_problem(found: Sequence[str]) -> Problem:
    """Return what to say about packages that dpkg left unfinished."""
    return Problem(
        "dpkg on the device has unfinished work: " + ", ".join(found),
        "every package installed or absent, before others are added",
        "repair it on the device: sudo dpkg --configure -a && sudo apt-get --fix-broken install",
    )


def _provided(row: Row) -> Iterator[Tuple[str, str]]:
    for item in row.get("provides", "").split(","):
        match = _DEPENDENCY.match(item.strip())
        if match:
            yield match.group(1), match.group(3) or ""


def missing(wishes: Iterable[Wish], rows: Iterable[Row], architecture: str) -> List[Row]:
    """Return {name, installed} of each wish that the device does not meet; installed is the version there or "".

    Args:
        wishes: what is asked for.
        rows: dpkg's status.
        architecture: the device's own, such as arm64.
    """
    there: Dict[str, List[Row]] = {}
    for row in installed(rows):
        there.setdefault(row["package"], []).append(row)
        for name, version in _provided(row):
            there.setdefault(name, []).append(dict(row, version=version))
    result = []
    for wish in wishes:
        fits = [row for row in there.get(wish.name, []) if row["architecture"] in (wish.arch or architecture, "all")]
        if not any(wish.version in ("", row["version"]) for row in fits):
            result.append({"name": wish.text, "installed": fits[0]["version"] if fits else ""})
    return result


def canonical_status(rows: Iterable[Row]) -> str:
    """Return dpkg's status as apt's solver needs it: two devices with the same packages give the same text."""
    texts = []
    for row in installed(rows):
        words = row["status"].split()
        kept = dict(row, status=f"{words[0]} ok installed")
        texts.append("".join(f"{field.title()}: {kept[field]}\n" for field in _KEPT if field in kept))
    return "\n".join(sorted(texts))


# ---------------------------------------------------------------- where apt looks


def parse_one_line(text: str) -> List[Row]:
    """Return the sources of a .list file as deb822 fields; sources of source code are left out."""
    found = []
    for line in text.splitlines():
        match = _ONE_LINE.fullmatch(line.partition("#")[0].strip())
        if match is None:
            continue
        options, uri, suite, components = match.groups()
        row = {"Types": "deb", "URIs": uri, "Suites": suite}
        if components.strip():
            row["Components"] = " ".join(components.split())
        for option in (options or "").split():
            name, _equals, value = option.partition("=")
            suffix = {"+": "-Add", "-": "-Remove"}.get(name[-1:], "")
            name = name.rstrip("+-").lower()
            field = _FIELDS.get(name, "-".join(part.capitalize() for part in name.split("-")))
            row[field + suffix] = value.replace(",", " ")
        found.append(row)
    return found


def parse_deb822(text: str) -> List[Row]:
    """Return the enabled binary sources of a .sources file; an embedded key is kept."""
    found = []
    for row in stanzas(text):
        types = row.get("types", "").split()
        if "deb" not in types or row.get("enabled", "yes").lower() in ("no", "false", "0"):
            continue
        named = {"uris": "URIs", "signed-by": "Signed-By"}
        kept = {named.get(field, field.title()): value for field, value in row.items() if field != "enabled"}
        found.append(dict(kept, Types="deb"))
    return found


def parse_sources(text: str) -> List[Row]:
    """Return the sources of a text in either format."""
    return parse_deb822(text) if re.search(r"^types\s*:", text, re.I | re.M) else parse_one_line(text)


def keyrings(source: Row) -> List[str]:
    """Return the paths of the keyrings that a source names."""
    value = source.get("Signed-By", "")
    if "BEGIN PGP" in value:
        return []
    return [word for word in re.split(r"[\s,]+", value) if word.startswith("/")]


def with_keyrings(source: Row, places: Mapping[str, str]) -> Row:
    """Return a source whose keyrings are found at other places; a path that is not in places stays."""
    if not keyrings(source):
        return source
    words = [places.get(word, word) for word in re.split(r"[\s,]+", source["Signed-By"]) if word]
    return {**source, "Signed-By": " ".join(words)}


def split_remote(sources: Iterable[Row]) -> Tuple[List[Row], List[str]]:
    """Return the sources that another machine reaches as well, and in words those that it does not."""
    remote, dropped = [], []
    for row in sources:
        uris = row["URIs"].split()
        usable = [uri for uri in uris if uri.startswith(("http://", "https://"))]
        dropped += [f"{uri} (reached on the device only)" for uri in uris if uri not in usable]
        if usable:
            remote.append({**row, "URIs": " ".join(usable)})
    return remote, dropped


def render_sources(sources: Iterable[Row]) -> str:
    """Return the text of a .sources file; of each repository nothing but the package lists is asked."""
    texts = []
    for row in sources:
        whole = {**row, "Targets": "Packages"}
        texts.append("".join(f"{field}: {value}\n" for field, value in whole.items()))
    return "\n".join(texts)


# ---------------------------------------------------------------- which changes are allowed


def judge(simulation: Simulation, holds: Iterable[str], older: Callable[[str, str], bool]) -> None:
    """Refuse changes that nobody asked for.

    Args:
        simulation: what apt would do.
        holds: packages that an administrator holds.
        older: whether a first version is older than a second.

    Raises:
        Problem: something would be removed, downgraded, or changed although it is held or of NVIDIA's L4T.
    """
    kept = set(holds)
    refused = [change.words() for change in simulation.remove]
    installed_too = {change.name for change in simulation.install}
    refused += [
        f"{change.name} {change.new} configured (part of L4T)"
        for change in simulation.configure
        if is_frozen(change.name) and change.name not in installed_too
    ]
    for change in simulation.install:
        if is_frozen(change.name):
            refused.append(f"{change.words()} (part of L4T)")
        elif change.name in kept:
            refused.append(f"{change.words()} (held)")
        elif change.old and older(change.new, change.old):
            refused.append(f"{change.words()} (a downgrade)")
    if refused:
        raise Problem(
            "installing these packages would change others that have to stay: " + "; ".join(refused),
            f"nothing removed, downgraded or taken from hold, and no {FROZEN} installed or upgraded",
            "nothing was changed. Another version of the package may do: name=version in debian_packages_names; or "
            "make this change yourself on the device, when it may be restarted, and run again",
        )


def is_frozen(name: str) -> bool:
    """Return whether a package, with its architecture behind a colon or without, is a part of L4T itself."""
    return fnmatch.fnmatchcase(name, FROZEN)


def frozen_wishes(wishes: Iterable[Wish]) -> List[str]:
    """Return the wishes that name a part of L4T itself."""
    return [wish.text for wish in wishes if is_frozen(wish.name)]


# ---------------------------------------------------------------- what a folder lacks


def unmet(wishes: Iterable[Wish], offered: Iterable[Row], rows: Iterable[Row], compare: Compare) -> List[str]:
    """Return, by name and with the version that is asked for, what neither the device nor the offer has.

    Args:
        wishes: what is asked for.
        offered: control fields of the packages that are offered.
        rows: dpkg's status.
        compare: (version, operator of dpkg --compare-versions, version).
    """
    there: Dict[str, List[Row]] = {}
    by_name: Dict[str, List[Row]] = {}
    for table, source in ((there, installed(rows)), (by_name, list(offered))):
        for row in source:
            table.setdefault(row["package"], []).append(row)
            for name, version in _provided(row):
                table.setdefault(name, []).append(dict(row, version=version))

    lacking: Dict[str, str] = {}
    seen = set()
    queue: List[Tuple[List[Tuple[str, str, str]], str]] = [
        ([(wish.name, "=" if wish.version else "", wish.version)], "") for wish in wishes
    ]
    while queue:
        group, asker = queue.pop(0)
        if any(_find(there, one, compare) for one in group):
            continue
        found = next(filter(None, (_find(by_name, one, compare) for one in group)), None)
        if found is None:
            words = " or ".join(name + (f" ({sign} {version})" if sign else "") for name, sign, version in group)
            lacking.setdefault(words, f", which {asker} needs" if asker else "")
            continue
        if found["package"] in seen:
            continue
        seen.add(found["package"])
        for field in ("pre-depends", "depends"):
            for item in found.get(field, "").split(","):
                alternatives = [_DEPENDENCY.match(part.strip()) for part in item.split("|")]
                parsed = [(m.group(1), m.group(2) or "", m.group(3) or "") for m in alternatives if m]
                if parsed:
                    queue.append((parsed, found["package"]))
    return [words + asked_by for words, asked_by in lacking.items()]


def _find(table: Mapping[str, List[Row]], wanted: Tuple[str, str, str], compare: Compare) -> Row | None:
    name, sign, version = wanted
    for row in table.get(name, []):
        if not sign or (row["version"] and compare(row["version"], sign, version)):
            return row
    return None
