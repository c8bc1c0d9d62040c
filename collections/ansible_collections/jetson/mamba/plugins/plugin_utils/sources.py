"""Sources of components: fetched or read, checked, and packed so that one content is always one tar file."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import fnmatch
import hashlib
import io
import os
import re
import shutil
import stat
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ansible_collections.jetson.mamba.plugins.module_utils import patches
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.passwords import without_userinfo
from ansible_collections.jetson.mamba.plugins.plugin_utils import components, fetch, patch_series
from packaging.version import InvalidVersion, Version

Progress = Callable[[str], None]

_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")
# of a local tree: what a build or an editor leaves behind must change neither the digest nor the build
_LEFT_OUT = (".git", "build", "dist", "*.egg-info", "__pycache__", "*.so", "*.pyc", ".ninja_*")
_COMPILED = re.compile(r"""["']((?:csrc|src)/[^"'\s]+\.(?:cu|cpp|cc|c))["']""")
_MAX_BYTES = 2 << 30


@dataclass(frozen=True)
class SourceArchive:
    """A source, ready to be sent.

    Args:
        path: an uncompressed tar file in the cache; its members have no top folder.
        sha256: of that file. Names are sorted, times zero and modes normalised, so it is the content's digest.
        origin: where it came from, for people and records.
        version: what the source itself says.
    """

    path: Path
    sha256: str
    origin: str
    version: str


def prepare(
    component: str,
    version: str,
    source: Mapping[str, Any] | None,
    cache: str | Path,
    progress: Progress | None = None,
    table: Path = components.DATA,
    patch_root: str | None = None,
    companions: Mapping[str, str | None] | None = None,
) -> SourceArchive:
    """Fetch or read a component's source, check it, patch it, and pack it.

    Args:
        component: a name in components.yml.
        version: the version that the source must be of.
        source: where from; None or empty for the row of components.yml.
        cache: folder on the controller that keeps downloads and packed sources.
        progress: passed on to downloads.
        table: another components.yml than the project's own.
        patch_root: folder of the patch series; those of the version that apply to its source are applied. None or
            empty for no patches.
        companions: version of every package that a condition of the series may name.

    Raises:
        Problem: the source is not to be had, fails its checksum, is not the wanted package and version, or is not what
            a patch of it starts from.
    """
    row = components.component(component, version, table)
    chosen = source or row.source
    if not chosen:
        raise Problem(
            f"{component} {version} has no row in components.yml",
            f"one of {', '.join(components.known_versions(component, table))}, or a source of your own",
            f"set {component}_version to one of them, or name a source in {component}_source",
        )
    components.check_source(chosen, f"{component}_source" if source else f"{component} {version}")
    folder = Path(cache).expanduser()
    (folder / "sources").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="source-", dir=folder) as stage:
        tree = Path(stage) / "tree"
        origin = _materialise(chosen, tree, folder, component, progress)
        found = _check_tree(tree, row, origin, own=bool(source))
        if patch_root:
            series = patch_series.load_series(
                str(patch_root), component, row.version, companions or {}, applies_to="source"
            )
            _apply(series, tree, origin, component)
            origin += "".join(f" + {patch['file']}" for patch in series)
        digest, packed = _pack(tree, Path(stage) / "source.tar")
        final = folder / "sources" / f"{component}-{found}-{digest[:16]}.tar"
        os.replace(packed, final)
    return SourceArchive(path=final, sha256=digest, origin=origin, version=found)


def hashes_of(archive: SourceArchive, paths: Iterable[str]) -> dict[str, str | None]:
    """Return {path: sha256 of that file in a packed source, or None where the source has no such file}.

    A link counts as the file that it leads to, as it does for who copies it.
    """
    found: dict[str, str | None] = {}
    with tarfile.open(archive.path, "r:") as handle:
        for path in paths:
            # KeyError: neither the file nor what a link leads to is there; RecursionError: links in a ring
            with contextlib.suppress(KeyError, RecursionError):
                stream = handle.extractfile(path)
                if stream is not None:
                    found[path] = hashlib.sha256(stream.read()).hexdigest()
            found.setdefault(path, None)
    return found


def _apply(series: Iterable[Mapping[str, Any]], tree: Path, origin: str, component: str) -> None:
    """Apply patches to a tree; one that is applied already, as in a tree of the user's own, stays so.

    Raises:
        Problem: a file is not what its patch starts from, a patch does not apply, or there is no program to apply it.
    """
    tool = shutil.which("patch")
    for chain in patches.chains(list(series)):
        path = tree / chain.target
        regular = path.is_file() and path.resolve() == tree.resolve() / chain.target
        digest = _sha256(path) if regular else None
        status = patches.status_of(chain, digest)
        names = ", ".join(step.file for step in chain.steps)
        if status in (patches.ABSENT, patches.UNKNOWN):
            raise Problem(
                f"{chain.target} of {origin} {f'has sha256 {digest}' if digest else 'is no regular file there'}",
                f"{chain.hashes[0]} (pristine) or {chain.hashes[-1]} (patched), for {names}",
                f"put the pristine file into the source of {component}, or correct the series",
            )
        if status == patches.PATCHED:
            continue
        if tool is None:
            raise Problem(
                f"the program 'patch' is not on the controller, and the source of {component} needs {names}",
                "GNU patch",
                "install the package patch on the machine where Ansible runs",
            )
        path.write_bytes(patches.forward(tool, chain, path.read_bytes()))


def _materialise(
    source: Mapping[str, Any], tree: Path, cache: Path, component: str, progress: Progress | None
) -> str:
    """Put a source's files into the new folder tree; returns the origin in words."""
    kind = source["kind"]
    if kind == "compose":
        origin = _materialise(source["base"], tree, cache, component, progress)
        for addition in source["add"]:
            other = tree.parent / f"{tree.name}-{addition['folder'].replace('/', '_')}"
            extra = _materialise(addition["from"], other, cache, component, progress)
            _graft(other, tree, addition["folder"], extra)
            origin += f" + {addition['folder']} of {extra}"
        return origin
    if kind == "tree":
        return _copy_tree(Path(source["path"]).expanduser(), tree)
    if kind == "git":
        return _git_tree(source["url"], source["commit"], tree, cache)
    if kind == "index":
        path = fetch.ensure_index_file(source["project"], source["filename"], source["sha256"], cache, progress)
        origin = f"{source['filename']} (sha256 {source['sha256'][:12]})"
    else:
        path, origin = _archive(source, cache, component, progress)
    unpack(path, tree)
    return origin


