"""Small files: digests, atomic writes, sets of files."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import files
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem


def test_sha256_of_a_file_and_of_none(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"abc" * 1_000_000)
    assert files.sha256_file(str(path)) == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
    assert files.sha256_file(str(tmp_path / "absent")) is None
    assert files.sha256_file(str(tmp_path)) is None


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755])
def test_write_sets_the_mode_whatever_the_umask(tmp_path: Path, mode: int) -> None:
    before = os.umask(0o077)
    try:
        files.write_atomic(str(tmp_path / "deep" / "er" / "file"), b"x", mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "deep" / "er" / "file").stat().st_mode) == mode


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def no_space(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        files.write_atomic(str(path), b"new", 0o644)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    files.write_atomic(str(tmp_path / "link"), b"new", 0o644)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_ensure_writes_what_differs_and_nothing_twice(tmp_path: Path) -> None:
    first, second, gone = (str(tmp_path / name) for name in ("first", "second", "gone"))
    Path(second).write_text("two\n")
    Path(second).chmod(0o644)
    Path(gone).write_text("old\n")
    wanted = {first: files.FileSpec("one\n", 0o640), second: files.FileSpec("two\n", 0o644), gone: None}

    changed, diffs = files.ensure_files(wanted, check=True)
    assert changed
    assert not Path(first).exists()
    assert Path(gone).exists()

    assert files.ensure_files(wanted, check=False) == (True, diffs)
    assert diffs == [
        {"before": "", "after": "one\n", "before_header": first + " (absent)", "after_header": first},
        {"before": "old\n", "after": "", "before_header": gone, "after_header": gone + " (absent)"},
    ]
    assert Path(first).read_text() == "one\n"
    assert not Path(gone).exists()
    assert files.ensure_files(wanted, check=False) == (False, [])


def test_ensure_corrects_a_mode_and_shows_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("same\n")
    path.chmod(0o666)
    changed, diffs = files.ensure_files({str(path): files.FileSpec("same\n", 0o644)}, check=False)
    assert changed
    assert (diffs[0]["before"], diffs[0]["after"]) == ("mode: 0666\n", "mode: 0644\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_dangling_link_can_be_removed(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    assert files.ensure_files({str(link): None}, check=False)[0]
    assert not link.is_symlink()


def test_bytes_that_are_no_utf8_survive_reading_and_show_in_a_diff(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"caf\xe9\n")
    _changed, diffs = files.ensure_files({str(path): files.FileSpec("cafe\n")}, check=True)
    assert diffs[0]["before"] == "caf�\n"


def test_a_folder_in_the_way_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "name").mkdir()
    with pytest.raises(Problem) as caught:
        files.ensure_files({str(tmp_path / "name"): files.FileSpec("x")}, check=False)
    assert str(tmp_path / "name") in caught.value.render()
