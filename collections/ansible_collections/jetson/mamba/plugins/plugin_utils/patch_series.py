"""Read and check files/patches/<package>/<version>/series.yml, on the controller."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from typing import Any

import yaml
from ansible_collections.jetson.mamba.plugins.module_utils import patches
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.records import canonical_name
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

SCHEMA = 1
APPLIES_TO = ("python", "source")
_TOP_KEYS = ("schema", "package", "version", "patches")
_TEXT_KEYS = ("file", "target", "sha256_before", "sha256_after", "applies_to", "why", "upstream")
_PATCH_KEYS = (*_TEXT_KEYS, "until", "when")
_FILE_NAME = re.compile(r"[0-9]{4}-[A-Za-z0-9._-]+\.patch")
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+!-]*")
_HUNK = re.compile(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")


def load_series(
    root: str, package: str, version: str, companions: Mapping[str, str | None], applies_to: str = "python"
) -> list[dict[str, Any]]:
    """Return the patches that one version of a package needs beside its companions, in order.

    Args:
        root: the folder files/patches.
        package: name of the distribution, spelled with - or _.
        version: its version; a local part (+cu126) is ignored where no folder has it.
        companions: version of every package that a condition of the series may name; None for one that is not
            installed, beside which no patch is needed.
        applies_to: "python" for patches to installed files, "source" for those that go before a build.

    Returns:
        Plain dicts with the keys of the series file and the text of the diff as "diff". Empty where there is no folder
        for the version: it needs no patch.

    Raises:
        Problem: the series file or one of its patches is not what it should be.
    """
    if applies_to not in APPLIES_TO:
        raise Problem(f"applies_to is {applies_to!r}", " or ".join(APPLIES_TO), "correct the task")
    if not os.path.isdir(root):
        raise Problem(f"{root} is no folder", "the folder files/patches", "correct source_patches_root")
    folder = _find_folder(root, package, version)
    if folder is None:
        return []
    path = os.path.join(folder, "series.yml")
    rows = _read_rows(path, canonical_name(package), os.path.basename(folder))
    wanted = []
    for row in rows:
        patch = dict(row, diff=_read_diff(folder, row))
        if row["applies_to"] == applies_to and _is_met(row.get("when") or {}, companions, f"{path}: {row['file']}"):
            wanted.append(patch)
    patches.chains(wanted)
    return wanted


def _find_folder(root: str, package: str, version: str) -> str | None:
    """Return the folder of a version's series, or None."""
    for name, text in (("package", package), ("version", version)):
        if not isinstance(text, str) or not _FOLDER_NAME.fullmatch(text):
            raise Problem(f"the {name} is {text!r}", "a name or version as pip prints it, quoted", "correct the task")
    for name in (version, version.partition("+")[0]):
        folder = os.path.join(root, canonical_name(package), name)
        if os.path.isdir(folder):
            return folder
    return None


def _read_rows(path: str, package: str, version: str) -> list[dict[str, Any]]:
    """Return the patches of a series file, each checked by itself."""
    try:
        with open(path, encoding="utf-8") as stream:
            data = yaml.safe_load(stream)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Problem(f"{path} cannot be read: {error}", "a YAML file", "correct it, or remove its folder") from error
    _check_keys(data, _TOP_KEYS, _TOP_KEYS, path)
    for key, wanted in (("schema", SCHEMA), ("package", package), ("version", version)):
        if data[key] != wanted:
            raise Problem(f"{path}: {key} is {data[key]!r}", repr(wanted), "correct it; versions are quoted")
    rows = data["patches"]
    if not isinstance(rows, list) or not rows:
        raise Problem(
            f"{path}: patches is {rows!r}", "a list of one patch or more", "remove the folder if none is left"
        )
    for index, row in enumerate(rows, start=1):
        _check_row(row, version, f"{path}: patch {index}")
    names = [row["file"] for row in rows]
    if names != sorted(set(names)):
        raise Problem(f"{path}: the patches are {', '.join(names)}", "each once, in ascending order", "renumber them")
    stray = sorted(name for name in os.listdir(os.path.dirname(path)) if name.endswith(".patch") and name not in names)
    if stray:
        raise Problem(f"{path} does not name {', '.join(stray)}", "every patch of the folder", "add or remove them")
    return rows


def _check_keys(data: object, allowed: tuple[str, ...], required: tuple[str, ...], where: str) -> None:
    """Refuse what is no mapping, an unknown key (with the nearest known one) or a missing key."""
    if not isinstance(data, dict):
        raise Problem(f"{where} is {type(data).__name__}", f"a mapping: {', '.join(required)}", "correct it")
    for key in data:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            raise Problem(
                f"{where} has the unknown key {key!r}",
                f"only {', '.join(allowed)}",
                f"did you mean {near[0]!r}?" if near else "remove it",
            )
    missing = [key for key in required if key not in data]
    if missing:
        raise Problem(f"{where} lacks {', '.join(missing)}", f"the keys {', '.join(required)}", "add what is missing")


