"""Source trees whose Python is upstream's own, unmodified, around extensions of ours that compute on the CPU.

The trees look like any user's source tree: a setup.py, a pyproject.toml, the package and csrc. They are built with
`pip wheel --no-build-isolation --no-deps`. The sdists come from the index that pip is configured with, by URL and
checksum: `pip download` would run their setup.py.
"""

from __future__ import annotations

import os
import ssl
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from simulator.artefacts import cache
from simulator.artefacts.pip_settings import PipSettings, read_pip_settings
from simulator.errors import Problem
from simulator.progress import Waiting, say

_HERE = Path(__file__).resolve().parent
_TRIES = 3
# Of upstream's sdist, beside the package itself: who wrote it, and under which terms.
_KEPT = ("LICENSE", "AUTHORS", "README.md")


@dataclass(frozen=True)
class Source:
    """A package to compose: upstream's pinned sdist, and the extension that takes the place of its own.

    `requires` are upstream's own requirements; `variable` is the prefix of upstream's build variables.
    """

    name: str
    version: str
    sha256: str
    extension: str
    kernel: str
    variable: str
    requires: tuple[str, ...]

    @property
    def root(self) -> str:
        """The folder in the sdist, and the tree's own name."""
        return f"{self.name}-{self.version}"

    @property
    def sdist(self) -> str:
        """The sdist's file name."""
        return f"{self.root}.tar.gz"


SOURCES = (
    Source(
        name="causal_conv1d",
        version="1.6.0",
        sha256="4eae3220d08e1e88238f3a0a88783147cbdf47f612cc610add75127c7a37ca3e",
        extension="causal_conv1d_cuda",
        kernel="causal_conv1d.cpp",
        variable="CAUSAL_CONV1D",
        requires=("torch", "packaging", "ninja"),
    ),
    Source(
        name="mamba_ssm",
        version="2.2.4",
        sha256="e4114c69302796c91b71e90032c2d974f611608fab331582a80de6eaf075efb9",
        extension="selective_scan_cuda",
        kernel="selective_scan.cpp",
        variable="MAMBA",
        requires=("torch", "ninja", "einops", "transformers", "packaging", "setuptools>=61.0.0"),
    ),
)


def find_url(source: Source, settings: PipSettings) -> str:
    """Return the sdist's URL in the indexes and link pages that pip is configured with; raise Problem if none has it.

    Args:
        source: the package wanted.
        settings: pip's sources.
    """
    from unearth import PackageFinder

    if not settings.index_urls and not settings.find_links:
        raise Problem(
            "pip is configured with no index and no links",
            f"a package index that has {source.sdist}",
            "remove no-index from pip's settings, or set find-links to a folder with the file",
        )
    finder = PackageFinder(
        session=_session(settings),
        index_urls=settings.index_urls,
        find_links=settings.find_links,
        trusted_hosts=settings.trusted_hosts,
    )
    for package in finder.find_all_packages(source.name, allow_yanked=True):
        if package.link.filename == source.sdist:
            return package.link.url_without_fragment
    raise Problem(
        f"none of {', '.join([*settings.index_urls, *settings.find_links])} has {source.sdist}",
        f"{source.sdist} with sha256 {source.sha256}",
        "let this machine reach a package index (pip config list), or set find-links to a folder with the file",
    )


def fetch(source: Source, target: Path, settings: PipSettings) -> None:
    """Fetch a source's sdist to a file.

    Args:
        source: the package wanted.
        target: the file to write, once its checksum is right.
        settings: pip's sources.
    Raises:
        Problem: no source has it, the connection fails, or its checksum is another.
    """
    url = find_url(source, settings)
    last: Exception | None = None
    for attempt in range(_TRIES):
        time.sleep(2.0 * attempt)
        try:
            with _session(settings) as session, session.get_stream(url) as answer:
                answer.raise_for_status()
                with cache.new_file(target) as temporary:
                    with temporary.open("wb") as stream:
                        for block in answer.iter_bytes():
                            stream.write(block)
                    check(source, temporary)
            return
        except Problem:
            raise
        except Exception as error:  # whatever a connection may die of
            last = error
            say(f"{source.sdist}: {type(error).__name__}: {error}")
    raise Problem(
        f"{url} could not be fetched in {_TRIES} tries: {last}",
        f"{source.sdist} with sha256 {source.sha256}",
        "check the connection and pip's settings (pip config list), then run this again",
    )


def check(source: Source, path: Path) -> None:
    """Raise Problem unless a file is the sdist that is pinned."""
    found = cache.sha256_file(path)
    if found != source.sha256:
        raise Problem(
            f"{source.sdist} has sha256 {found}",
            f"sha256 {source.sha256}",
            "do not use this file; look at the package index that pip is configured with (pip config list)",
        )


