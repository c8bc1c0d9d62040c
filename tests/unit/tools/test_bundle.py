"""tools/bundle.py: what is packed comes out unchanged, and nothing else ever does."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

from tools import bundle, bundle_make

ROOT = Path(__file__).resolve().parents[3]
WHEEL = b"wheel" * 5000
CLASS = "x86_64-glibc2.36-cu12.6-cp311-torch2.13.0+cpu-cxx11-cpu"
TRUST = {"schema": 1, "files": {"https://example.org/t.whl": {"sha256": "a" * 64, "size": 1, "accepted": "then"}}}
LISTING = {"schema": 1, "class_id": CLASS, "wheels": {"k1": {"filename": "w.whl"}}}
FILES = {
    "Makefile": b"all:\n",
    "tools/run": b"#!/bin/sh\n",
    f"{bundle.CACHE}/files/{'1' * 64}/torch.whl": WHEEL,
    f"{bundle.CACHE}/trust.json": json.dumps(TRUST).encode(),
    f"{bundle.WHEELHOUSE}/{CLASS}/mamba_ssm-111111111111/w.whl": b"built",
    f"{bundle.WHEELHOUSE}/{CLASS}/manifest.json": json.dumps(LISTING).encode(),
    f"{bundle.OWN}/123/mine.whl": b"mine",
    f"{bundle.CONTROLLER}/pip-1-py3-none-any.whl": b"pip",
}


def entries_of(folder: Path, files: dict[str, bytes] | None = None) -> list[bundle.Entry]:
    """Write files and return their entries, lists last."""
    found = []
    for path, content in (FILES if files is None else files).items():
        origin = folder / hashlib.sha256(path.encode()).hexdigest()
        origin.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        found.append(bundle.Entry(path, digest, len(content), path.startswith("tools/"), origin=origin))
    return sorted(found, key=lambda entry: (bundle.is_list(entry.path), entry.path))


def manifest(**more: Any) -> dict[str, Any]:
    made_for = {"platforms": ["p"], "inventory": False, "pythons": ["3.11"], "machine": "x86_64", "glibc": "2.31"}
    common = {"schema": 1, "project": "jetson-mamba", "commit": "c" * 40, "made_at": "then", "left_out": []}
    return {**common, "made_for": made_for, "settings": {}, **more}


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    folder = tmp_path / "stage"
    folder.mkdir()
    return folder


@pytest.fixture
def packed(tmp_path: Path, stage: Path) -> Path:
    target = tmp_path / "b.tar"
    bundle.write_bundle(target, manifest(), entries_of(stage), 1_000_000_000)
    return target


@pytest.fixture
def places(tmp_path: Path) -> bundle.Places:
    return bundle.Places(tmp_path / "project", tmp_path / "cache", tmp_path / "wheelhouse")


def quiet(_text: str) -> None:
    """Say nothing."""


def files_below(*folders: Path) -> set[str]:
    return {str(path) for folder in folders if folder.exists() for path in folder.rglob("*") if path.is_file()}


def assert_opened(places: bundle.Places) -> None:
    assert (places.cache / "files" / ("1" * 64) / "torch.whl").read_bytes() == WHEEL
    assert json.loads((places.cache / "trust.json").read_text()) == TRUST
    assert (places.wheelhouse / CLASS / "mamba_ssm-111111111111" / "w.whl").read_bytes() == b"built"
    assert json.loads((places.wheelhouse / CLASS / "manifest.json").read_text()) == LISTING
    assert (places.root / bundle.OWN / "123" / "mine.whl").read_bytes() == b"mine"
    assert (places.root / bundle.CONTROLLER / "pip-1-py3-none-any.whl").read_bytes() == b"pip"
    assert stat.S_IMODE((places.root / "tools" / "run").stat().st_mode) == 0o755
    assert stat.S_IMODE((places.root / "Makefile").stat().st_mode) == 0o644
    assert not (places.root / bundle.CACHE).exists()


# ---------------------------------------------------------------- opening


def test_a_bundle_comes_out_as_it_went_in(packed: Path, places: bundle.Places) -> None:
    bundle.open_file(packed, places, quiet)
    assert_opened(places)


def test_what_tar_unpacked_comes_out_as_it_went_in_and_is_moved(packed: Path, tmp_path: Path) -> None:
    with tarfile.open(packed) as tar:
        tar.extractall(tmp_path / "there")
    root = tmp_path / "there" / "jetson-mamba"
    places = bundle.Places(root, tmp_path / "cache", root / "wheelhouse")
    before = (root / bundle.CACHE / "files" / ("1" * 64) / "torch.whl").stat().st_ino
    bundle.open_tree(places, quiet)
    assert_opened(places)
    assert (places.cache / "files" / ("1" * 64) / "torch.whl").stat().st_ino == before


def test_opening_twice_changes_nothing(packed: Path, places: bundle.Places, tmp_path: Path) -> None:
    for _time in range(2):
        bundle.open_file(packed, places, quiet)
        assert_opened(places)
    with tarfile.open(packed) as tar:
        tar.extractall(tmp_path / "there")
    moved = bundle.Places(tmp_path / "there" / "jetson-mamba", tmp_path / "cache2", tmp_path / "wheelhouse2")
    for _time in range(2):
        bundle.open_tree(moved, quiet)
        assert_opened(moved)


def test_a_tree_may_be_edited_once_it_is_opened(packed: Path, tmp_path: Path) -> None:
    with tarfile.open(packed) as tar:
        tar.extractall(tmp_path / "there")
    places = bundle.Places(tmp_path / "there" / "jetson-mamba", tmp_path / "cache", tmp_path / "wheelhouse")
    (places.root / "Makefile").write_text("changed")
    with pytest.raises(Problem, match="Makefile is not what was packed"):
        bundle.open_tree(places, quiet)
    assert not places.cache.exists()
    (places.root / "Makefile").write_bytes(FILES["Makefile"])
    bundle.open_tree(places, quiet)
    (places.root / "Makefile").write_text("mine now")
    bundle.open_tree(places, quiet)


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9, 0.97])
def test_a_truncated_bundle_puts_nothing_in_place(packed: Path, places: bundle.Places, part: float) -> None:
    size = int(packed.stat().st_size * part)
    for cut in (size, size // 512 * 512):  # also between two blocks, where nothing looks broken
        with open(packed, "r+b") as stream:
            stream.truncate(cut)
        with pytest.raises(Problem, match=r"tar file|too early|begin|file of|sha256"):
            bundle.open_file(packed, places, quiet)
    assert not files_below(places.root, places.cache, places.wheelhouse)


@pytest.mark.parametrize("with_sum", [True, False])
def test_a_changed_byte_puts_nothing_in_place(packed: Path, places: bundle.Places, with_sum: bool) -> None:
    whole = packed.read_bytes()
    if not with_sum:
        packed.with_name("b.tar.sha256").unlink()
    with tarfile.open(packed) as tar:
        spots = [member.offset_data + member.size // 2 for member in tar if member.size]
        headers = [member.offset + 3 for member in tar.getmembers()]
    assert len(spots) == len(FILES) + 1
    for spot in [*spots, *headers]:
        packed.write_bytes(whole[:spot] + bytes([whole[spot] ^ 1]) + whole[spot + 1 :])
        with pytest.raises(Problem):
            bundle.open_file(packed, places, quiet)
    assert not files_below(places.root, places.cache, places.wheelhouse)


def test_the_sum_beside_a_bundle_sees_what_no_member_shows(packed: Path, places: bundle.Places) -> None:
    with open(packed, "ab") as stream:
        stream.write(b"\0" * 512)
    with pytest.raises(Problem, match=r"b\.tar\.sha256 says another"):
        bundle.open_file(packed, places, quiet)


def forge(target: Path, rows: Sequence[dict[str, Any]], members: Sequence[tuple[tarfile.TarInfo, bytes]]) -> None:
    """Write a bundle whose manifest is sound but for what its rows say."""
    with tarfile.open(target, "w") as tar:
        text = bundle.render_manifest(manifest(files=list(rows)))
        first = tarfile.TarInfo(f"jetson-mamba/{bundle.MANIFEST}")
        first.size = len(text)
        tar.addfile(first, io.BytesIO(text))
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def row(path: str, content: bytes = b"x", **more: Any) -> dict[str, Any]:
    return {"path": path, "size": len(content), "sha256": hashlib.sha256(content).hexdigest(), **more}


@pytest.mark.parametrize(
    "path",
    ["../out", "a/../../out", "/etc/out", "a//b", "", ".", "a/./b", "a\\b", "a\nb", f"{bundle.CACHE}/../../../out"],
)
def test_no_path_leads_out(tmp_path: Path, places: bundle.Places, path: str) -> None:
    forge(tmp_path / "f.tar", [row(path)], [(tarfile.TarInfo(f"jetson-mamba/{path}"), b"x")])
    with pytest.raises(Problem, match="leads out"):
        bundle.open_file(tmp_path / "f.tar", places, quiet)
    assert files_below(tmp_path) == {str(tmp_path / "f.tar")}


@pytest.mark.parametrize("link", ["/etc", "..", "a/../../b"])
def test_no_link_leads_out(tmp_path: Path, places: bundle.Places, link: str) -> None:
    info = tarfile.TarInfo("jetson-mamba/l")
    info.type, info.linkname = tarfile.SYMTYPE, link
    forge(tmp_path / "f.tar", [{"path": "l", "size": 0, "link": link}], [(info, b"")])
    with pytest.raises(Problem, match="leads out"):
        bundle.open_file(tmp_path / "f.tar", places, quiet)


def test_nothing_is_written_through_a_link(tmp_path: Path, places: bundle.Places) -> None:
    info = tarfile.TarInfo("jetson-mamba/l")
    info.type, info.linkname = tarfile.SYMTYPE, "tools"
    rows = [{"path": "l", "size": 0, "link": "tools"}, row("l/x")]
    forge(tmp_path / "f.tar", rows, [(info, b""), (tarfile.TarInfo("jetson-mamba/l/x"), b"x")])
    with pytest.raises(Problem, match="through a link"):
        bundle.open_file(tmp_path / "f.tar", places, quiet)


def test_a_link_inside_is_kept(tmp_path: Path, places: bundle.Places) -> None:
    info = tarfile.TarInfo("jetson-mamba/a/l")
    info.type, info.linkname = tarfile.SYMTYPE, "../x"
    rows = [row("x"), {"path": "a/l", "size": 0, "link": "../x"}]
    forge(tmp_path / "f.tar", rows, [(tarfile.TarInfo("jetson-mamba/x"), b"x"), (info, b"")])
    bundle.open_file(tmp_path / "f.tar", places, quiet)
    assert (places.root / "a" / "l").read_text() == "x"


@pytest.mark.parametrize(
    ("rows", "names", "said"),
    [
        ([row("a")], ["a", "b"], "does not name"),
        ([row("a")], ["a", "a"], "does not name"),
        ([row("a")], ["../a"], "does not name"),
        ([row("a"), row("b")], ["a"], "1 of 2 files are missing, first b"),
        ([row("a", b"longer")], ["a"], "not the file of 6 bytes"),
    ],
)
def test_members_are_those_that_the_manifest_names(
    tmp_path: Path, places: bundle.Places, rows: list[dict[str, Any]], names: list[str], said: str
) -> None:
    forge(tmp_path / "f.tar", rows, [(tarfile.TarInfo(f"jetson-mamba/{name}"), b"x") for name in names])
    with pytest.raises(Problem, match=said):
        bundle.open_file(tmp_path / "f.tar", places, quiet)
    assert not files_below(places.root)


def test_a_device_file_is_no_file(tmp_path: Path, places: bundle.Places) -> None:
    info = tarfile.TarInfo("jetson-mamba/a")
    info.type = tarfile.FIFOTYPE
    forge(tmp_path / "f.tar", [row("a", b"")], [(info, b"")])
    with pytest.raises(Problem, match="not the file"):
        bundle.open_file(tmp_path / "f.tar", places, quiet)


def test_a_manifest_of_another_release_is_refused(tmp_path: Path, places: bundle.Places) -> None:
    text = bundle.render_manifest(manifest(schema=2, files=[]))
    with pytest.raises(Problem, match="schema 2"):
        bundle.read_manifest(text, "f.tar")


def test_a_manifest_that_was_edited_is_refused() -> None:
    text = bundle.render_manifest(manifest(files=[row("a")]))
    assert bundle.read_manifest(text, "f.tar")[1]["a"].size == 1
    with pytest.raises(Problem, match="its manifest was changed"):
        bundle.read_manifest(text.replace(b'"then"', b'"when"'), "f.tar")


@pytest.mark.parametrize("text", [b"", b"[]", b'{"schema": 1}', b'{"schema": 1, "files": [{"path": 3, "size": 1}]}'])
def test_a_manifest_that_is_none_is_refused(text: bytes) -> None:
    with pytest.raises(Problem):
        bundle.read_manifest(text, "f.tar")


def test_a_folder_with_other_contents_is_refused(packed: Path, places: bundle.Places) -> None:
    places.root.mkdir()
    (places.root / "mine.txt").write_text("mine")
    with pytest.raises(Problem, match=r"mine\.txt, which is not of this bundle"):
        bundle.open_file(packed, places, quiet)
    assert files_below(places.root, places.cache) == {str(places.root / "mine.txt")}


def test_a_changed_file_of_the_project_is_other_contents(packed: Path, places: bundle.Places) -> None:
    bundle.open_file(packed, places, quiet)
    (places.root / "Makefile").write_text("mine")
    with pytest.raises(Problem, match="Makefile, which is not"):
        bundle.open_file(packed, places, quiet)
    assert (places.root / "Makefile").read_text() == "mine"


def test_a_full_disk_is_said_and_the_next_try_goes_on(
    packed: Path, places: bundle.Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.copyfileobj
    count = 0

    def full(source: Any, target: Any, length: int = 0) -> None:
        nonlocal count
        count += 1
        if count == 4:
            target.write(source.read(3))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target, length)

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(Problem, match="No space left") as caught:
        bundle.open_file(packed, places, quiet)
    assert "goes on" in caught.value.next_step
    assert not [name for name in files_below(places.root, places.cache) if bundle.PARTIAL in name]
    # a kill leaves its temporary file
    (places.root / f"{bundle.PARTIAL}99").write_text("half")
    bundle.open_file(packed, places, quiet)
    assert_opened(places)
    assert count == 4 + len(FILES) - 3 - 2  # three were there, two are lists


def test_an_interrupted_move_goes_on(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(packed) as tar:
        tar.extractall(tmp_path / "there")
    places = bundle.Places(tmp_path / "there" / "jetson-mamba", tmp_path / "cache", tmp_path / "wheelhouse")
    for name in ("place", "finish"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(bundle, name, lambda *_words: (_ for _ in ()).throw(KeyboardInterrupt()))
            bundle.open_tree(places, quiet)
    bundle.open_tree(places, quiet)
    assert_opened(places)


def test_room_is_looked_for_first(packed: Path, places: bundle.Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=20_000))
    with pytest.raises(Problem, match="1 MB free") as caught:
        bundle.open_file(packed, places, quiet)
    assert "artefact cache 1 MB" in caught.value.expected
    assert not files_below(places.root, places.cache)


def test_folders_on_one_disk_share_its_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=100))
    bundle.check_room([(tmp_path / "a", 60, "one"), (tmp_path / "b", 40, "two")])
    with pytest.raises(Problem):
        bundle.check_room([(tmp_path / "a", 60, "one"), (tmp_path / "b", 41, "two")])


def test_lists_that_are_there_are_merged(packed: Path, places: bundle.Places) -> None:
    places.cache.mkdir()
    other = {"https://example.org/other.whl": {"sha256": "b" * 64, "size": 2, "accepted": "before"}}
    (places.cache / "trust.json").write_text(json.dumps({"schema": 1, "files": other}))
    (places.wheelhouse / CLASS).mkdir(parents=True)
    mine = {"k0": {"filename": "old.whl"}, "k1": {"filename": "mine.whl"}}
    (places.wheelhouse / CLASS / "manifest.json").write_text(json.dumps({**LISTING, "wheels": mine}))
    bundle.open_file(packed, places, quiet)
    assert json.loads((places.cache / "trust.json").read_text())["files"] == {**other, **TRUST["files"]}  # type: ignore[dict-item]
    assert json.loads((places.wheelhouse / CLASS / "manifest.json").read_text())["wheels"] == mine


@pytest.mark.parametrize("unpacked", [True, False])
def test_another_checksum_for_the_same_url_is_refused_before_anything_is_placed(
    packed: Path, tmp_path: Path, unpacked: bool
) -> None:
    places = bundle.Places(tmp_path / "there" / "jetson-mamba", tmp_path / "cache", tmp_path / "wheelhouse")
    places.cache.mkdir()
    other = {"https://example.org/t.whl": {"sha256": "b" * 64, "size": 2, "accepted": "before"}}
    (places.cache / "trust.json").write_text(json.dumps({"schema": 1, "files": other}))
    with pytest.raises(Problem, match="b" * 64):
        if unpacked:
            with tarfile.open(packed) as tar:
                tar.extractall(tmp_path / "there")
            bundle.open_tree(places, quiet)
        else:
            bundle.open_file(packed, places, quiet)
    assert files_below(places.cache, places.wheelhouse) == {str(places.cache / "trust.json")}


def test_settings_name_the_new_places(tmp_path: Path, stage: Path) -> None:
    settings = {"torch_jetpack_wheel": {"path": f"{bundle.OWN_MARK}/123/mine.whl", "version": "1"}}
    bundle.write_bundle(tmp_path / "b.tar", manifest(settings=settings), entries_of(stage), 0)
    places = bundle.Places(tmp_path / 'a "b"', tmp_path / "cache", tmp_path / "wheelhouse")
    opened = bundle.open_file(tmp_path / "b.tar", places, quiet)
    text = (places.root / bundle.OWN_SETTINGS).read_text()
    path = Path(json.loads(text.split("\n", 2)[2])["torch_jetpack_wheel"]["path"])
    assert path.read_bytes() == b"mine"
    assert f"-e @{bundle.OWN_SETTINGS}" in bundle.next_steps(opened, places)[-1]


def test_opening_needs_the_standard_library_alone(packed: Path, tmp_path: Path) -> None:
    """-S: without site-packages; as a controller that has only Python."""
    command = [sys.executable, "-S", "-I", str(ROOT / "tools" / "bundle.py"), "open", str(packed)]
    command += ["--into", str(tmp_path / "p"), "--cache", str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "jetson_platform_cache=" in done.stderr
    assert (tmp_path / "c" / "trust.json").is_file()


def test_a_tree_that_is_from_no_bundle_is_said(places: bundle.Places) -> None:
    places.root.mkdir()
    with pytest.raises(Problem, match="does not come from a bundle"):
        bundle.open_tree(places, quiet)


# ---------------------------------------------------------------- packing


def test_a_bundle_depends_on_its_content_alone(tmp_path: Path, stage: Path) -> None:
    sums = [bundle.write_bundle(tmp_path / name, manifest(), entries_of(stage), 7) for name in ("a.tar", "b.tar")]
    assert sums[0] == sums[1] == hashlib.sha256((tmp_path / "a.tar").read_bytes()).hexdigest()
    assert (tmp_path / "a.tar.sha256").read_text() == f"{sums[0]}  a.tar\n"


@pytest.mark.parametrize("content", [b"other", b"FIVE!", b"longer than it was", b"five.and more"])
def test_a_file_that_changes_while_it_is_packed_is_seen(tmp_path: Path, stage: Path, content: bytes) -> None:
    entries = entries_of(stage, {"a": b"five."})
    assert entries[0].origin is not None
    entries[0].origin.write_bytes(content)
    with pytest.raises(Problem, match="changed while it was packed"):
        bundle.write_bundle(tmp_path / "b.tar", manifest(), entries, 0)
    assert not list(tmp_path.glob("*.tar*"))
    assert not list(tmp_path.glob(f"{bundle.PARTIAL}*"))


def repository(folder: Path) -> Path:
    """Make a small repository with one commit, an executable, a link and a file that is not committed."""
    folder.mkdir()
    (folder / "run").write_text("#!/bin/sh\n")
    (folder / "run").chmod(0o755)
    (folder / "link").symlink_to("run")
    (folder / "é.txt").write_text("e")
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q", "-b", "main"], ["add", "-A"], [*identity, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    (folder / "draft.txt").write_text("not committed")
    (folder / "run").write_text("#!/bin/sh\nedited\n")
    (folder / "bundle").mkdir()
    (folder / "bundle" / "old.tar").write_text("")
    return folder


def test_the_project_is_packed_as_committed(tmp_path: Path, stage: Path) -> None:
    root = repository(tmp_path / "r")
    assert bundle_make.uncommitted(root) == ["run", "draft.txt"]
    collection = bundle_make.Collection()
    bundle_make.collect_project(collection, stage, root)
    found = collection.entries
    assert set(found) == {"run", "link", "é.txt", bundle.GIT_BUNDLE}
    assert found["run"].executable
    assert found["run"].size == len("#!/bin/sh\n")
    assert found["link"].link == "run"
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(found[bundle.GIT_BUNDLE].origin), str(clone)], check=True)
    assert (clone / "run").read_text() == "#!/bin/sh\n"


def test_a_folder_without_a_commit_is_said(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="rev-parse"):
        bundle_make.git("rev-parse", "--verify", "HEAD", root=tmp_path)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    with pytest.raises(Problem) as caught:
        bundle_make.git("rev-parse", "--verify", "HEAD", root=tmp_path)
    assert "at least one commit" in caught.value.expected


# ---------------------------------------------------------------- what it is for


def test_words_of_ansible_are_sorted() -> None:
    values, vault, others = bundle_make.split_args(
        "-e a=1 --extra-vars='b=2 c=\"x y\"' -e@f.yml --vault-id dev@x --vault-password-file=p -J --limit site_a"
    )
    assert values == ["a=1", 'b=2 c="x y"', "@f.yml"]
    assert vault == ["--vault-id", "dev@x", "--vault-password-file=p", "-J"]
    assert others == ["--limit", "site_a"]


def test_extra_variables_are_read_in_all_their_forms(tmp_path: Path) -> None:
    (tmp_path / "f.yml").write_text("d: [1]\n")
    given = ["a=1", "b=2 c='x y'", f"@{tmp_path / 'f.yml'}", '{"e": {"f": true}}']
    assert bundle_make.read_extra(given) == {"a": "1", "b": "2", "c": "x y", "d": [1], "e": {"f": True}}
    for wrong in ("@/nowhere.yml", "{", "[1]"):
        with pytest.raises(Problem, match="-e"):
            bundle_make.read_extra([wrong])


def test_a_wrong_platform_is_answered_with_the_right_ones() -> None:
    settings = bundle_make.effective_settings({}, {})
    with pytest.raises(Problem, match=r"jetpack-6\.O; did you mean jetpack-6\.0\?") as caught:
        bundle_make.choose_rows(["jetpack-6.1-6.2", "jetpack-6.O"], settings)
    assert "jetpack-7.2-thor" in caught.value.expected
    chosen = bundle_make.choose_rows(["jetpack-6.1-6.2", "jetpack-6.1-6.2"], settings)
    assert [one["id"] for one, _settings in chosen] == ["jetpack-6.1-6.2"]


def own_row(**more: Any) -> dict[str, Any]:
    common = {"id": "mine", "l4t": ["none"], "soc": ["any"], "machine": "x86_64", "python": "3.12", "cuda": "12.6"}
    return {**common, "sm": "89", "lock": "cp312-linux_aarch64.txt", **more}


def test_rows_of_the_user_come_first_and_differ_by_host() -> None:
    hosts = {
        "a": {"jetson_platform_rows": [own_row(), own_row(id="jetpack-6.0")]},
        "b": {"jetson_platform_rows": [own_row()]},
        "c": {"jetson_platform_rows": [own_row()], "ansible_host": "10.0.0.1"},
    }
    settings = bundle_make.effective_settings(hosts, {"torch_jetpack_trust_on_first_use": "true"})
    assert len(settings) == 2  # c differs from b in nothing that counts
    assert all(one["torch_jetpack_trust_on_first_use"] is True for one in settings)
    chosen = bundle_make.choose_rows(["mine", "jetpack-6.0"], settings)
    assert [(one["id"], one["machine"]) for one, _settings in chosen] == [
        ("mine", "x86_64"),
        ("jetpack-6.0", "x86_64"),
        ("mine", "x86_64"),
        ("jetpack-6.0", "aarch64"),
    ]


def test_wrong_settings_are_all_said_at_once() -> None:
    hosts = {"a": {"jetson_platform_scope": "world", "jetson_platform_rows": [own_row(python=3.12)]}}
    with pytest.raises(bundle.Refused) as caught:
        bundle_make.effective_settings(hosts, {})
    text = caught.value.render()
    assert "world" in text
    assert "python is 3.12" in text


def test_a_template_is_refused_or_named() -> None:
    hosts = {"a": {"torch_jetpack_lock": "{{ playbook_dir }}/my.txt"}}
    with pytest.raises(bundle.Refused) as caught:
        bundle_make.effective_settings(hosts, {})
    assert "torch_jetpack_lock of a is a template" in caught.value.render()
    templates: list[str] = []
    assert bundle_make.effective_settings(hosts, {}, templates)[0]["torch_jetpack_lock"] == ""
    assert templates == ["torch_jetpack_lock"]


def test_hosts_of_groups_below_count() -> None:
    listing = {
        "jetsons": {"children": ["a", "b"]},
        "a": {"hosts": ["h1"]},
        "b": {"children": ["c"]},
        "c": {"hosts": ["h2"]},
    }
    assert bundle_make.group_hosts(listing, "jetsons") == {"h1", "h2"}


@pytest.mark.parametrize("pythons", [[], ["3.9"], ["3.10", "3.14"]])
def test_a_python_without_a_lock_is_refused(pythons: list[str]) -> None:
    with pytest.raises(Problem, match="PYTHONS has"):
        bundle_make.check_pythons(pythons)


@pytest.fixture
def maker(tmp_path: Path) -> bundle_make.Maker:
    return bundle_make.Maker(tmp_path / "cache", tmp_path / "wheelhouse", "x86_64", ["3.11"], None, False)


@pytest.mark.parametrize(("python", "glibc"), [("3.10", "2.35"), ("3.11", "2.36"), ("3.12", "2.39")])
def test_the_glibc_of_a_platform_follows_from_its_python(maker: bundle_make.Maker, python: str, glibc: str) -> None:
    assert maker.target_of(own_row(python=python)).glibc == glibc
    maker.glibc = "2.28"
    assert maker.target_of(own_row(python=python)).glibc == "2.28"


def test_an_unknown_glibc_is_asked_for(maker: bundle_make.Maker) -> None:
    with pytest.raises(Problem, match=r"nothing says its glibc"):
        maker.target_of(own_row(python="3.14"))


def settings_with(**more: Any) -> dict[str, Any]:
    return bundle_make.effective_settings({"h": more}, {})[0]


def test_a_wheel_without_a_checksum_is_refused_unless_trusted(maker: bundle_make.Maker) -> None:
    (row, settings), *_ = bundle_make.choose_rows(["jetpack-6.1-6.2"], [settings_with()])
    problems = maker.check_row(row, settings)
    assert [problem.found.split(":")[0] for problem in problems] == ["no checksum is known for https"] * 2
    assert "sha256sum" in problems[0].next_step
    assert not maker.check_row(row, settings_with(torch_jetpack_trust_on_first_use=True))
    maker.without_torch = True
    assert not maker.check_row(row, settings)


def test_an_unsupported_platform_is_refused_with_its_reason(maker: bundle_make.Maker) -> None:
    (row, settings), *_ = bundle_make.choose_rows(["jetpack-5"], [settings_with()])
    assert "upgrade the device" in maker.check_row(row, settings)[0].next_step


def test_files_of_the_user_get_new_places(maker: bundle_make.Maker, tmp_path: Path) -> None:
    for name in ("torch.whl", "row.whl", "my.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "debs").mkdir()
    (tmp_path / "debs" / "x.deb").write_text("deb")
    row = own_row(torch={"version": "1", "path": str(tmp_path / "row.whl")}, lock=str(tmp_path / "my.txt"))
    settings = settings_with(
        torch_jetpack_wheel={"version": "1", "path": str(tmp_path / "torch.whl")},
        jetson_platform_rows=[row, own_row(id="other")],
    )
    settings.update(debian_packages_folder=str(tmp_path / "debs"), jetson_platform_root="/ssd/x")
    settings["wheelhouse_sources"] = [{"folder": str(tmp_path / "debs")}, {"index": "https://example.org/simple"}]
    extra = {"jetson_platform_root": "/ssd/x", "ansible_become_password": "secret", "jetson_platform_cache": "/c"}
    extra["torch_jetpack_trust_on_first_use"] = "true"
    maker.note_settings(settings, extra)
    maker.settle()
    kept = maker.collection.settings
    packed = {path: entry.origin for path, entry in maker.collection.entries.items()}

    def is_packed(place: str, content: str) -> bool:
        origin = packed[place.replace(bundle.OWN_MARK, bundle.OWN)]
        return origin is not None and origin.read_text() == content

    assert is_packed(kept["torch_jetpack_wheel"]["path"], "torch.whl")
    assert is_packed(kept["jetson_platform_rows"][0]["torch"]["path"], "row.whl")
    assert is_packed(kept["jetson_platform_rows"][0]["lock"], "my.txt")
    assert kept["jetson_platform_rows"][1] == own_row(id="other")
    assert is_packed(kept["debian_packages_folder"] + "/x.deb", "deb")
    assert kept["wheelhouse_sources"][1] == {"index": "https://example.org/simple"}
    assert kept["jetson_platform_root"] == "/ssd/x"
    # no password gets into a file that travels, and no folder of this machine
    assert "secret" not in json.dumps(kept)
    assert not {"jetson_platform_cache", "torch_jetpack_trust_on_first_use"} & set(kept)
    assert str(tmp_path) not in json.dumps(kept)


def test_no_password_gets_into_a_bundle(maker: bundle_make.Maker, stage: Path) -> None:
    url = "https://alice:p@ss@devpi.example/t.whl"
    extra = {
        "wheelhouse_sources": [{"index": "https://alice:secret@devpi.example/simple"}],
        "debian_packages_repositories": ["deb https://alice:secret@apt.example/ubuntu jammy main"],
        "torch_jetpack_wheel": {"version": "1", "url": url, "sha256": None},
    }
    maker.note_settings(settings_with(**extra), extra)
    maker.settle()
    kept = maker.collection.settings
    assert kept["wheelhouse_sources"] == [{"index": "https://devpi.example/simple"}]
    assert kept["debian_packages_repositories"] == ["deb https://apt.example/ubuntu jammy main"]
    assert kept["torch_jetpack_wheel"]["url"] == "https://devpi.example/t.whl"
    (line,) = [line for line in maker.collection.left_out if "passwords" in line]
    assert "wheelhouse_sources" in line and "~/.netrc" in line
    # as an earlier version recorded it, and as a device's own apt source says it
    old = {"schema": 1, "files": {url: {"sha256": "a" * 64, "size": 1}}}
    (maker.cache.root / "debs").mkdir(parents=True)
    (maker.cache.root / "trust.json").write_text(json.dumps(old))
    lock = {"sources": ["https://alice:secret@apt.example/ubuntu jammy"], "packages": []}
    (maker.cache.root / "debs" / "x.json").write_text(json.dumps(lock))
    maker.add_whole_cache(stage)
    texts = {path: entry.origin.read_text() for path, entry in maker.collection.entries.items() if entry.origin}
    assert json.loads(texts[f"{bundle.CACHE}/trust.json"])["files"] == {
        "https://devpi.example/t.whl": {"sha256": "a" * 64, "size": 1}
    }
    assert f"{bundle.CACHE}/debs/x.json" in texts
    found = json.dumps([list(texts.values()), kept, maker.collection.left_out])
    assert not [word for word in ("alice", "secret", "p@ss") if word in found]


def test_settings_that_differ_between_hosts_are_left_to_the_user(maker: bundle_make.Maker, tmp_path: Path) -> None:
    for name in ("a.whl", "b.whl"):
        (tmp_path / name).write_text(name)
        wheel = {"version": "1", "path": str(tmp_path / name)}
        maker.note_settings(settings_with(torch_jetpack_wheel=wheel), {})
    maker.settle()
    assert not maker.collection.settings
    assert "torch_jetpack_wheel: it differs" in maker.collection.left_out[0]
    assert len(maker.collection.entries) == 2


def put(maker: bundle_make.Maker, content: bytes, name: str) -> str:
    """Put a file into the maker's cache; return its sha256."""
    digest = hashlib.sha256(content).hexdigest()
    folder = maker.cache.root / "files" / digest
    folder.mkdir(parents=True)
    (folder / name).write_bytes(content)
    return digest


