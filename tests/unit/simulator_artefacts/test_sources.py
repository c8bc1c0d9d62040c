"""Composing source trees from made-up sdists."""

from __future__ import annotations

import ast
import dataclasses
import gzip
import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from simulator.artefacts import cache, sources
from simulator.artefacts.pip_settings import PipSettings, read_pip_settings
from simulator.errors import Problem

MADE_UP = dataclasses.replace(sources.SOURCES[0], sha256="")
ROOT = MADE_UP.root
FILES = {
    f"{ROOT}/causal_conv1d/__init__.py": b'__version__ = "1.6.0"\n',
    f"{ROOT}/causal_conv1d/ops/deep.py": b"deep = True\r\n",
    f"{ROOT}/LICENSE": b"terms",
    f"{ROOT}/setup.py": b"raise SystemExit('upstream setup.py ran')",
    f"{ROOT}/csrc/causal_conv1d_fwd.cu": b"cuda",
    f"{ROOT}/tests/test_causal_conv1d.py": b"tests",
    f"{ROOT}/PKG-INFO": b"Version: 1.6.0",
}


def member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.mtime = 1_700_000_000
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def make_sdist(path: Path, files: dict[str, bytes], *extra: tarfile.TarInfo) -> sources.Source:
    """Write an sdist; return a Source that is pinned to it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(member(ROOT, type=tarfile.DIRTYPE))
        for name, data in files.items():
            archive.addfile(member(name, size=len(data)), io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    path.write_bytes(gzip.compress(packed.getvalue(), mtime=0))
    return dataclasses.replace(MADE_UP, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def sdist(tmp_path: Path) -> Path:
    return tmp_path / MADE_UP.sdist


def test_python_is_upstreams_and_the_rest_is_ours(sdist: Path, tmp_path: Path) -> None:
    source = make_sdist(sdist, FILES)
    sources.compose(source, sdist, tmp_path / "tree")
    found = {path.relative_to(tmp_path / "tree").as_posix() for path in (tmp_path / "tree").rglob("*.*")}
    assert found == {
        "causal_conv1d/__init__.py",
        "causal_conv1d/ops/deep.py",
        "csrc/causal_conv1d.cpp",
        "pyproject.toml",
        "setup.py",
    }
    assert (tmp_path / "tree/causal_conv1d/ops/deep.py").read_bytes() == b"deep = True\r\n"
    assert (tmp_path / "tree/LICENSE").read_bytes() == b"terms"
    assert b"causal_conv1d_fwd" in (tmp_path / "tree/csrc/causal_conv1d.cpp").read_bytes()


@pytest.mark.parametrize("source", sources.SOURCES, ids=lambda source: source.name)
def test_setup_py_is_whole(source: sources.Source) -> None:
    text = sources.build_files(source)["setup.py"].decode()
    assert "@" not in text
    call = next(node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and node.keywords)
    given = {word.arg: word.value for word in call.keywords}
    assert ast.literal_eval(given["name"]) == source.name
    assert ast.literal_eval(given["version"]) == source.version
    assert ast.literal_eval(given["install_requires"]) == list(source.requires)
    assert f"csrc/{source.kernel}" in text
    assert f"csrc/{source.kernel}" in sources.build_files(source)


def test_the_same_input_gives_the_same_tree(sdist: Path, tmp_path: Path) -> None:
    source = make_sdist(sdist, FILES)
    trees = [tmp_path / "one", tmp_path / "two"]
    for tree in trees:
        sources.compose(source, sdist, tree)
    assert cache.digest_of_tree(trees[0]) == cache.digest_of_tree(trees[1])
    for path in (trees[0], *trees[0].rglob("*")):
        assert path.stat().st_mtime == 1_700_000_000
    assert {path.stat().st_mode & 0o777 for path in trees[0].rglob("*.py")} == {0o644}


@pytest.mark.parametrize(
    "bad",
    [
        member(f"{ROOT}/../outside.py"),
        member("/absolute.py"),
        member("elsewhere/file.py"),
        member(f"{ROOT}/causal_conv1d/link.py", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member(f"{ROOT}/causal_conv1d/hard.py", type=tarfile.LNKTYPE, linkname="../../outside"),
        member(f"{ROOT}/causal_conv1d/device", type=tarfile.CHRTYPE),
        member(f"{ROOT}/causal_conv1d/pipe", type=tarfile.FIFOTYPE),
    ],
    ids=lambda info: info.name,
)
def test_what_leads_out_is_refused_and_nothing_is_left(bad: tarfile.TarInfo, sdist: Path, tmp_path: Path) -> None:
    source = make_sdist(sdist, FILES, bad)
    with pytest.raises(Problem, match="refused"):
        sources.compose(source, sdist, tmp_path / "tree")
    assert [path.name for path in tmp_path.iterdir()] == [sdist.name]


def test_an_sdist_without_the_package_is_refused(sdist: Path, tmp_path: Path) -> None:
    source = make_sdist(sdist, {f"{ROOT}/setup.py": b""})
    with pytest.raises(Problem, match=r"no causal_conv1d-1.6.0/causal_conv1d/__init__.py"):
        sources.compose(source, sdist, tmp_path / "tree")


class Index:
    """Stands for the package index: gives a file's bytes, and counts."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.count = 0

    def __call__(self, source: sources.Source, target: Path, settings: PipSettings) -> None:
        self.count += 1
        target.write_bytes(self.content)


