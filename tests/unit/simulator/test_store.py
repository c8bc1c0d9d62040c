"""Locks that leave no file, and files that are whole."""

from __future__ import annotations

import fcntl
import threading
import time
from pathlib import Path

import pytest

from simulator import base
from simulator.progress import Waiting
from simulator.store import Store, cache_root, read_json, remove, write_json, write_text


def test_only_one_holds_a_lock_and_no_file_stays(tmp_path: Path) -> None:
    store = Store(tmp_path)
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        with store.lock("x", "x"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_given_back_when_its_work_fails(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ValueError), store.lock("x", "x"):
        raise ValueError
    with store.lock("x", "x"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".lock-x").touch()
    with Store(tmp_path).lock("x", "x"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_its_last_holder_removed_meanwhile_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".lock-x"
    real = fcntl.flock
    calls: list[int] = []

    def flock(handle: int, operation: int) -> None:
        real(handle, operation)
        calls.append(handle)
        if len(calls) == 1:
            path.unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with Store(tmp_path).lock("x", "x"):
        assert path.exists()  # so that the next one meets it
    assert len(calls) == 2


def test_only_the_lock_files_of_the_dead_are_dropped(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / ".lock-dead").touch()
    with store.lock("held", "held"):
        store.drop_stale_locks()
        assert [path.name for path in tmp_path.iterdir()] == [".lock-held"]


def test_files_are_written_whole_with_their_mode(tmp_path: Path) -> None:
    write_text(tmp_path / "secret", "text", 0o600)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    write_json(tmp_path / "data", {"a": [1]})
    assert read_json(tmp_path / "data") == {"a": [1]}
    assert read_json(tmp_path / "none") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "secret"]


def test_remove_takes_files_folders_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "f").touch()
    for name in ("a", "f", "none"):
        remove(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMULATOR_CACHE", str(tmp_path / "x"))
    assert cache_root() == tmp_path / "x"
    monkeypatch.delenv("SIMULATOR_CACHE")
    assert cache_root().parts[-2:] == (".cache", "simulator")


def test_the_bases_key_follows_what_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    before = base.digest()
    assert before == base.digest()
    monkeypatch.setattr(base, "PACKAGES", (*base.PACKAGES, "one-more"))
    assert base.digest() != before


def test_a_base_that_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_build", lambda *_: pytest.fail("built again"))
    store = Store(tmp_path)
    (store.bases / base.digest()).mkdir(parents=True)
    assert base.ensure(store) == base.digest()


def test_what_a_killed_build_left_is_swept_and_a_running_one_is_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (store.bases / ".bookworm-x.99999999").mkdir(parents=True)
    (store.bases / ".bookworm-x.1").mkdir()
    (store.bases / "bookworm-x").mkdir()
    base.sweep(store)
    assert sorted(path.name for path in store.bases.iterdir()) == [".bookworm-x.1", "bookworm-x"]


def test_waiting_says_so_while_it_lasts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("simulator.progress.INTERVAL_S", 0.01)
    with Waiting("working", "a moment"):
        time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[simulator] working (usually a moment) …"
    assert any(line.startswith("[simulator] still: working") for line in lines)
    assert lines[-1].startswith("[simulator] working: done after")
    with pytest.raises(ValueError), Waiting("working"):
        raise ValueError
    assert "working: failed after" in capsys.readouterr().err