def _archive(
    source: Mapping[str, Any], cache: Path, component: str, progress: Progress | None
) -> tuple[Path, str]:
    """Return the checked archive of a source of kind archive, and the origin in words."""
    where = source.get("url") or source["path"]
    sha256 = source["sha256"]
    if sha256 is None:
        printing = f"curl -fL {where} | sha256sum" if "url" in source else f"sha256sum {where}"
        raise Problem(
            f"no sha256 is known for {where}",
            "a checksum, so that what is built is what was meant",
            f"run: {printing} ; look at it, then set {component}_source: "
            f"{{kind: archive, {'url' if 'url' in source else 'path'}: {where}, sha256: …}}",
        )
    if not _SHA256.match(sha256):
        raise Problem(
            f"the sha256 of {where} is '{sha256}'", "64 lower-case hex digits", "copy it from sha256sum's output"
        )
    if "url" in source:
        shown = without_userinfo(where)
        return fetch.ensure_url(source["url"], sha256, cache, progress), f"{shown} (sha256 {sha256[:12]})"
    path = Path(where).expanduser()
    if not path.is_file():
        raise Problem(f"there is no file {path}", "the archive that the source names", f"correct {component}_source")
    found = _sha256(path)
    if found != sha256:
        raise Problem(
            f"{path} has the sha256 {found}",
            f"sha256 {sha256}",
            "replace the file by the one that was meant, or correct the checksum if the file is right",
        )
    return path, f"{path} (sha256 {sha256[:12]})"