def test_the_whole_cache_is_packed_but_not_what_is_damaged_or_in_flight(
    maker: bundle_make.Maker, stage: Path
) -> None:
    good, bad = put(maker, b"good", "g.whl"), put(maker, b"bad", "b.whl")
    (maker.cache.root / "files" / bad / "b.whl").write_bytes(b"worse")
    for name in ("partial/x", "locks/y", "git/abc.git/HEAD"):
        (maker.cache.root / name).parent.mkdir(parents=True)
        (maker.cache.root / name).write_text("z")
    maker.cache.trust("https://example.org/x.whl", good, 4)
    maker.add_whole_cache(stage)
    expected = {f"{bundle.CACHE}/files/{good}/g.whl", f"{bundle.CACHE}/git/abc.git/HEAD", f"{bundle.CACHE}/trust.json"}
    assert set(maker.collection.entries) == expected
    assert "b.whl" in maker.collection.left_out[0]


def test_only_the_accepted_checksums_of_the_platforms_travel(maker: bundle_make.Maker, stage: Path) -> None:
    maker.cache.trust("https://example.org/x.whl", "a" * 64, 4)
    maker.cache.trust("https://example.org/y.whl", "b" * 64, 4)
    maker.add_trust(["https://example.org/y.whl", "https://example.org/z.whl"], stage)
    origin = maker.collection.entries[f"{bundle.CACHE}/trust.json"].origin
    assert origin is not None
    assert list(json.loads(origin.read_text())["files"]) == ["https://example.org/y.whl"]