def members(archive: tarfile.TarFile, root: str) -> Iterator[tuple[PurePosixPath, tarfile.TarInfo]]:
    """Yield an sdist's files with their paths below its root folder.

    Raises:
        Problem: a member lies outside the root, or is neither a file nor a folder.
    """
    for member in archive.getmembers():
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or path.parts[:1] != (root,) or "\\" in member.name:
            raise _refused(f"{member.name!r} lies outside {root}/")
        if member.isdir():
            continue
        if not member.isreg():
            raise _refused(f"{member.name!r} is a link or a device")
        yield PurePosixPath(*path.parts[1:]), member


def compose(source: Source, sdist: Path, target: Path) -> None:
    """Write a source tree: upstream's package, our build files and our kernel; the same input gives the same tree.

    Args:
        source: the package.
        sdist: upstream's archive, checked.
        target: the tree's folder, replaced as a whole.
    """
    with cache.new_folder(target) as folder:
        # Every file of the tree bears the time of the release.
        moment = 0.0
        with tarfile.open(sdist, "r:gz") as archive:
            for path, member in members(archive, source.root):
                moment = max(moment, float(int(member.mtime)))
                if path.parts[0] == source.name or str(path) in _KEPT:
                    stream = archive.extractfile(member)
                    assert stream is not None  # a regular file always has one
                    _write(folder / path, stream.read())
        if not (folder / source.name / "__init__.py").is_file():
            raise Problem(
                f"{sdist.name} has no {source.root}/{source.name}/__init__.py",
                f"the sdist of {source.name} {source.version}",
                "remove the file and run this again",
            )
        for name, data in build_files(source).items():
            _write(folder / name, data)
        for written in (folder, *folder.rglob("*")):
            os.utime(written, (moment, moment))


def build_files(source: Source) -> dict[str, bytes]:
    """Return the files of a tree that are ours, by their names in it."""
    setup = (_HERE / "trees" / "setup.py.in").read_text(encoding="utf-8")
    for key, value in {
        "NAME": source.name,
        "VERSION": source.version,
        "EXTENSION": source.extension,
        "SOURCE": source.kernel,
        "VARIABLE": source.variable,
        "REQUIRES": repr(list(source.requires)),
    }.items():
        setup = setup.replace(f"@{key}@", value)
    return {
        "setup.py": setup.encode(),
        "pyproject.toml": (_HERE / "trees" / "pyproject.toml.in").read_bytes(),
        f"csrc/{source.kernel}": (_HERE / "kernels" / source.kernel).read_bytes(),
    }


def prepare(
    source: Source,
    out: Path,
    settings: Callable[[], PipSettings] = read_pip_settings,
    download: Callable[[Source, Path, PipSettings], None] = fetch,
) -> Path:
    """Return a source's tree under a folder, composed unless it is there already and untouched.

    Args:
        source: the package.
        out: the folder of prepared artefacts; exists.
        settings: gives pip's sources; only called when something must be fetched.
        download: fetches an sdist, as `fetch` does.
    """
    target, marker = out / source.root, out / ".state" / f"{source.root}.json"
    ours = (part for name, data in sorted(build_files(source).items()) for part in (name, data))
    inputs = cache.digest_of([source.sha256, Path(__file__).read_bytes(), *ours])
    record = cache.read_record(marker)
    # A build leaves traces in its tree (build/, *.egg-info), so the tree itself is looked at.
    if record.get("inputs") == inputs and target.is_dir() and cache.digest_of_tree(target) == record.get("tree"):
        return target
    kept = out / ".state" / source.sdist
    kept.parent.mkdir(parents=True, exist_ok=True)
    if not kept.is_file() or cache.sha256_file(kept) != source.sha256:
        with Waiting(f"fetching {source.sdist} from the package index", "seconds"):
            download(source, kept, settings())
        check(source, kept)
    compose(source, kept, target)
    say(f"composed {target.name}")
    cache.write_record(marker, {"inputs": inputs, "tree": cache.digest_of_tree(target)})
    return target


def _session(settings: PipSettings) -> Any:
    from unearth.auth import MultiDomainBasicAuth
    from unearth.fetchers import PyPIClient

    verify = ssl.create_default_context(cafile=settings.cert) if settings.cert else True
    return PyPIClient(
        trusted_hosts=settings.trusted_hosts,
        verify=verify,
        timeout=settings.timeout_s,
        follow_redirects=True,
        auth=MultiDomainBasicAuth(prompting=False, index_urls=settings.index_urls),
    )


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o644)


def _refused(what: str) -> Problem:
    return Problem(
        f"the archive is refused: {what}",
        "files below one folder that bears the package's name and version",
        "do not use this archive; look at the package index that pip is configured with (pip config list)",
    )