def _sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def unpack(archive: Path, tree: Path) -> None:
    """Unpack a tar or zip file into the new folder tree, without its single top folder.

    Nothing is written outside tree: absolute names, "..", devices and links that lead out are refused.

    Raises:
        Problem: the archive holds such a thing, is broken or holds more than 2 GiB.
    """
    raw = tree.parent / f"{tree.name}.raw"
    raw.mkdir()
    try:
        if zipfile.is_zipfile(archive):
            _unpack_zip(archive, raw)
        else:
            with tarfile.open(archive) as handle:
                _unpack_tar(handle, raw, str(archive))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise Problem(
            f"{archive} cannot be unpacked: {error}", "a whole tar or zip file", f"remove {archive} and try again"
        ) from error
    _check_links(raw, str(archive))
    inside = list(raw.iterdir())
    if len(inside) == 1 and inside[0].is_dir() and not inside[0].is_symlink():
        os.replace(inside[0], tree)
        raw.rmdir()
    else:
        os.replace(raw, tree)


def _inside(raw: Path, name: str, archive: str) -> Path:
    """Return where a member may be written."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise _escape(archive, name)
    target = raw.joinpath(*parts)
    for parent in target.parents:
        if parent == raw:
            break
        if parent.is_symlink():
            raise _escape(archive, name)
    return target


def _escape(archive: str, name: str) -> Problem:
    return Problem(
        f"{archive} holds '{name}', which leads out of its folder",
        "files and links that stay inside the archive's own folder",
        "do not use this archive; get it from its author again",
    )


def _unpack_tar(handle: tarfile.TarFile, raw: Path, archive: str) -> None:
    """Write the members of a tar file one by one."""
    total = 0
    for member in handle:
        if member.isdir() and PurePosixPath(member.name).parts in ((), (".",)):
            continue
        target = _inside(raw, member.name, archive)
        total += member.size
        if total > _MAX_BYTES:
            raise Problem(f"{archive} holds more than 2 GiB", "a source archive", "look at what it is")
        if member.isdir():
            target.mkdir(parents=True, exist_ok=True)
        elif member.issym():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(member.linkname)
        elif member.islnk():
            first = _inside(raw, member.linkname, archive)
            if first.is_symlink() or not first.is_file():
                raise _escape(archive, member.name)
            _write(target, io.BytesIO(first.read_bytes()), member.mode, archive)
        elif member.isreg():
            stream = handle.extractfile(member)
            assert stream is not None
            _write(target, stream, member.mode, archive)
        else:
            raise _escape(archive, member.name)


def _unpack_zip(archive: Path, raw: Path) -> None:
    """Write the members of a zip file one by one."""
    with zipfile.ZipFile(archive) as handle:
        if sum(member.file_size for member in handle.infolist()) > _MAX_BYTES:
            raise Problem(f"{archive} holds more than 2 GiB", "a source archive", "look at what it is")
        for member in handle.infolist():
            target = _inside(raw, member.filename, str(archive))
            mode = member.external_attr >> 16
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            elif mode and not stat.S_ISREG(mode):
                raise _escape(str(archive), member.filename)
            else:
                with handle.open(member) as stream:
                    _write(target, stream, mode, str(archive))


def _write(target: Path, stream: IO[bytes], mode: int, archive: str) -> None:
    """Write one regular file; an earlier link of that name is not followed."""
    if target.is_symlink():
        raise _escape(archive, target.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as handle:
        shutil.copyfileobj(stream, handle)
    target.chmod(0o755 if mode & 0o111 else 0o644)


def _check_links(tree: Path, origin: str) -> None:
    """Refuse links that are absolute or lead out of the tree."""
    root = tree.resolve()
    for path in _walk(tree, ()):
        if path.is_symlink():
            where = os.readlink(path)
            goal = Path(os.path.normpath(path.parent.resolve() / where))
            if os.path.isabs(where) or not goal.is_relative_to(root) or not path.resolve().is_relative_to(root):
                raise _escape(origin, f"{path.relative_to(tree)} -> {where}")


def _walk(tree: Path, left_out: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files and links under a folder, sorted, without what is left out; folders are not followed as links."""
    for entry in sorted(tree.iterdir(), key=lambda path: path.name):
        if any(fnmatch.fnmatch(entry.name, pattern) for pattern in left_out):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry, left_out)
        else:
            yield entry


