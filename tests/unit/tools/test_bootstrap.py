"""tools/bootstrap: which Python it takes, and what it says when there is none. Nothing is installed here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# Answers the two questions that bootstrap asks an interpreter; making a venv ends the run, so that nothing is fetched.
PYTHON = """#!/bin/sh
case "$*" in
    *version_info*) {version} ;;
    *ensurepip*) {venv} ;;
    *"-m venv"*) echo "MADE BY $0 $*" >&2; {made} ;;
esac
"""


def put(folder: Path, name: str, version: str, has_venv: bool = True, made: str = "exit 9") -> None:
    """Put a stand-in for an interpreter into a folder; version "" is one that only prints an error."""
    path = folder / name
    says = f"echo {version}" if version else "echo 'no such version' >&2; exit 127"
    path.write_text(PYTHON.format(version=says, venv="exit 0" if has_venv else "exit 1", made=made))
    path.chmod(0o755)


def bootstrap(tmp_path: Path, *words: str, root: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run bootstrap with only the stand-ins and the basic commands on PATH."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("bash", "dirname", "grep", "id", "rm", "tail", "tee", "awk", "date", "uname", "mkdir", "cp"):
        for folder in os.get_exec_path():
            if (Path(folder) / name).exists() and not (tools / name).exists():
                (tools / name).symlink_to(Path(folder) / name)
    # a copy, as in a fresh clone: this very tree may have come out of a bundle
    script = str((root or project(tmp_path / "clone")) / "tools" / "bootstrap")
    return subprocess.run(
        [str(tools / "bash"), script, str(tmp_path / "venv"), str(tmp_path / "stamp"), *words],
        env={"PATH": f"{tmp_path / 'bin'}:{tools}", **env},
        text=True,
        capture_output=True,
        check=False,
    )


def project(root: Path) -> Path:
    """Make the little of a project that bootstrap looks at."""
    for folder in ("tools", "requirements"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "tools" / "bootstrap", root / "tools" / "bootstrap")
    for version in ("310", "311", "312", "313"):
        (root / "requirements" / f"py{version}.txt").write_text("pip==26.3 --hash=sha256:0\n")
    return root


@pytest.fixture
def pythons(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def test_the_newest_supported_python_is_taken(tmp_path: Path, pythons: Path) -> None:
    put(pythons, "python3", "3.11")
    put(pythons, "python3.10", "3.10")
    put(pythons, "python3.12", "3.12")
    put(pythons, "python3.14", "3.14")
    assert f"MADE BY {pythons / 'python3.12'}" in bootstrap(tmp_path).stderr


def test_plain_python3_will_do(tmp_path: Path, pythons: Path) -> None:
    put(pythons, "python3", "3.13")
    put(pythons, "python3.12", "3.12")
    assert f"MADE BY {pythons / 'python3'}" in bootstrap(tmp_path).stderr


def test_a_command_that_does_not_run_is_passed_over(tmp_path: Path, pythons: Path) -> None:
    put(pythons, "python3.13", "")
    put(pythons, "python3.10", "3.10")
    assert f"MADE BY {pythons / 'python3.10'}" in bootstrap(tmp_path).stderr


def test_python_names_the_interpreter(tmp_path: Path, pythons: Path) -> None:
    put(pythons, "python3.13", "3.13")
    put(pythons, "mine", "3.11")
    assert f"MADE BY {pythons / 'mine'}" in bootstrap(tmp_path, PYTHON=str(pythons / "mine")).stderr


@pytest.mark.parametrize("version", ["3.9", "3.14", "2.7", ""])
def test_an_unsupported_python_is_refused(tmp_path: Path, pythons: Path, version: str) -> None:
    put(pythons, "mine", version)
    done = bootstrap(tmp_path, PYTHON=str(pythons / "mine"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"found:    PYTHON={pythons / 'mine'} is {version or 'nothing that runs'}")
    assert "expected: Python 3.10, 3.11, 3.12 or 3.13" in done.stderr


@pytest.mark.parametrize(("there", "said"), [("3.9", "python3 is 3.9"), (None, "python3 is missing")])
def test_no_supported_python_is_said(tmp_path: Path, pythons: Path, there: str | None, said: str) -> None:
    if there:
        put(pythons, "python3", there)
    done = bootstrap(tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert "next:     install one" in done.stderr


def test_a_missing_venv_module_names_its_package(tmp_path: Path, pythons: Path) -> None:
    put(pythons, "python3.12", "3.12", has_venv=False)
    done = bootstrap(tmp_path)
    assert done.returncode == 1
    assert "has no venv module" in done.stderr
    assert "apt-get install python3" in done.stderr
    assert not (tmp_path / "stamp").exists()


@pytest.mark.parametrize(("user", "words", "installs"), [("0", True, True), ("0", False, False), ("1000", True, False)])
def test_the_venv_module_is_installed_only_by_root_and_where_asked(
    tmp_path: Path, pythons: Path, user: str, words: bool, installs: bool
) -> None:
    put(pythons, "python3.12", "3.12", has_venv=False)
    log = tmp_path / "apt.log"
    for name, does in {"id": f"echo {user}", "apt-get": f'echo "$@" >> {log}'}.items():
        (pythons / name).write_text(f"#!/bin/sh\n{does}\n")
        (pythons / name).chmod(0o755)
    done = bootstrap(tmp_path, *(["--install-system-packages"] if words else []))
    assert log.exists() is installs
    if installs:
        assert done.stdout.startswith("==> system package python3")
        assert "-venv" in log.read_text()
    # The stand-in installs nothing, so the run must not go on as if it had.
    assert done.returncode == 1
    assert "has no venv module" in done.stderr


# ---------------------------------------------------------------- out of a bundle


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """A project that came out of a bundle with packages for Python 3.11 and 3.12."""
    root = project(tmp_path / "project")
    wheels = root / ".cache" / "bundle" / "controller-wheels"
    wheels.mkdir(parents=True)
    for version in ("311", "312"):
        name = f"py{version}-{os.uname().sysname}-{os.uname().machine}.txt"
        (wheels / name).write_text("packaging-26-py3-none-any.whl\npip-26.3-py3-none-any.whl\n")
    return root


def test_a_bundle_is_installed_from_and_no_index_is_asked(tmp_path: Path, pythons: Path, unpacked: Path) -> None:
    # the stand-in for a venv has a python that tells what it is asked to do
    inner = tmp_path / "inner"
    inner.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    inner.chmod(0o755)
    made = f"mkdir -p {tmp_path}/venv/bin; cp {inner} {tmp_path}/venv/bin/python; exit 0"
    put(pythons, "python3.12", "3.12", made=made)
    done = bootstrap(tmp_path, root=unpacked)
    assert done.returncode == 0, done.stderr
    assert "-m venv --without-pip" in done.stderr
    assert "no index is asked" in done.stdout
    wheels = unpacked / ".cache" / "bundle" / "controller-wheels"
    asked = (tmp_path / "asked").read_text().splitlines()[0]
    assert asked.startswith(f"{wheels}/pip-26.3-py3-none-any.whl/pip install ")
    assert f"--no-index --find-links {wheels}" in asked
    assert "--require-hashes" in asked
    assert (tmp_path / "stamp").exists()


def test_without_a_bundle_the_index_is_asked(tmp_path: Path, pythons: Path, unpacked: Path) -> None:
    shutil.rmtree(unpacked / ".cache")
    inner = tmp_path / "inner"
    inner.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    inner.chmod(0o755)
    put(
        pythons,
        "python3.13",
        "3.13",
        made=f"mkdir -p {tmp_path}/venv/bin; cp {inner} {tmp_path}/venv/bin/python; exit 0",
    )
    done = bootstrap(tmp_path, root=unpacked)
    assert done.returncode == 0, done.stderr
    assert "--without-pip" not in done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()[0]
    assert asked.startswith("-m pip install ")
    assert "--no-index" not in asked


def test_a_newer_python_that_the_bundle_has_nothing_for_is_passed_over(
    tmp_path: Path, pythons: Path, unpacked: Path
) -> None:
    for version in ("3.13", "3.11", "3.10"):
        put(pythons, f"python{version}", version)
    assert f"MADE BY {pythons / 'python3.11'}" in bootstrap(tmp_path, root=unpacked).stderr


def test_a_bundle_needs_no_ensurepip(tmp_path: Path, pythons: Path, unpacked: Path) -> None:
    put(pythons, "python3.12", "3.12", has_venv=False)
    assert "MADE BY" in bootstrap(tmp_path, root=unpacked).stderr


@pytest.mark.parametrize("named", [True, False])
def test_a_python_that_the_bundle_has_nothing_for_is_said(
    tmp_path: Path, pythons: Path, unpacked: Path, named: bool
) -> None:
    put(pythons, "python3.13", "3.13")
    done = bootstrap(tmp_path, root=unpacked, **({"PYTHON": str(pythons / "python3.13")} if named else {}))
    assert done.returncode == 1
    assert "MADE BY" not in done.stderr
    assert "py311-" in done.stderr
    assert "PYTHONS='3.x'" in done.stderr
    assert not (tmp_path / "venv").exists()
