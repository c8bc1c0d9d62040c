"""Read requirement files that are locked by hash, in pip's own format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.versions import Target, canonical_name
from packaging.markers import InvalidMarker, Marker
from packaging.requirements import InvalidRequirement, Requirement

_HASH = re.compile(r"\s--hash=sha256:([0-9a-f]{64})(?=\s|$)")
_ANY_OPTION = re.compile(r"\s--?[A-Za-z]")
# what tools/lock.py writes above each requirement: the one file that the hash belongs to
_FILE_COMMENT = re.compile(r"#\s*(\S+\.whl) (\d+)\s*$")
_REGENERATE = "write the lock again with tools/lock.py (its header says how), or give one that uv or pip-compile wrote"


@dataclass(frozen=True)
class Locked:
    """One line of a lock.

    Args:
        name: canonical name.
        version: exact version.
        hashes: sha256 hex digests of the files that may be used.
        filename: the wheel's file name, where the lock says it.
        size: its size in bytes, where the lock says it.
    """

    name: str
    version: str
    hashes: tuple[str, ...]
    filename: str | None = None
    size: int | None = None

    def line(self) -> str:
        """Return the requirement as pip reads it."""
        return f"{self.name}=={self.version} " + " ".join(f"--hash=sha256:{digest}" for digest in self.hashes)


def marker_environment(target: Target) -> dict[str, str]:
    """Return the values that environment markers see on the target (a Linux with CPython)."""
    return {
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": target.machine,
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": target.python + ".0",
        "python_version": target.python,
        "sys_platform": "linux",
        "extra": "",
    }


def read_lock(path: str | Path, target: Target | None = None) -> list[Locked]:
    """Return the locked requirements of a file.

    Args:
        path: the lock.
        target: evaluate environment markers for this target; without it every line counts.

    Raises:
        Problem: no such file, or a line that is not `name==version --hash=sha256:…`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise Problem(
            f"{path}: {error.strerror}",
            "a lock of the wheels that every environment gets",
            "correct the platform row's lock, or torch_jetpack_lock",
        ) from error
    return parse_lock(text, str(path), target)


def parse_lock(text: str, origin: str, target: Target | None = None) -> list[Locked]:
    """Return the locked requirements of a lock's text; `origin` is its name for messages (see read_lock)."""
    locked: dict[str, Locked] = {}
    comment: re.Match[str] | None = None
    pending, first_line = "", 0
    for number, raw in enumerate([*text.splitlines(), ""], start=1):
        line = raw.strip()
        if line.startswith("#"):
            comment = _FILE_COMMENT.match(line) or (comment if pending else None)
            continue
        first_line = first_line or number
        pending += " " + re.sub(r"\s#.*$", "", line.rstrip("\\"))
        if line.endswith("\\"):
            continue
        statement, pending = pending.strip(), ""
        if statement:
            entry = _parse_statement(statement, f"{origin}, line {first_line}", target, comment)
            if entry is not None:
                if entry.name in locked and locked[entry.name].version != entry.version:
                    raise Problem(
                        f"{origin}, line {first_line}: {entry.name} {entry.version} and {locked[entry.name].version}",
                        "one version of each package",
                        _REGENERATE,
                    )
                locked[entry.name] = entry
            comment = None
        first_line = 0
    return list(locked.values())


def _parse_statement(
    statement: str, where: str, target: Target | None, comment: re.Match[str] | None
) -> Locked | None:
    hashes = tuple(_HASH.findall(statement))
    rest = _HASH.sub("", statement).strip()
    if rest.startswith("-") or _ANY_OPTION.search(rest):
        raise Problem(
            f"{where}: {statement}",
            "only requirements with sha256 hashes (options belong into pip's own configuration)",
            _REGENERATE,
        )
    try:
        requirement = Requirement(rest)
    except InvalidRequirement as error:
        raise Problem(f"{where}: {rest}: {error}", "name==version --hash=sha256:…", _REGENERATE) from error
    pins = [spec.version for spec in requirement.specifier if spec.operator == "==" and "*" not in spec.version]
    if len(pins) != 1 or len(requirement.specifier) != 1 or requirement.url or not hashes:
        raise Problem(
            f"{where}: {rest} with {len(hashes)} sha256 hashes",
            "one exact version (name==version) and at least one sha256 hash",
            _REGENERATE,
        )
    if target is not None and requirement.marker is not None and not _applies(requirement.marker, target):
        return None
    return Locked(
        canonical_name(requirement.name),
        pins[0],
        hashes,
        comment.group(1) if comment else None,
        int(comment.group(2)) if comment else None,
    )


def _applies(marker: Marker, target: Target) -> bool:
    try:
        return marker.evaluate(marker_environment(target))
    except InvalidMarker:  # pragma: no cover - packaging parsed it already
        return True


def find_version(entries: list[Locked], name: str) -> str | None:
    """Return the locked version of a package, or None."""
    wanted = canonical_name(name)
    return next((entry.version for entry in entries if entry.name == wanted), None)