def test_debian_packages_of_the_machine_travel_with_their_lock(maker: bundle_make.Maker, stage: Path) -> None:
    arm, amd = put(maker, b"arm", "a.deb"), put(maker, b"amd", "b.deb")
    (maker.cache.root / "debs").mkdir()
    for name, digest in (("arm64", arm), ("amd64", amd)):
        data = {"packages": [{"name": "p", "architecture": name, "sha256": digest}]}
        (maker.cache.root / "debs" / f"{name}.json").write_text(json.dumps(data))
    (maker.cache.root / "debs" / "broken.json").write_text("{")
    assert maker.add_debian_packages({"aarch64"}, stage) == 1
    assert set(maker.collection.entries) == {f"{bundle.CACHE}/debs/arm64.json", f"{bundle.CACHE}/files/{arm}/a.deb"}
    assert "broken.json" in maker.collection.left_out[0]


def test_sources_are_taken_apart() -> None:
    index = {"kind": "index", "project": "p", "filename": "p.tar.gz", "sha256": "a" * 64}
    tree = {"kind": "tree", "path": "/x"}
    composed = {"kind": "compose", "base": index, "add": [{"folder": "csrc", "from": tree}]}
    assert list(bundle_make.parts_of(composed)) == [index, tree]
    assert "path" in set(bundle_make.keys_of(composed))
    assert "path" not in set(bundle_make.keys_of(index))


