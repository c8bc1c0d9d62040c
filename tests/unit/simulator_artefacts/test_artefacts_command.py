"""The command: JSON on stdout, problems on stderr."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simulator.artefacts import __main__ as command
from simulator.artefacts import cache, sources, torch_wheel
from simulator.errors import Problem


def test_prints_where_everything_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch_wheel, "prepare", lambda out: torch_wheel.Wheel(out / "torch.whl", "ab12", "2.13.0+cpu"))
    monkeypatch.setattr(sources, "prepare", lambda source, out: out / source.root)
    assert command.main(["--out", str(tmp_path / "new" / "out")]) == 0
    out = tmp_path / "new" / "out"
    assert json.loads(capsys.readouterr().out) == {
        "torch_wheel": {"path": str(out / "torch.whl"), "sha256": "ab12", "version": "2.13.0+cpu"},
        "sources": {
            "causal_conv1d": {"path": str(out / "causal_conv1d-1.6.0"), "version": "1.6.0"},
            "mamba_ssm": {"path": str(out / "mamba_ssm-2.2.4"), "version": "2.2.4"},
        },
    }


def test_a_problem_is_said_in_three_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(out: Path) -> torch_wheel.Wheel:
        raise Problem("no torch", "a torch", "get one")

    monkeypatch.setattr(torch_wheel, "prepare", prepare)
    assert command.main(["--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == ["found:    no torch", "expected: a torch", "next:     get one"]


def test_a_folder_that_could_not_be_made_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "tree"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(RuntimeError), cache.new_folder(target) as fresh:
        (fresh / "half").touch()
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]
    assert [path.name for path in target.iterdir()] == ["old"]


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".state").mkdir()
    (tmp_path / ".state" / ".tmp-record").touch()
    (tmp_path / ".tmp-tree" / "new").mkdir(parents=True)
    (tmp_path / "tree").mkdir()
    with cache.locked(tmp_path):
        assert sorted(path.name for path in tmp_path.rglob("*")) == [".lock", ".state", "tree"]


def test_a_broken_record_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text('{"inputs": ')
    assert cache.read_record(tmp_path / "record.json") == {}
    assert cache.read_record(tmp_path / "absent.json") == {}


def test_digests_tell_lists_apart() -> None:
    assert cache.digest_of(["ab", "c"]) != cache.digest_of(["a", "bc"])