def _copy_tree(origin: Path, tree: Path) -> str:
    """Copy a local folder without what builds leave behind; returns the origin in words."""
    if not origin.is_dir():
        raise Problem(
            f"there is no folder {origin} on the controller",
            "the folder of the source, on the machine where Ansible runs",
            "correct the path (relative paths start in the folder where the run was started)",
        )
    tree.mkdir()
    for path in _walk(origin, _LEFT_OUT):
        target = tree / path.relative_to(origin)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            target.symlink_to(os.readlink(path))
        elif path.is_file():
            shutil.copyfile(path, target)
            target.chmod(0o755 if path.stat().st_mode & 0o111 else 0o644)
        else:
            raise Problem(f"{path} is neither file nor folder nor link", "a source tree", f"remove {path}")
    _check_links(tree, str(origin))
    return f"local tree {origin.resolve()}"


def _graft(other: Path, tree: Path, folder: str, origin: str) -> None:
    """Put one folder of another source into the tree."""
    wanted, target = other / folder, tree / folder
    if ".." in PurePosixPath(folder).parts or os.path.isabs(folder) or not wanted.is_dir():
        raise Problem(f"{origin} has no folder '{folder}'", f"a source with {folder}/", "correct the row's 'add'")
    if target.exists():
        raise Problem(
            f"the base source already has {folder}/", "a base without it", "remove that entry of the row's 'add'"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(str(wanted), str(target))


def _git_tree(url: str, commit: str, tree: Path, cache: Path) -> str:
    """Put the tree of one commit into a new folder, from a bare copy of the repository in the cache."""
    if not _COMMIT.match(commit):
        raise Problem(
            f"the commit of {url} is '{commit}'",
            "a full commit id of 40 lower-case hex digits (a branch, a tag or a short id can change its meaning)",
            f"look it up: git ls-remote {url}",
        )
    bare = cache / "git" / bare_name(url)
    bare.parent.mkdir(parents=True, exist_ok=True)
    with bare.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (bare / "HEAD").is_file():
            _git("init", "--quiet", "--bare", str(bare))
        if not _has_commit(bare, commit):
            # one commit is enough where the server gives it; else everything, and look again
            with contextlib.suppress(Problem):
                _git("-C", str(bare), "fetch", "--quiet", "--depth", "1", "--", url, commit)
            if not _has_commit(bare, commit):
                _git("-C", str(bare), "fetch", "--quiet", "--", url, "+refs/*:refs/fetched/*")
    if not _has_commit(bare, commit):
        raise Problem(
            f"{url} has no commit {commit}", "a commit of that repository", f"look it up: git ls-remote {url}"
        )
    packed = tree.parent / f"{tree.name}.git.tar"
    _git("-C", str(bare), "archive", "--format=tar", "--prefix=tree/", f"--output={packed}", commit)
    unpack(packed, tree)
    packed.unlink()
    return f"{without_userinfo(url)} at {commit}"


def bare_name(url: str) -> str:
    """Return the folder name of a repository's copy in the cache; a password in the URL is no part of it."""
    return hashlib.sha256(without_userinfo(url).encode()).hexdigest()[:16] + ".git"


def _has_commit(bare: Path, commit: str) -> bool:
    """Return whether a bare repository holds a commit."""
    command = ["git", "-C", str(bare), "cat-file", "-e", f"{commit}^{{commit}}"]
    return subprocess.run(command, capture_output=True, check=False, env=_git_environment()).returncode == 0


def _git_environment() -> dict[str, str]:
    """Return an environment in which git asks nothing and speaks English."""
    return {**os.environ, "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_LFS_SKIP_SMUDGE": "1"}


def _git(*arguments: str) -> None:
    """Run git.

    Raises:
        Problem: git is missing or fails.
    """
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_git_environment())
    except FileNotFoundError as error:
        raise Problem("there is no git on the controller", "git", "install the package git") from error
    if done.returncode != 0:
        raise Problem(
            f"{' '.join(command)} failed: {done.stderr.strip()[-400:]}",
            "a repository that the controller can read",
            "run that command by hand and cure what it says",
        )