def test_prepared_once_and_again_when_touched(sdist: Path, tmp_path: Path) -> None:
    source = make_sdist(sdist, FILES)
    index = Index(sdist.read_bytes())
    out = tmp_path / "out"
    out.mkdir()

    def prepare(wanted: sources.Source) -> Path:
        return sources.prepare(wanted, out, settings=PipSettings, download=index)

    tree = prepare(source)
    assert tree == out / ROOT
    made = tree.stat().st_ino
    assert prepare(source).stat().st_ino == made
    # what a build leaves behind, and an edit
    (tree / "build").mkdir()
    (tree / "build" / "left.o").write_bytes(b"object")
    (tree / "causal_conv1d" / "__init__.py").write_text("edited")
    prepare(source)
    assert not (tree / "build").exists()
    assert (tree / "causal_conv1d" / "__init__.py").read_bytes() == FILES[f"{ROOT}/causal_conv1d/__init__.py"]
    # other wishes make another tree of the same sdist
    prepare(dataclasses.replace(source, requires=("torch",)))
    assert "install_requires=['torch']" in (tree / "setup.py").read_text()
    assert index.count == 1
    assert sorted(path.name for path in out.iterdir()) == [".state", ROOT]


def test_another_checksum_is_refused(sdist: Path, tmp_path: Path) -> None:
    source = make_sdist(sdist, FILES)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(Problem) as caught:
        sources.prepare(source, out, settings=PipSettings, download=Index(b"something else"))
    assert hashlib.sha256(b"something else").hexdigest() in caught.value.found
    assert source.sha256 in caught.value.expected
    assert not (out / ROOT).exists()


def test_fetched_from_where_pip_is_told_to_look(sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_sdist(sdist, FILES)
    settings = PipSettings(find_links=[str(tmp_path)])
    sources.fetch(source, tmp_path / "fetched", settings)
    assert (tmp_path / "fetched").read_bytes() == sdist.read_bytes()
    with pytest.raises(Problem, match="has sha256"):
        sources.fetch(dataclasses.replace(source, sha256="0" * 64), tmp_path / "bad", settings)
    assert not (tmp_path / "bad").exists()
    with pytest.raises(Problem, match=r"has causal_conv1d-9.9.tar.gz"):
        sources.find_url(dataclasses.replace(source, version="9.9"), settings)
    with pytest.raises(Problem, match="no index and no links"):
        sources.find_url(source, PipSettings())


def test_pips_settings_come_from_its_files_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (tmp_path / "pip.conf").write_text("[global]\nextra-index-url = https://mirror.example/simple\ntimeout = 7\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", f"{tmp_path}/a {tmp_path}/b")
    settings = read_pip_settings()
    # other files of this machine may add further places
    assert settings.index_urls[0] == "https://index.example/simple"
    assert "https://mirror.example/simple" in settings.index_urls
    assert settings.find_links == [f"{tmp_path}/a", f"{tmp_path}/b"]
    assert settings.timeout_s == 7.0
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert read_pip_settings().index_urls == []


def test_without_pip_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulator.artefacts.pip_settings._QUESTION", "import no_such_pip")
    with pytest.raises(Problem, match="no_such_pip") as caught:
        read_pip_settings()
    assert "ensurepip" in caught.value.next_step
