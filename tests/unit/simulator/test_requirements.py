"""Packages are named before anything is asked of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from simulator import cli, requirements
from simulator.errors import Problem


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has nothing but apt-get."""
    monkeypatch.setattr(shutil, "which", lambda name, path=None: "/bin/apt-get" if name == "apt-get" else None)
    monkeypatch.setenv("SIMULATOR_CACHE", str(tmp_path))
    return tmp_path


def test_every_missing_package_is_named_at_once(bare: Path) -> None:
    with pytest.raises(Problem) as caught:
        requirements.check()
    for package in ("iproute2", "mmdebstrap", "openssh-client", "socat", "util-linux"):
        assert package in caught.value.found
    assert caught.value.next_step == "python -m simulator requirements --install"


def test_the_command_fails_while_something_is_missing(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["requirements"]) == 1
    assert any(line.split()[:2] == ["socat", "missing"] for line in capsys.readouterr().out.splitlines())


def test_installing_without_root_says_what_to_run(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Problem) as caught:
        requirements.install()
    assert caught.value.next_step.startswith("sudo apt-get install ")
    assert " socat" in caught.value.next_step


def test_a_machine_without_apt_is_told_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(Problem, match="no apt-get") as caught:
        requirements.install()
    assert "mmdebstrap" in caught.value.next_step


@pytest.mark.parametrize("argv", [["up", "--hosts", "2", "--file", "x"], [], ["ups"]])
def test_a_command_line_that_makes_no_sense_is_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
