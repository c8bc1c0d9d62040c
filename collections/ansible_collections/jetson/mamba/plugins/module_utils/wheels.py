"""Wheels: look into an archive, find what of a set is missing in a site folder, install exactly that."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import shutil
import subprocess
import zipfile
from typing import Any, Mapping, NamedTuple, Sequence
from urllib.parse import quote

from ansible_collections.jetson.mamba.plugins.module_utils import elf, inspection
from ansible_collections.jetson.mamba.plugins.module_utils.environment import clean_environ
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.files import sha256_file, write_atomic
from ansible_collections.jetson.mamba.plugins.module_utils.records import (
    canonical_name,
    find_damage,
    read_entries,
    record_hash,
)
from ansible_collections.jetson.mamba.plugins.module_utils.versions import (
    Target,
    WheelName,
    parse_wheel_name,
    same_version,
    tag_mismatch,
)

# in a .dist-info folder: the sha256 of the file that was installed, where there is no URL to name
ORIGIN = "jetson-mamba-origin.json"
_ERROR_TAIL = 2000
# of the module wheel_set, whose two halves both check them
EXTRA: dict[str, Any] = {
    "name": {"type": "str", "required": True},
    "version": {"type": "str", "required": True},
    "url": {"type": "str"},
    "path": {"type": "str"},
    "sha256": {"type": "str"},
}
ARGUMENTS: dict[str, Any] = {
    "python": {"type": "path", "required": True},
    "site_packages": {"type": "path", "required": True},
    "lock": {"type": "str"},
    "target": {"type": "dict"},
    "extra": {"type": "list", "elements": "dict", "default": [], "options": EXTRA},
    "trust_on_first_use": {"type": "bool", "default": False},
    "cache": {"type": "str"},
    "tmp": {"type": "path", "default": "/tmp"},
    "scope": {"type": "str", "choices": ["venv", "user"], "default": "venv"},
    "verify_hashes": {"type": "list", "elements": "str", "default": []},
    "mode": {"type": "str", "choices": ["query", "install"], "default": "query"},
    "wheels": {"type": "list", "elements": "dict"},
    "source_dir": {"type": "path"},
}
# what the controller's half passes on; the rest is its own affair, and a device logs what its modules are told
ON_DEVICE = ("python", "site_packages", "tmp", "scope", "verify_hashes", "mode", "wheels", "source_dir")
Row = Mapping[str, Any]


class Archive(NamedTuple):
    """What a wheel holds: metadata, the tags of its WHEEL file, and {member: machine} of its shared libraries."""

    name: str
    version: str
    tags: list[str]
    libraries: dict[str, str]


def inspect(path: str) -> Archive:
    """Return what is in a wheel, reading its metadata and 20 bytes of each shared library.

    Raises:
        Problem: it is no readable wheel.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name, version, tags, _info = inspection.read_metadata(archive)
            libraries = {}
            for member in archive.namelist():
                if elf.is_library_name(os.path.basename(member)):
                    with archive.open(member) as stream:
                        machine = elf.machine_of_header(stream.read(elf.HEADER_BYTES))
                    if machine:
                        libraries[member] = machine
    except inspection.ARCHIVE_ERRORS as error:
        raise Problem(
            f"{path} is no readable wheel: {error}",
            "a zip archive with WHEEL and METADATA",
            "fetch or build it again",
        ) from error
    return Archive(name, version, tags, libraries)


def check_name(filename: str, target: Target) -> None:
    """Raise a Problem where a wheel of this file name is not for the target."""
    try:
        reason = tag_mismatch(parse_wheel_name(filename), target)
    except ValueError as error:
        raise Problem(str(error), f"a wheel for {target.describe()}", "give the file its original name") from error
    if reason:
        raise Problem(
            f"{filename}: {reason}", f"a wheel for {target.describe()}", "take the file that was made for this target"
        )


def check_archive(path: str, target: Target) -> Archive:
    """Look into a wheel and raise a Problem where its content is for another machine than its name says.

    A build that falls back to a downloaded x86-64 wheel and renames it is found here.

    Returns:
        What is in it.
    """
    filename = os.path.basename(path)
    check_name(filename, target)
    archive = inspect(path)
    foreign = inspection.foreign_wheel(filename, archive.tags, archive.libraries, target.machine)
    if foreign:
        raise foreign
    for tag in archive.tags:
        parts = tag.split("-")
        inside = WheelName(archive.name, archive.version, "", *([part] for part in parts)) if len(parts) == 3 else None
        reason = tag_mismatch(inside, target) if inside else "its WHEEL file is malformed"
        if reason is None:
            break
    else:
        raise Problem(
            "{}: its WHEEL file says {}".format(filename, ", ".join(archive.tags) or "nothing"),
            f"a wheel for {target.describe()}",
            "take the file that was made for this target",
        )
    return archive


# ---------------------------------------------------------------- what is there


def dist_infos(site_packages: str) -> dict[str, list[str]]:
    """Return {canonical name: folders} of the .dist-info folders of a site folder."""
    found: dict[str, list[str]] = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(site_packages), "*.dist-info"))):
        stem = os.path.basename(path)[: -len(".dist-info")]
        found.setdefault(canonical_name(stem.partition("-")[0]), []).append(path)
    return found


