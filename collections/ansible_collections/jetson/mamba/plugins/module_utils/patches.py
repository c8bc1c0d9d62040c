"""Bring installed files to what a patch series says, or back, without ever touching a file that nobody knows.

A series is a list of plain dicts (keys file, target, sha256_before, sha256_after, diff), as
plugin_utils/patch_series.py loads it. Several patches of one target form a chain of checksums. Nothing is written
before every target has been looked at and its new content has been computed and verified.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import glob
import hashlib
import io
import json
import os
import re
import stat
import subprocess
import tempfile
from typing import Any, Mapping, NamedTuple, Sequence

from ansible_collections.jetson.mamba.plugins.module_utils import files
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.records import canonical_name

RECORD_SCHEMA = 1
_PATCH_SECONDS = 60
_SHA256 = re.compile(r"[0-9a-f]{64}")

ABSENT = "absent"
PRISTINE = "pristine"
PARTIAL = "partial"  # the first patches of a chain are applied, the last are not
PATCHED = "patched"
OUTDATED = "outdated"  # patched by an earlier series of ours; the pristine original is still kept
UNKNOWN = "unknown"


class Step(NamedTuple):
    """One patch of a chain: the name of its file and its unified diff."""

    file: str
    diff: str


class Chain(NamedTuple):
    """All patches of one target: hashes[0] is pristine, steps[i] leads from hashes[i] to hashes[i + 1]."""

    target: str
    hashes: tuple[str, ...]
    steps: tuple[Step, ...]


class Request(NamedTuple):
    """What is wanted.

    Args:
        site_packages: folder that the targets are relative to (a source tree where tracked is False).
        state_dir: folder of the originals and of the memory; outside site_packages.
        package: name of the distribution.
        version: the version that the series belongs to.
        series: the patches, in order.
        present: True to have the patches applied, False to have the pristine files back.
        tracked: True for an installed distribution, whose RECORD is kept true; False for a source tree.
    """

    site_packages: str
    state_dir: str
    package: str
    version: str
    series: Sequence[Mapping[str, Any]]
    present: bool = True
    tracked: bool = True


class _Change(NamedTuple):
    """What one target is and shall become; after is None where the file stays as it is."""

    target: str
    path: str
    status: str
    wanted: str
    before: bytes
    after: bytes | None
    original: bytes | None


def chains(series: Sequence[Mapping[str, Any]]) -> list[Chain]:
    """Group a series by target, in the order of the first patch of each.

    Raises:
        Problem: a path or checksum is malformed, or a patch does not start where the one before it ends.
    """
    grouped: dict[str, Chain] = {}
    for patch in series:
        for key in ("file", "target", "sha256_before", "sha256_after", "diff"):
            if not isinstance(patch.get(key), str) or not patch[key]:
                raise Problem(
                    "a patch of the series has no {}: {}".format(key, patch.get("file") or patch.get("target") or "?"),
                    "file, target, sha256_before, sha256_after and diff in each",
                    "complete the series file",
                )
        target, step = patch["target"], Step(patch["file"], patch["diff"])
        check_target(target, step.file)
        for key in ("sha256_before", "sha256_after"):
            if not is_sha256(patch[key]):
                raise Problem(
                    f"{step.file} has {key}: {patch[key]}",
                    "64 lower-case hexadecimal digits",
                    "print it with 'sha256sum FILE' and correct the series file",
                )
        if patch["sha256_before"] == patch["sha256_after"]:
            raise Problem(
                f"{step.file} has the same checksum before and after",
                "a patch that changes its target",
                "correct sha256_after in the series file",
            )
        chain = grouped.get(target)
        if chain is None:
            chain = Chain(target, (patch["sha256_before"],), ())
        elif chain.hashes[-1] != patch["sha256_before"]:
            raise Problem(
                "{} starts from {}".format(step.file, patch["sha256_before"]),
                f"{chain.hashes[-1]}, where {chain.steps[-1].file} leaves {target}",
                "correct sha256_before, or the order of the series",
            )
        grouped[target] = Chain(target, (*chain.hashes, patch["sha256_after"]), (*chain.steps, step))
    return list(grouped.values())


def is_sha256(text: object) -> bool:
    """Return whether text is a sha256 in lower-case hex."""
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def check_target(target: str, where: str) -> None:
    """Refuse a target that could leave the folder it belongs to.

    Raises:
        Problem: the path is absolute, has an empty, "." or ".." part, or a backslash.
    """
    parts = target.split("/")
    if "\\" in target or "\0" in target or any(part in ("", ".", "..") for part in parts):
        raise Problem(
            f"{where} has the target {target!r}",
            "a path relative to site-packages, such as mamba_ssm/ops/selective_scan_interface.py",
            "correct target in the series file",
        )


def expected_hashes(series: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return {target: sha256 once every patch is applied}."""
    return {chain.target: chain.hashes[-1] for chain in chains(series)}