def _check_row(row: object, version: str, where: str) -> None:
    """Check one patch's keys and values."""
    _check_keys(row, _PATCH_KEYS, (*_TEXT_KEYS, "until"), where)
    assert isinstance(row, dict)
    for key in _TEXT_KEYS:
        if not isinstance(row[key], str) or not row[key].strip():
            raise Problem(f"{where}: {key} is {row[key]!r}", "text", "fill it in, quoted if it looks like a number")
    if not _FILE_NAME.fullmatch(row["file"]):
        raise Problem(f"{where}: file is {row['file']!r}", "a name like 0001-what-it-does.patch", "rename it")
    patches.check_target(row["target"], where)
    for key in ("sha256_before", "sha256_after"):
        if not patches.is_sha256(row[key]):
            raise Problem(f"{where}: {key} is {row[key]!r}", "64 lower-case hexadecimal digits", "run sha256sum")
    if row["applies_to"] not in APPLIES_TO:
        raise Problem(f"{where}: applies_to is {row['applies_to']!r}", " or ".join(APPLIES_TO), "correct it")
    _check_until(row["until"], version, where)
    when = row.get("when") or {}
    if not isinstance(when, dict) or not all(isinstance(text, str) for text in (*when, *when.values())):
        raise Problem(f"{where}: when is {when!r}", 'a mapping like {causal_conv1d: ">=1.5.1"}', "correct it")
    for name, specifier in when.items():
        try:
            SpecifierSet(specifier)
        except InvalidSpecifier as error:
            raise Problem(f"{where}: when {name} is {specifier!r}", 'like ">=1.5.1"', "correct it") from error


def _check_until(until: object, version: str, where: str) -> None:
    """Check the version from which a patch is no longer needed; None says that upstream has not changed it yet."""
    if until is None:
        return
    try:
        if isinstance(until, str) and Version(until) > Version(version):
            return
    except InvalidVersion:
        pass
    raise Problem(f"{where}: until is {until!r}", f"a quoted version after {version}, or null", "correct it")


def _is_met(when: Mapping[str, str], companions: Mapping[str, str | None], where: str) -> bool:
    """Return whether the companions' versions are those that a patch is for."""
    versions = {canonical_name(name): version for name, version in companions.items()}
    for name, specifier in when.items():
        if canonical_name(name) not in versions:
            raise Problem(
                f"{where} depends on {name}, whose version was not given",
                f"companions with {name}: a version, or null where it is not installed",
                f"add {name} to companions",
            )
        found = versions[canonical_name(name)]
        if found is None:
            return False
        try:
            if not SpecifierSet(specifier).contains(Version(str(found)), prereleases=True):
                return False
        except InvalidVersion as error:
            raise Problem(f"{name} has the version {found!r}", "a version as pip prints it", "correct it") from error
    return True


def _read_diff(folder: str, row: Mapping[str, Any]) -> str:
    """Return the text of a patch file after checking that it is one whole unified diff of the row's target."""
    path = os.path.join(folder, row["file"])
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(
            f"{path} cannot be read: {error}", "a UTF-8 unified diff", "add it, or correct its series"
        ) from error
    fault = _diff_fault(text, row["target"])
    if fault:
        raise Problem(
            f"{path}: {fault}",
            f"one unified diff from a/{row['target']} to b/{row['target']}",
            "make it again: diff -u --label a/TARGET --label b/TARGET PRISTINE CHANGED",
        )
    return text


def _diff_fault(text: str, target: str) -> str | None:
    """Return what is wrong with a unified diff, or None. Lines before its header are a description."""
    lines = text.split("\n")
    if lines.pop() != "":
        return "the last line does not end"
    start = next((index for index, line in enumerate(lines) if line.startswith("--- ")), None)
    if start is None or len(lines) < start + 3:
        return "it has no header or no hunk"
    for line, wanted in ((lines[start], f"--- a/{target}"), (lines[start + 1], f"+++ b/{target}")):
        if line.split("\t")[0] != wanted:
            return f"the header says {line!r}"
    index = start + 2
    while index < len(lines):
        header = _HUNK.match(lines[index])
        if not header:
            return f"line {index + 1} is outside of a hunk: {lines[index]!r}"
        old, new = (int(count) if count is not None else 1 for count in header.groups())
        index += 1
        while index < len(lines) and (old > 0 or new > 0 or lines[index].startswith("\\")):
            mark = lines[index][:1]
            if mark not in (" ", "-", "+", "\\"):
                return f"line {index + 1} is no line of a hunk: {lines[index]!r}"
            old -= mark in (" ", "-")
            new -= mark in (" ", "+")
            index += 1
        if (old, new) != (0, 0):
            return f"the hunk before line {index + 1} has another number of lines than its header says"
    return None