def query(site_packages: str, wheels: Sequence[Row], verify_hashes: Sequence[str] = ()) -> list[dict[str, str]]:
    """Return {name, version, reason} of each wheel that is absent, of another version or build, or damaged.

    Args:
        site_packages: where they shall be; a folder that is absent holds none.
        wheels: {name, version, sha256}; a sha256 is compared where pip recorded the file that it installed from.
        verify_hashes: names whose files are compared with RECORD by hash; others by existence and size.
    """
    installed = dist_infos(site_packages)
    hashed = {canonical_name(name) for name in verify_hashes}
    missing = []
    for wheel in wheels:
        name = canonical_name(wheel["name"])
        reason = _reason(site_packages, installed.get(name, []), wheel, name in hashed)
        if reason:
            missing.append({"name": wheel["name"], "version": wheel["version"], "reason": reason})
    return missing


def _reason(site_packages: str, infos: Sequence[str], wheel: Row, hashed: bool) -> str | None:
    if not infos:
        return "not installed"
    if len(infos) > 1:
        return "several versions are recorded ({}): an installation was interrupted".format(
            ", ".join(os.path.basename(path) for path in infos)
        )
    version = os.path.basename(infos[0])[: -len(".dist-info")].partition("-")[2]
    if not same_version(version, wheel["version"]):
        return f"version {version} is installed"
    damage = find_damage(site_packages, infos[0], hashed)
    if damage:
        return damage
    built = _recorded_sha256(infos[0])
    if built and wheel.get("sha256") and built != wheel["sha256"]:
        return "another build of this version is installed (sha256 {}…, wanted {}…)".format(
            built[:12], wheel["sha256"][:12]
        )
    return None


def _recorded_sha256(dist_info: str) -> str | None:
    """Return the sha256 of the file that a distribution was installed from, where pip (PEP 610) or we recorded it."""
    for name in ("direct_url.json", ORIGIN):
        try:
            with open(os.path.join(dist_info, name), encoding="utf-8") as handle:
                archive = json.load(handle).get("archive_info", {})
            return archive.get("hashes", {}).get("sha256") or archive.get("hash", "").partition("sha256=")[2] or None
        except (OSError, ValueError, AttributeError):
            continue
    return None