def pristine_hashes(series: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return {target: sha256 of upstream's own file}."""
    return {chain.target: chain.hashes[0] for chain in chains(series)}


def status_of(chain: Chain, found: str | None) -> str:
    """Return what a target is, given its sha256 (None: there is no file): one of the words above but OUTDATED."""
    if found is None:
        return ABSENT
    if found == chain.hashes[-1]:
        return PATCHED
    if found == chain.hashes[0]:
        return PRISTINE
    return PARTIAL if found in chain.hashes else UNKNOWN


def find_distribution(site_packages: str, package: str) -> tuple[str, str] | None:
    """Return (path of the .dist-info folder, version) of an installed distribution, or None.

    Raises:
        Problem: there are several, so pip itself would not know which is installed.
    """
    found = []
    for path in sorted(glob.glob(os.path.join(glob.escape(site_packages), "*.dist-info"))):
        name, _dash, version = os.path.basename(path)[: -len(".dist-info")].rpartition("-")
        if canonical_name(name) == canonical_name(package):
            found.append((path, version))
    if len(found) > 1:
        raise Problem(
            f"{package} is recorded {len(found)} times: " + ", ".join(path for path, _version in found),
            f"one .dist-info folder of it in {site_packages}",
            f"reinstall it: -e {canonical_name(package)}_reinstall=true",
        )
    return found[0] if found else None


def run_patch(tool: str | None, content: bytes, step: Step, reverse: bool = False) -> bytes:
    """Return content with one diff applied (or taken back), by GNU patch on a copy, with no fuzz.

    Raises:
        Problem: there is no patch tool, or the diff does not apply.
    """
    if not tool:
        raise Problem(
            "the program 'patch' is not on this device",
            "GNU patch, from the apt package 'patch'",
            "install it: sudo apt-get install patch",
        )
    with tempfile.TemporaryDirectory(prefix="jetson-mamba-patch-") as work:
        source, diff, result = (os.path.join(work, name) for name in ("source", "diff", "result"))
        with open(source, "wb") as stream:
            stream.write(content)
        with open(diff, "wb") as stream:
            stream.write(step.diff.encode("utf-8"))
        argv = [tool, "--batch", "--fuzz=0", "--unified", "--binary", "--no-backup-if-mismatch", "--reject-file=-"]
        argv += ["--reverse"] if reverse else []
        argv += ["--output=" + result, "--input=" + diff, source]
        try:
            done = subprocess.run(
                argv,
                cwd=work,
                env={"LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=_PATCH_SECONDS,
                check=False,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise Problem(
                f"{tool} cannot be run: {error}",
                "GNU patch, from the apt package 'patch'",
                "install it again: sudo apt-get install --reinstall patch",
            ) from error
        if done.returncode != 0 or not os.path.exists(result):
            raise Problem(
                "{} does not apply: {}".format(step.file, " ".join(done.stdout.decode("utf-8", "replace").split())),
                "a diff that applies with no fuzz to the file that its series names",
                "make the diff again from the pristine file",
            )
        with open(result, "rb") as stream:
            return stream.read()


def forward(tool: str | None, chain: Chain, content: bytes) -> bytes:
    """Return content, which is at any place of the chain, with the patches that it still lacks."""
    for index in range(chain.hashes.index(_sha256(content)), len(chain.steps)):
        content = _verified(run_patch(tool, content, chain.steps[index]), chain.hashes[index + 1], chain.steps[index])
    return content


def backward(tool: str | None, chain: Chain, content: bytes) -> bytes:
    """Return content, which is at any place of the chain, with its patches taken back."""
    for index in range(chain.hashes.index(_sha256(content)) - 1, -1, -1):
        undone = run_patch(tool, content, chain.steps[index], reverse=True)
        content = _verified(undone, chain.hashes[index], chain.steps[index])
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _verified(content: bytes, wanted: str, step: Step) -> bytes:
    """Return content where it is what the series promises."""
    if _sha256(content) != wanted:
        raise Problem(
            f"{step.file} leads to a file with sha256 {_sha256(content)}",
            wanted,
            "the diff and its series file do not belong together: make both again from the pristine file",
        )
    return content


def realise(request: Request, check: bool, tool: str | None) -> dict[str, Any]:
    """Bring every target to what is wanted, all or none.

    Args:
        request: what is wanted.
        check: True to say what would change and write nothing. A package that is not installed yet, or is there in
            another version, is then no problem: the patches are shown as they would be applied after the installation.
        tool: path of GNU patch, or None; it is asked for only where something has to be patched.

    Returns:
        changed, files [{target, status_before, status, sha256}], diff (Ansible's list) and msg.

    Raises:
        Problem: a target is unknown, missing, a link or outside the folder; the package is not installed; a diff does
            not lead where its series says; a file cannot be written. Nothing has been changed then, but in the last
            case, which the next run mends.
    """
    wanted = chains(request.series)
    memory = _read_memory(request)
    if not wanted and not memory:
        return _result([], False, [], "no patch is needed")
    _check_folders(request)
    dist_info = None
    if request.tracked:
        distribution = find_distribution(request.site_packages, request.package)
        if distribution is None and not (wanted and request.present):
            return _forget(request, check)
        if distribution is None or _public(distribution[1]) != _public(request.version):
            if wanted and request.present:
                return _not_there(request, wanted, distribution, check)
            wanted = []  # another version's files: only what we remember to have patched is ours to restore
        if distribution is not None:
            dist_info = distribution[0]
    elif not os.path.isdir(request.site_packages):
        return _not_there(request, wanted, None, check) if request.present else _forget(request, check)
    known = {chain.target for chain in wanted}
    # what an earlier series patched and this one does not name goes back to what upstream shipped
    surplus = [
        Chain(target, (entry["pristine"], entry["patched"]), ())
        for target, entry in sorted(memory.items())
        if target not in known
    ]

    changes = _decide(request, wanted, surplus, memory, tool)
    record_path = os.path.join(dist_info, "RECORD") if dist_info else None
    record_before, record_after = _new_record(request, record_path, changes)
    memory_after = _memory_after(request, wanted)
    touched = [change for change in changes if change.after is not None]
    changed = bool(touched) or record_before != record_after or memory_after != memory
    diffs = [_diff_entry(change) for change in touched]
    if record_path and record_before != record_after:
        diffs.append(_record_diff(record_path, record_before, record_after))
    if changed and not check:
        try:
            _commit(request, changes, record_path, record_before, record_after, memory, memory_after)
        except OSError as error:
            raise Problem(
                f"{error.filename or request.site_packages} cannot be written: {error.strerror}",
                "folders that the connecting user may write, with space left",
                "check the owner and the free space, then run again: the next run mends what is half done",
            ) from error
    return _result(changes, changed, diffs, f"{len(touched)} of {len(changes)} files changed")


def _result(changes: Sequence[_Change], changed: bool, diffs: list[dict[str, str]], msg: str) -> dict[str, Any]:
    rows = []
    for change in changes:
        content = change.before if change.after is None else change.after
        rows.append(
            {
                "target": change.target,
                "status_before": change.status,
                "status": change.wanted,
                "sha256": _sha256(content),
            }
        )
    return {"changed": changed, "files": rows, "diff": diffs, "msg": msg}


def _public(version: str) -> str:
    """Return a version without its local part: a build may add +cu12, the Python files stay the same."""
    return version.partition("+")[0]


def _check_folders(request: Request) -> None:
    """Refuse folders that would mix what pip owns with what we keep."""
    for name, path in (("site_packages", request.site_packages), ("state_dir", request.state_dir)):
        if not os.path.isabs(path):
            raise Problem(f"{name} is {path!r}", "an absolute path", "correct the variable it comes from")
    site, state = os.path.realpath(request.site_packages), os.path.realpath(request.state_dir)
    if os.path.commonpath([site, state]) == site:
        raise Problem(
            f"the originals would be kept in {state}, inside {site}",
            "a folder outside, so that uninstalling leaves nothing behind",
            "set state_dir to the environment's state folder",
        )


def _not_there(
    request: Request, wanted: Sequence[Chain], distribution: tuple[str, str] | None, check: bool
) -> dict[str, Any]:
    """Answer for a package that is not installed, or in another version: a preview in check mode, else a problem."""
    if distribution is None:
        found = f"{request.package} is not installed in {request.site_packages}"
    else:
        found = f"{request.package} {distribution[1]} is installed in {request.site_packages}"
    if not check:
        raise Problem(
            found,
            f"{request.package} {request.version}, which the patches belong to",
            f"install it first, with the role {canonical_name(request.package)}",
        )
    return {
        "changed": True,
        "files": [
            {"target": chain.target, "status_before": ABSENT, "status": PATCHED, "sha256": chain.hashes[-1]}
            for chain in wanted
        ],
        "diff": [{"prepared": step.diff} for chain in wanted for step in chain.steps],
        "msg": f"{found}; {len(wanted)} files would be patched after the installation",
    }


def _target_path(site_packages: str, target: str) -> str:
    """Return a target's real path.

    Raises:
        Problem: a link on the way leads elsewhere, or it is no regular file.
    """
    path = os.path.join(os.path.realpath(site_packages), *target.split("/"))
    if os.path.realpath(path) != path:
        raise Problem(
            f"{path} is reached through a link, to {os.path.realpath(path)}",
            "a regular file of the environment itself",
            "replace the link by a normal installation: what it leads to may belong to somebody else",
        )
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise Problem(f"{path} is no regular file", "a regular file", "look at it with 'ls -ld' and move it away")
    return path


def _decide(
    request: Request,
    wanted: Sequence[Chain],
    surplus: Sequence[Chain],
    memory: Mapping[str, Mapping[str, str]],
    tool: str | None,
) -> list[_Change]:
    """Look at every target, then compute what each shall become. Nothing is written.

    Raises:
        Problem: for all targets that forbid going on, in one message.
    """
    looked: list[tuple[Chain, str, str, bytes]] = []
    refused: list[str] = []
    expected: list[str] = []
    for chain in list(wanted) + list(surplus):
        path = _target_path(request.site_packages, chain.target)
        content = _read(path)
        found = None if content is None else _sha256(content)
        status = status_of(chain, found)
        if status == UNKNOWN and memory.get(chain.target, {}).get("patched") == found:
            original = _read_original(request, chain)
            status = OUTDATED if original is not None else UNKNOWN
        if chain in surplus and status in (ABSENT, UNKNOWN):
            continue  # somebody has replaced it since: not ours any more
        if status in (ABSENT, UNKNOWN):
            refused.append("{} {}".format(path, "is missing" if found is None else f"has sha256 {found}"))
            expected.append(f"{chain.target}: {chain.hashes[0]} (pristine) or {chain.hashes[-1]} (patched)")
        else:
            looked.append((chain, path, status, content or b""))
    if refused:
        raise Problem(
            "; ".join(refused),
            "; ".join(expected),
            "nothing was touched; put the pristine file back, for instance by reinstalling the package: "
            f"-e {canonical_name(request.package)}_reinstall=true",
        )
    return [
        _decide_one(request, chain, chain in surplus, path, status, now, tool) for chain, path, status, now in looked
    ]


def _decide_one(
    request: Request, chain: Chain, is_surplus: bool, path: str, status: str, content: bytes, tool: str | None
) -> _Change:
    """Return what one target shall become."""
    original = content if status == PRISTINE else _read_original(request, chain)
    if request.present and not is_surplus:
        start = original if status == OUTDATED and original is not None else content
        after, wanted = forward(tool, chain, start), PATCHED
    else:
        if original is None and not chain.steps:
            raise Problem(
                f"{path} was patched by an earlier series, and its original is no longer in {request.state_dir}",
                f"the original, sha256 {chain.hashes[0]}",
                f"reinstall the package: -e {canonical_name(request.package)}_reinstall=true",
            )
        after, wanted = backward(tool, chain, content) if original is None else original, PRISTINE
    return _Change(chain.target, path, status, wanted, content, None if after == content else after, original)


def _read(path: str) -> bytes | None:
    """Return a file's bytes, or None where there is none."""
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Problem(
            f"{path} cannot be read: {error.strerror}",
            "a file that this user may read",
            "run with the user that owns the environment",
        ) from error


def _originals(request: Request) -> str:
    return os.path.join(request.state_dir, "originals", canonical_name(request.package))


def _read_original(request: Request, chain: Chain) -> bytes | None:
    """Return the kept original, or None where there is none or it is not what the series calls pristine."""
    content = _read(os.path.join(_originals(request), *chain.target.split("/")))
    return content if content is not None and _sha256(content) == chain.hashes[0] else None


def memory_path(state_dir: str, package: str) -> str:
    """Return the path of the JSON file that says which targets of a package are patched."""
    return os.path.join(state_dir, "source_patches", canonical_name(package) + ".json")


def _read_memory(request: Request) -> dict[str, dict[str, str]]:
    """Return {target: {pristine, patched}} of the last run; a damaged file counts as none (it is only a hint)."""
    content = _read(memory_path(request.state_dir, request.package))
    try:
        entries = json.loads((content or b"{}").decode("utf-8")).get("files", {})
        found = {
            target: {"pristine": entry["pristine"], "patched": entry["patched"]}
            for target, entry in entries.items()
            if is_sha256(entry["pristine"]) and is_sha256(entry["patched"])
        }
        for target in found:
            check_target(target, "the memory of earlier patches")
    except (ValueError, KeyError, TypeError, AttributeError, Problem):
        return {}
    return found


def _memory_after(request: Request, wanted: Sequence[Chain]) -> dict[str, dict[str, str]]:
    if not request.present:
        return {}
    return {chain.target: {"pristine": chain.hashes[0], "patched": chain.hashes[-1]} for chain in wanted}


def _record_row(target: str, content: bytes) -> list[str]:
    """Return RECORD's row of a file."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode("ascii")
    return [target, "sha256=" + digest, str(len(content))]


def _new_record(
    request: Request, record_path: str | None, changes: Sequence[_Change]
) -> tuple[list[bytes], list[bytes]]:
    """Return RECORD's lines as they are and as they shall be; every line that is not a target's stays byte for byte.

    Raises:
        Problem: there is no RECORD, or it does not name a target.
    """
    if record_path is None:
        return [], []
    content = _read(record_path)
    if content is None:
        raise Problem(
            f"{record_path} is missing",
            "the list of files that pip writes, so that uninstalling works",
            f"reinstall the package: -e {canonical_name(request.package)}_reinstall=true",
        )
    rows = {
        change.target: _record_row(change.target, change.before if change.after is None else change.after)
        for change in changes
    }
    before = content.splitlines(keepends=True)
    after = []
    for line in before:
        text = line.decode("utf-8", "surrogateescape")
        bare = text.rstrip("\r\n")
        row = next(csv.reader([bare]), [])
        wanted = rows.pop(row[0], None) if row else None
        if wanted is None or row == wanted:
            after.append(line)
        else:
            buffer = io.StringIO()
            csv.writer(buffer, lineterminator=text[len(bare) :]).writerow(wanted)
            after.append(buffer.getvalue().encode("utf-8", "surrogateescape"))
    if rows:
        raise Problem(
            "{} does not name {}".format(record_path, ", ".join(sorted(rows))),
            "every file of the package, as pip writes it",
            f"reinstall the package: -e {canonical_name(request.package)}_reinstall=true",
        )
    return before, after


def _diff_entry(change: _Change) -> dict[str, str]:
    return {
        "before_header": change.path,
        "after_header": change.path,
        "before": change.before.decode("utf-8", "replace"),
        "after": (change.after or b"").decode("utf-8", "replace"),
    }


def _record_diff(path: str, before: Sequence[bytes], after: Sequence[bytes]) -> dict[str, str]:
    """Return a diff of the rows that change only: RECORD has hundreds."""
    pairs = [(old, new) for old, new in zip(before, after) if old != new]
    old_text, new_text = (b"".join(column).decode("utf-8", "replace").replace("\r\n", "\n") for column in zip(*pairs))
    return {"before_header": path, "after_header": path, "before": old_text, "after": new_text}


def _commit(
    request: Request,
    changes: Sequence[_Change],
    record_path: str | None,
    record_before: Sequence[bytes],
    record_after: Sequence[bytes],
    memory: Mapping[str, Mapping[str, str]],
    memory_after: Mapping[str, Mapping[str, str]],
) -> None:
    """Write: originals, files, RECORD, memory, in this order, so that the next run sees and mends any crash between."""
    originals = _originals(request)
    for change in changes:
        if change.wanted == PATCHED and change.original is not None:
            kept = os.path.join(originals, *change.target.split("/"))
            if _read(kept) != change.original:
                files.write_atomic(kept, change.original, 0o644)
    for change in changes:
        _drop_temporaries(change.path)
        if change.after is not None:
            _drop_caches(change.path)
            files.write_atomic(change.path, change.after, stat.S_IMODE(os.stat(change.path).st_mode))
    if record_path and list(record_before) != list(record_after):
        files.write_atomic(record_path, b"".join(record_after), stat.S_IMODE(os.stat(record_path).st_mode))
    if memory_after != memory:
        path = memory_path(request.state_dir, request.package)
        if memory_after:
            data = {
                "schema": RECORD_SCHEMA,
                "package": request.package,
                "version": request.version,
                "files": memory_after,
            }
            files.write_atomic(path, (json.dumps(data, indent=2, sort_keys=True) + "\n").encode("utf-8"), 0o644)
        else:
            _remove(path)
    for target in {*memory, *(change.target for change in changes)} - set(memory_after):
        _remove(os.path.join(originals, *target.split("/")))
    _prune_state(request)


def _drop_temporaries(path: str) -> None:
    """Remove what a crash in an earlier run's atomic write left beside the target."""
    folder, name = os.path.split(path)
    for left in glob.glob(os.path.join(glob.escape(folder), "." + glob.escape(name) + ".*.tmp")):
        os.unlink(left)


def _drop_caches(path: str) -> None:
    """Remove a module's byte code before its source changes: unchecked .pyc files would outlive the change."""
    folder, name = os.path.split(path)
    stem = os.path.splitext(name)[0]
    for cache in glob.glob(os.path.join(glob.escape(folder), "__pycache__", glob.escape(stem) + ".*.pyc")):
        os.unlink(cache)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _prune_state(request: Request) -> None:
    """Remove the folders of the state that have become empty."""
    for folder in (
        _originals(request),
        os.path.dirname(_originals(request)),
        os.path.dirname(memory_path(request.state_dir, request.package)),
    ):
        for path, _folders, _files in os.walk(folder, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(path)


def _forget(request: Request, check: bool) -> dict[str, Any]:
    """Drop the originals and the memory of a package that is no longer installed."""
    memory = _read_memory(request)
    if memory and not check:
        _remove(memory_path(request.state_dir, request.package))
        for target in memory:
            _remove(os.path.join(_originals(request), *target.split("/")))
        _prune_state(request)
    return _result([], bool(memory), [], f"{request.package} is not installed: nothing to restore")
