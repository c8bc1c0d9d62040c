"""Sources: one content is one archive, and nothing unsafe or unmeant gets through."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.plugin_utils import components, fetch, sources

NAME, VERSION = "mamba_ssm", "2.2.4"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree that looks like mamba_ssm 2.2.4."""
    root = tmp_path / "tree"
    for name, text in {
        "setup.py": 'sources=["csrc/a.cu"]\n',
        "mamba_ssm/__init__.py": '__version__ = "2.2.4"\n',
        "csrc/a.cu": "// code\n",
        "run.sh": "#!/bin/sh\n",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "run.sh").chmod(0o755)
    return root


def prepare(source: dict[str, Any], tmp_path: Path, version: str = VERSION) -> sources.SourceArchive:
    return sources.prepare(NAME, version, source, tmp_path / "cache")


def refused(source: dict[str, Any], tmp_path: Path, version: str = VERSION) -> str:
    with pytest.raises(Problem) as caught:
        prepare(source, tmp_path, version)
    return caught.value.render()


def write_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> dict[str, Any]:
    """Write a tar.gz and return it as a source."""
    with tarfile.open(path, "w:gz") as handle:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                handle.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            handle.addfile(member, io.BytesIO(content))
    return {"kind": "archive", "path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def good_members() -> dict[str, bytes | tarfile.TarInfo]:
    return {"top/setup.py": b"pass\n", "top/mamba_ssm/__init__.py": b'__version__ = "2.2.4"\n'}


def test_the_digest_depends_on_the_content_only(tree: Path, tmp_path: Path) -> None:
    first = prepare({"kind": "tree", "path": str(tree)}, tmp_path)
    left_by_builds = ("build/x.o", "dist/a.whl", "mamba_ssm.egg-info/PKG-INFO", "mamba_ssm/__pycache__/a.pyc", "a.so")
    for noise in (*left_by_builds, ".git/x"):
        (tree / noise).parent.mkdir(parents=True, exist_ok=True)
        (tree / noise).write_text("noise")
    os.utime(tree / "setup.py", (1, 1))
    (tree / "setup.py").chmod(0o640)
    assert prepare({"kind": "tree", "path": str(tree)}, tmp_path).sha256 == first.sha256
    assert hashlib.sha256(first.path.read_bytes()).hexdigest() == first.sha256
    with tarfile.open(first.path) as handle:
        members = {one.name: one for one in handle}
    assert list(members) == ["csrc/a.cu", "mamba_ssm/__init__.py", "run.sh", "setup.py"]
    assert members["run.sh"].mode == 0o755 and members["setup.py"].mode == 0o644
    assert {one.mtime for one in members.values()} == {0}
    (tree / "csrc/a.cu").write_text("// other\n")
    assert prepare({"kind": "tree", "path": str(tree)}, tmp_path).sha256 != first.sha256


def test_an_archive_of_a_tree_is_the_same_source_as_the_tree(tree: Path, tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as handle:
        for path in sorted(tree.rglob("*")):
            handle.write(path, f"mamba-1/{path.relative_to(tree)}")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    zipped = prepare({"kind": "archive", "path": str(archive), "sha256": digest}, tmp_path)
    assert zipped.sha256 == prepare({"kind": "tree", "path": str(tree)}, tmp_path).sha256


def test_another_version_or_package_is_refused(tree: Path, tmp_path: Path) -> None:
    source = {"kind": "tree", "path": str(tree)}
    text = refused(source, tmp_path, "2.2.5")
    assert "is version 2.2.4" in text and "mamba_ssm_version: 2.2.4" in text
    (tree / "mamba_ssm/__init__.py").write_text("import torch\n")
    assert "names no version" in refused(source, tmp_path)
    (tree / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: mamba_ssm\nVersion: 2.2.4\n")
    assert prepare(source, tmp_path).version == "2.2.4"
    (tree / "mamba_ssm").rename(tree / "other")
    assert "has no mamba_ssm/__init__.py" in refused(source, tmp_path)


def test_a_tree_without_what_it_compiles_is_refused(tree: Path, tmp_path: Path) -> None:
    (tree / "csrc/a.cu").unlink()
    assert "lacks csrc/a.cu" in refused({"kind": "tree", "path": str(tree)}, tmp_path)


def test_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "a.tar.gz", good_members())
    assert prepare(source, tmp_path).version == "2.2.4"
    assert "has the sha256" in refused({**source, "sha256": "0" * 64}, tmp_path)
    assert "sha256sum" in refused({**source, "sha256": None}, tmp_path)


def _member(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("top/../../evil", b"x"),
        ("/evil", b"x"),
        ("top/link", _member("top/link", tarfile.SYMTYPE, "/etc/passwd")),
        ("top/link", _member("top/link", tarfile.SYMTYPE, "../../evil")),
        ("top/hard", _member("top/hard", tarfile.LNKTYPE, "../evil")),
        ("top/fifo", _member("top/fifo", tarfile.FIFOTYPE)),
        ("top/device", _member("top/device", tarfile.CHRTYPE)),
    ],
)
def test_nothing_leads_out_of_an_archive(name: str, content: bytes | tarfile.TarInfo, tmp_path: Path) -> None:
    source = write_tar(tmp_path / "a.tar.gz", {**good_members(), name: content})
    assert "leads out of its folder" in refused(source, tmp_path)
    assert not list(tmp_path.rglob("evil"))


def test_a_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    members = {**good_members(), "top/d": _member("top/d", tarfile.SYMTYPE, "/tmp"), "top/d/evil-7261": b"x"}
    assert "leads out" in refused(write_tar(tmp_path / "a.tar.gz", members), tmp_path)
    assert not Path("/tmp/evil-7261").exists()


def test_a_link_inside_stays_and_one_out_of_a_tree_is_refused(tree: Path, tmp_path: Path) -> None:
    (tree / "alias").symlink_to("csrc/a.cu")
    with tarfile.open(prepare({"kind": "tree", "path": str(tree)}, tmp_path).path) as handle:
        assert handle.getmember("alias").linkname == "csrc/a.cu"
    (tree / "out").symlink_to("../../secret")
    assert "leads out" in refused({"kind": "tree", "path": str(tree)}, tmp_path)


def test_git_takes_a_whole_commit_and_nothing_less(tree: Path, tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tree), "-c", "user.name=x", "-c", "user.email=x@x", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD")
    source = {"kind": "git", "url": str(tree), "commit": commit}
    found = prepare(source, tmp_path)
    assert found.origin.endswith(f"at {commit}")
    assert found.sha256 == prepare({"kind": "tree", "path": str(tree)}, tmp_path).sha256
    (tree / "new").write_text("x")
    git("add", "-A")
    git("commit", "-qm", "two")
    assert prepare({**source, "commit": git("rev-parse", "HEAD")}, tmp_path).sha256 != found.sha256
    for short in (commit[:12], "main", "v2.2.4"):
        assert "40 lower-case hex digits" in refused({**source, "commit": short}, tmp_path)
    assert "no commit" in refused({**source, "commit": "0" * 40}, tmp_path) or "failed" in refused(
        {**source, "commit": "0" * 40}, tmp_path
    )


def test_compose_takes_a_folder_out_of_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_tar(tmp_path / "base.tar.gz", {**good_members(), "top/setup.py": b'["csrc/a.cu"]\n'})
    others: dict[str, bytes | tarfile.TarInfo] = {"t/csrc/a.cu": b"//\n", "t/csrc/deep/b.h": b"//\n", "t/x.py": b""}
    other = write_tar(tmp_path / "other.tar.gz", others)
    monkeypatch.setattr(
        fetch, "ensure_index_file", lambda project, filename, sha256, cache, progress=None: tmp_path / filename
    )
    index = {"kind": "index", "project": "mamba-ssm", "filename": "other.tar.gz", "sha256": other["sha256"]}
    source = {"kind": "compose", "base": base, "add": [{"folder": "csrc", "from": index}]}
    with tarfile.open(prepare(source, tmp_path).path) as handle:
        assert handle.getnames() == ["csrc/a.cu", "csrc/deep/b.h", "mamba_ssm/__init__.py", "setup.py"]
    source["add"][0]["folder"] = "nothing"
    assert "has no folder 'nothing'" in refused(source, tmp_path)
    assert "lacks csrc/a.cu" in refused(base, tmp_path)


def test_a_row_with_another_setup_py_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = write_tar(tmp_path / "x.tar.gz", {**good_members(), "top/mamba_ssm/__init__.py": b'__version__ = "2.2.5"\n'})
    monkeypatch.setattr(fetch, "ensure_index_file", lambda *_args, **_more: Path(row["path"]))
    with pytest.raises(Problem, match=r"setup\.py of .* is not the one"):
        sources.prepare(NAME, "2.2.5", None, tmp_path / "cache")


def test_a_row_without_a_checksum_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(Problem) as caught:
        sources.prepare("causal_conv1d", "1.5.0.post8", None, tmp_path / "cache")
    assert "curl -fL https://github.com/" in caught.value.next_step
    assert "causal_conv1d_source" in caught.value.next_step


def test_an_unknown_version_or_component_is_named(tmp_path: Path) -> None:
    with pytest.raises(Problem) as caught:
        sources.prepare(NAME, "9.9", None, tmp_path)
    assert "2.2.4, 2.2.5, 2.2.6.post3" in caught.value.expected
    with pytest.raises(Problem, match="did you mean 'mamba_ssm'"):
        sources.prepare("mamba_smm", "2.2.4", None, tmp_path)


# ---------------------------------------------------------------- patches of the source


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def patch_root(tmp_path: Path) -> str:
    """A folder of series with two patches of csrc/a.cu, one after the other, and one of an installed file."""
    folder = tmp_path / "patches" / NAME / VERSION
    folder.mkdir(parents=True)
    rows = []
    for number, target, before, after, kind in (
        (1, "csrc/a.cu", "// code\n", "// more\n", "source"),
        (2, "csrc/a.cu", "// more\n", "// most\n", "source"),
        (3, "mamba_ssm/absent.py", "a\n", "b\n", "python"),
    ):
        diff = f"--- a/{target}\n+++ b/{target}\n@@ -1 +1 @@\n-{before}+{after}"
        (folder / f"000{number}-x.patch").write_text(diff)
        row = {"file": f"000{number}-x.patch", "target": target, "applies_to": kind, "until": None}
        row.update(sha256_before=digest(before), sha256_after=digest(after), why="a test", upstream="none")
        rows.append({**row, "when": {"causal_conv1d": ">=1.5.1"}})
    series = {"schema": 1, "package": NAME, "version": VERSION, "patches": rows}
    (folder / "series.yml").write_text(yaml.safe_dump(series))
    return str(tmp_path / "patches")


def patched(tree: Path, tmp_path: Path, patch_root: str, companion: str | None = "1.6.0") -> sources.SourceArchive:
    source = {"kind": "tree", "path": str(tree)}
    companions = {"causal_conv1d": companion}
    return sources.prepare(
        NAME, VERSION, source, tmp_path / "cache", None, patch_root=patch_root, companions=companions
    )


def test_patches_of_the_source_are_packed_with_it(tree: Path, tmp_path: Path, patch_root: str) -> None:
    (tree / "csrc/a.cu").chmod(0o755)
    plain = prepare({"kind": "tree", "path": str(tree)}, tmp_path)
    found = patched(tree, tmp_path, patch_root)
    assert found.sha256 != plain.sha256 and found.version == VERSION
    assert found.origin == f"{plain.origin} + 0001-x.patch + 0002-x.patch"
    with tarfile.open(found.path) as handle:
        assert handle.getmember("csrc/a.cu").mode == 0o755 and len(handle.getnames()) == 4
    assert sources.hashes_of(found, ["csrc/a.cu"]) == {"csrc/a.cu": digest("// most\n")}
    # the user's own tree is only read
    assert (tree / "csrc/a.cu").read_text() == "// code\n"


def test_without_a_patch_for_it_a_source_stays_as_it_is(
    tree: Path, tmp_path: Path, patch_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = prepare({"kind": "tree", "path": str(tree)}, tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    assert patched(tree, tmp_path, patch_root, "1.5.0") == plain
    assert patched(tree, tmp_path, patch_root, None) == plain
    assert patched(tree, tmp_path, str(tmp_path / "cache")) == plain
    assert patched(tree, tmp_path, "") == plain


@pytest.mark.parametrize("text", ["// more\n", "// most\n"])
def test_a_tree_that_has_patches_already_gets_the_others(
    text: str, tree: Path, tmp_path: Path, patch_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = patched(tree, tmp_path, patch_root).sha256
    (tree / "csrc/a.cu").write_text(text)
    if text == "// most\n":
        monkeypatch.setenv("PATH", "/nowhere")
    assert patched(tree, tmp_path, patch_root).sha256 == wanted


def test_a_source_that_its_patch_does_not_know_is_refused(tree: Path, tmp_path: Path, patch_root: str) -> None:
    (tree / "csrc/a.cu").write_text("// mine\n")
    with pytest.raises(Problem, match=rf"csrc/a\.cu of local tree .* has sha256 {digest('// mine' + chr(10))}"):
        patched(tree, tmp_path, patch_root)
    (tree / "csrc/a.cu").rename(tree / "csrc/b.cu")
    (tree / "csrc/b.cu").write_text("// code\n")
    (tree / "csrc/a.cu").symlink_to("b.cu")
    with pytest.raises(Problem, match="is no regular file there"):
        patched(tree, tmp_path, patch_root)


def test_without_a_patch_program_a_needed_patch_is_a_problem(
    tree: Path, tmp_path: Path, patch_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Problem) as caught:
        patched(tree, tmp_path, patch_root)
    assert "'patch' is not on the controller" in caught.value.found and "0001-x.patch" in caught.value.found
    assert not list((tmp_path / "cache" / "sources").iterdir())


def test_hashes_of_a_packed_source(tree: Path, tmp_path: Path) -> None:
    (tree / "alias").symlink_to("csrc/a.cu")
    (tree / "broken").symlink_to("nothing")
    archive = prepare({"kind": "tree", "path": str(tree)}, tmp_path)
    assert sources.hashes_of(archive, ["csrc/a.cu", "alias", "broken", "csrc", "absent.py"]) == {
        "csrc/a.cu": digest("// code\n"), "alias": digest("// code\n"), "broken": None, "csrc": None,
        "absent.py": None,
    }
    assert sources.hashes_of(archive, []) == {}


def _table() -> dict[str, Any]:
    return copy.deepcopy(yaml.safe_load(components.DATA.read_text()))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("mamba_ssm", "versions", "2.2.4", "disc_mb"), 5, "unknown key 'disc_mb', did you mean 'disk_mb'"),
        (("mamba_ssm", "versions", "2.2.4", "disk_mb"), "5", "value of type int|is '5'"),
        (("mamba_ssm", "versions", "2.2.4", "source", "base", "sha265"), "x", "did you mean 'sha256'"),
        (("mamba_ssm", "versions", "2.2.5", "source", "kind"), "indx", "did you mean 'index'"),
        (("mamba_ssm", "provides"), [], "did you mean 'provides_modules'"),
        (("mamba_ssm", "versions", 2.3), {}, "the version is a number"),
    ],
)
def test_the_table_is_checked(path: tuple[str, ...], value: Any, message: str) -> None:
    table = _table()
    components.check_table(table)
    row = table["components"]
    for key in path[:-1]:
        row = row[key]
    row[path[-1]] = value
    with pytest.raises(Problem, match=message):
        components.check_table(table)


def test_find_gives_what_the_planner_reads() -> None:
    facts = components.find("mamba_ssm", "2.2.4")
    assert facts["minutes_estimate"]["cuda"] > facts["minutes_estimate"]["cpu"]
    assert facts["force_build"] == "MAMBA_FORCE_BUILD"
    assert components.component("mamba_ssm", "2.2.4").extension_files == ("selective_scan_cuda*.so",)
    assert not components.find("mamba_ssm", "2.9")["known"]


def test_a_password_is_no_part_of_a_sources_place_or_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_login, bare = "https://ada:secret@h/x.git", "https://h/x.git"
    assert sources.bare_name(with_login) == sources.bare_name(bare)
    monkeypatch.setattr(fetch, "ensure_url", lambda *_words, **_more: tmp_path / "x.tar.gz")
    archive = {"kind": "archive", "url": "https://ada:secret@h/x.tar.gz", "sha256": "a" * 64}
    assert sources._archive(archive, tmp_path, "mamba_ssm", None)[1].startswith("https://h/x.tar.gz (sha256 ")