def free_mb(path: str) -> int:
    """Return the free megabytes of the file system that a folder is on, or will be on."""
    while path and not os.path.isdir(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    status = os.statvfs(path or "/")
    return status.f_bavail * status.f_frsize >> 20


# ---------------------------------------------------------------- installing


def locate(wheels: Sequence[Row], source_dir: str) -> list[dict[str, Any]]:
    """Return the wheels with the path of each file, every file's sha256 compared.

    Args:
        wheels: {name, version, filename, sha256} each.
        source_dir: folder of the files that were sent.

    Raises:
        Problem: a file is absent, or arrived with another checksum.
    """
    located = []
    for wheel in wheels:
        path = os.path.join(source_dir, wheel["filename"])
        actual = sha256_file(path)
        if actual is None or (wheel.get("sha256") and actual != wheel["sha256"]):
            raise Problem(
                f"{path}: " + (f"sha256 {actual}" if actual else "absent"),
                "sha256 {} on arrival".format(wheel.get("sha256")),
                "run again; if it stays, look at the device's storage (dmesg) and remove the file from the "
                "controller's cache",
            )
        located.append(dict(wheel, path=path, sha256=actual))
    return located


def install(
    python: str, site_packages: str, wheels: Sequence[Row], source_dir: str, scope: str, verify_hashes: Sequence[str]
) -> list[str]:
    """Install exactly these wheels with pip: no index, no dependencies, hashes required.

    Args:
        python: the environment's interpreter.
        site_packages: where they shall end up.
        wheels: see locate().
        source_dir: folder of the files; pip's temporary files go there too.
        scope: "venv", or "user" for pip install --user.
        verify_hashes: see query().

    Returns:
        Lines of `pip check` that concern these wheels.

    Raises:
        Problem: a checksum, pip, or the query afterwards failed.
    """
    located = locate(wheels, source_dir)
    _clear_remains(site_packages, located, scope)
    requirements = os.path.join(source_dir, "requirements.txt")
    with open(requirements, "w", encoding="utf-8") as handle:
        for wheel in located:
            url = "file://" + quote(os.path.abspath(wheel["path"]))
            handle.write("{} @ {} --hash=sha256:{}\n".format(wheel["name"], url, wheel["sha256"]))
    command = [*_pip(python, located), "install", "--no-index", "--no-deps", "--force-reinstall", "--require-hashes"]
    command += ["--no-input", "--disable-pip-version-check", "--no-warn-script-location", "--no-cache-dir"]
    command += ["--user"] if scope == "user" else []
    done = _run([*command, "-r", requirements], source_dir)
    if done.returncode:
        output = done.stdout.decode("utf-8", "replace").strip()
        raise Problem(
            f"pip install: exit status {done.returncode}\n{output[-_ERROR_TAIL:]}",
            f"{len(located)} wheels installed into {site_packages}",
            _pip_advice(output, site_packages),
        )
    for wheel in located:
        _settle_record(site_packages, wheel)
    left = query(site_packages, located, verify_hashes)
    if left:
        raise Problem(
            "after pip reported success: " + "; ".join("{name}: {reason}".format(**row) for row in left),
            f"every wheel whole in {site_packages}",
            "look at the device's storage (dmesg, df -h) and at other programs that write there, then run again",
        )
    return conflicts(python, [wheel["name"] for wheel in located], source_dir)


def _pip(python: str, wheels: Sequence[Row]) -> list[str]:
    """Return the command that starts pip: out of its wheel where that is among those to be installed."""
    for wheel in wheels:
        if canonical_name(wheel["name"]) == "pip":
            return [python, os.path.join(wheel["path"], "pip")]
    if _run([python, "-m", "pip", "--version"], None).returncode == 0:
        return [python, "-m", "pip"]
    raise Problem(
        f"{python} has no pip, and no wheel of pip is in the set",
        "pip in the environment",
        "use a lock that holds pip (the project's own do)",
    )


def _run(command: Sequence[str], temporary: str | None) -> subprocess.CompletedProcess[bytes]:
    # no configuration file: a constraint or an index of the user's must not change what is installed here
    environ = dict(clean_environ(), PIP_CONFIG_FILE=os.devnull)
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if temporary:
        environ["TMPDIR"] = temporary
    return subprocess.run(
        list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environ, cwd="/"
    )


def _pip_advice(output: str, site_packages: str) -> str:
    if "No space left" in output or "Disk quota" in output:
        return f"free space: df -h {site_packages}"
    if "externally-managed-environment" in output:
        return "use the default jetson_platform_scope: venv"
    if "Permission denied" in output:
        return f"look at the owner: ls -ld {site_packages}; the connecting user must own the environment"
    return "read pip's message above; run again, as a half installed package is noticed and installed anew"


def _clear_remains(site_packages: str, wheels: Sequence[Row], scope: str) -> None:
    """Remove what an interrupted pip left and the next one stumbles over: records that cannot be uninstalled."""
    names = {canonical_name(wheel["name"]) for wheel in wheels}
    for name, infos in dist_infos(site_packages).items():
        if name not in names:
            continue
        for info in infos:
            if len(infos) > 1 or not read_entries(info) or not os.path.isfile(os.path.join(info, "METADATA")):
                shutil.rmtree(info)
    if scope == "venv":
        # pip renames what it replaces to ~name and removes it at the end
        for path in glob.glob(os.path.join(glob.escape(site_packages), "~*")):
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)


def _settle_record(site_packages: str, wheel: Row) -> None:
    """Make RECORD true of what is on disk, and the record of a wheel's origin true once its copy is gone.

    Some wheels (numpy's) ship .pyc files, which pip compiles anew over the hashes that RECORD keeps: those hashes go,
    as for every .pyc that pip makes. pip's record of the origin names a temporary copy. It gets the URL that the wheel
    came from, or goes, so that `pip freeze` prints name==version; with `keep_origin` the sha256 is noted instead, so
    that another build of the same version is noticed.
    """
    infos = dist_infos(site_packages).get(canonical_name(wheel["name"]), [])
    if len(infos) != 1:
        return
    direct, note = os.path.join(infos[0], "direct_url.json"), os.path.join(infos[0], ORIGIN)
    # "hash" is the older spelling, which older pips show
    digest = wheel["sha256"]
    origin = {"archive_info": {"hash": "sha256=" + digest, "hashes": {"sha256": digest}}}
    if wheel.get("url"):
        wanted = {direct: dict(origin, url=wheel["url"]), note: None}
    else:
        wanted = {direct: None, note: origin if wheel.get("keep_origin") else None}
    before = [list(row) for row in read_entries(infos[0]) or []]
    replaced = {os.path.relpath(path, site_packages) for path in wanted}
    rows = [[row[0], "", ""] if row[0].endswith(".pyc") else row for row in before if row[0] not in replaced]
    for path, data in wanted.items():
        if data is not None:
            write_atomic(path, json.dumps(data, sort_keys=True).encode("utf-8"), 0o644)
            rows.append([os.path.relpath(path, site_packages), record_hash(path), str(os.path.getsize(path))])
        elif os.path.exists(path):
            os.unlink(path)
    if rows != before:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_atomic(os.path.join(infos[0], "RECORD"), text.getvalue().encode("utf-8"), 0o644)


def conflicts(python: str, names: Sequence[str], temporary: str | None = None) -> list[str]:
    """Return the lines of `pip check` that name one of these distributions."""
    wanted = {canonical_name(name) for name in names}
    done = _run([python, "-m", "pip", "check", "--disable-pip-version-check"], temporary)
    if done.returncode == 0:
        return []
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    return [line for line in lines if wanted & {canonical_name(word.strip(",.")) for word in line.split()}]