def _check_tree(tree: Path, row: components.Component, origin: str, own: bool) -> str:
    """Check that a tree is the package and version that are wanted and holds what it compiles.

    Returns:
        The version that the tree names.
    """
    if not (tree / row.package / "__init__.py").is_file():
        raise Problem(
            f"{origin} has no {row.package}/__init__.py",
            f"the source of {row.name}",
            f"name the folder that holds {row.package}/ and setup.py",
        )
    found = read_version(tree, row.package)
    if found is None:
        raise Problem(
            f"{origin} names no version in {row.package}/__init__.py, PKG-INFO, pyproject.toml, setup.cfg or setup.py",
            f"version {row.version}",
            f"write __version__ = \"{row.version}\" into {row.package}/__init__.py, if that is what it is",
        )
    if not _same_version(found, row.version):
        raise Problem(
            f"{origin} is version {found}",
            f"{row.name} {row.version}",
            f"set {row.name}_version: {found}, or name the source of {row.version}",
        )
    setup = tree / "setup.py"
    if not setup.is_file() and not (tree / "pyproject.toml").is_file():
        raise Problem(f"{origin} has neither setup.py nor pyproject.toml", "a tree that pip can build", "name another")
    if not own and row.setup_py_sha256 and (not setup.is_file() or _sha256(setup) != row.setup_py_sha256):
        raise Problem(
            f"setup.py of {origin} is not the one that this project knows",
            f"sha256 {row.setup_py_sha256}",
            f"do not build it; if {row.name} was released anew, read its setup.py and correct the row",
        )
    text = setup.read_text(encoding="utf-8", errors="replace") if setup.is_file() else ""
    missing = [name for name in _COMPILED.findall(text) if name.startswith("csrc/") and not (tree / name).is_file()]
    if missing:
        raise Problem(
            f"{origin} lacks {missing[0]}" + (f" and {len(missing) - 1} more files" if len(missing) > 1 else ""),
            "every file that its setup.py compiles",
            "use a git checkout or the release archive; some sdists leave csrc/ out",
        )
    return found


def _same_version(one: str, other: str) -> bool:
    """Return whether two spellings name one public version."""
    try:
        return Version(one).public == Version(other).public
    except InvalidVersion:
        return one == other


def read_version(tree: Path, package: str) -> str | None:
    """Return the version that a source tree names, without running any of it, or None."""
    init = tree / package / "__init__.py"
    if init.is_file():
        found = _assigned(init.read_text(encoding="utf-8", errors="replace"), "__version__")
        if found:
            return found
    for name, pattern in (
        ("PKG-INFO", r"^Version:\s*(\S+)\s*$"),
        ("pyproject.toml", r"^version\s*=\s*[\"']([^\"']+)[\"']"),
        ("setup.cfg", r"^version\s*=\s*([0-9][^\s]*)\s*$"),
        ("setup.py", r"\bversion\s*=\s*[\"']([^\"']+)[\"']"),
    ):
        path = tree / name
        match = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"), re.M) if path.is_file() else None
        if match:
            return match.group(1)
    return None


def _assigned(text: str, name: str) -> str | None:
    """Return the string that a module assigns to a name at its top level, or None."""
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return None
    for node in body:
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            value = node.value
            return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None
    return None


def _pack(tree: Path, target: Path) -> tuple[str, Path]:
    """Write a tree as a tar file that depends on its content only; returns its sha256 and path."""
    # an egg-info of the sdist is rewritten by every build, so it is no part of the content
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as handle:
        for path in sorted(_walk(tree, ("*.egg-info", "__pycache__")), key=lambda one: one.relative_to(tree).parts):
            member = tarfile.TarInfo(path.relative_to(tree).as_posix())
            if path.is_symlink():
                member.type, member.linkname, member.mode = tarfile.SYMTYPE, os.readlink(path), 0o777
                handle.addfile(member)
                continue
            member.size = path.stat().st_size
            member.mode = 0o755 if path.stat().st_mode & 0o111 else 0o644
            with path.open("rb") as stream:
                handle.addfile(member, stream)
    return _sha256(target), target