def test_all_that_cannot_be_had_is_said_at_once(
    maker: bundle_make.Maker, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(what: str) -> None:
        raise Problem(f"no {what}", "it", "get it")

    monkeypatch.setattr(bundle_make, "collect_project", lambda *_words: None)
    monkeypatch.setattr(maker, "fetch_controller", lambda _stage: refuse("wheels"))
    monkeypatch.setattr(maker, "fetch_row", lambda row, _settings: refuse(row["id"]))
    wanted = [(own_row(id="one"), settings_with()), (own_row(id="two"), settings_with())]
    options = SimpleNamespace(inventory=None)
    with pytest.raises(bundle.Refused) as caught:
        bundle_make.gather(maker, wanted, [settings_with()], {}, options, stage)  # type: ignore[arg-type]
    assert [problem.found for problem in caught.value.problems] == ["no wheels", "no one", "no two"]


def test_words_without_meaning_for_platforms_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bundle.main(["make", "--platforms", "jetpack-6.0", "--args", "--limit x"]) == 2
    assert "ARGS has --limit x" in capsys.readouterr().err


def test_a_folder_that_cannot_be_used_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(bundle_make, "git", lambda *_words: "c" * 40)
    monkeypatch.setattr(bundle_make, "uncommitted", lambda: [])
    words = ["make", "--platforms", "jetpack-6.0", "--without-torch", "--output", str(tmp_path / "file")]
    assert bundle.main([*words, "--cache", str(tmp_path / "cache")]) == 2
    assert capsys.readouterr().err.startswith(f"found:    {tmp_path / 'file'}: ")


def test_a_bundle_for_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bundle.main(["make"]) == 2
    said = capsys.readouterr().err
    assert "neither PLATFORMS nor INVENTORY" in said
    assert "jetpack-6.1-6.2" in said


def test_the_playbook_fetches_into_the_cache_that_is_packed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Sequence[str]] = []

    def execute(argv: Sequence[str], _env: Any, _capture: bool) -> tuple[int, str]:
        calls.append(argv)
        return 4, ""

    monkeypatch.setattr(bundle_make.provision, "execute", execute)
    monkeypatch.setattr(bundle_make.provision, "tool", lambda name: name)
    words = ["make", "--inventory", "j.ini", "--cache", str(tmp_path / "c"), "--args", "--limit site_a"]
    with pytest.raises(Problem, match="ended with status 4"):
        bundle_make.run_fetch_playbook(bundle.parse(words))
    assert list(calls[0][:6]) == ["ansible-playbook", "playbooks/fetch.yml", "-i", "j.ini", "--limit", "site_a"]
    assert json.loads(calls[0][-1]) == {"jetson_platform_cache": str(tmp_path / "c")}


def test_the_controllers_packages_are_kept_apart_from_what_devices_need(
    maker: bundle_make.Maker, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = []

    def ensure(entry: Any, target: Any, cache: Any, _tick: Any) -> SimpleNamespace:
        caches.append(cache.root)
        assert (target.machine, target.glibc) == ("x86_64", bundle.CONTROLLER_GLIBC)
        path = stage / f"{entry.name}-1-py3-none-any.whl"
        path.write_text(entry.name)
        return SimpleNamespace(path=str(path), sha256=hashlib.sha256(entry.name.encode()).hexdigest())

    monkeypatch.setattr(bundle_make.fetch, "ensure_locked", ensure)
    maker.fetch_controller(stage)
    assert set(caches) == {maker.cache.root / "controller"}
    note = maker.collection.entries[f"{bundle.CONTROLLER}/py311-Linux-x86_64.txt"].origin
    assert note is not None
    names = note.read_text().splitlines()
    assert "pip-1-py3-none-any.whl" in names
    assert len(names) == len(maker.collection.entries) - 1 == len(caches)
