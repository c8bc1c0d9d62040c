"""Environments: made, mended, activated; pip configured; system packages shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import environment
from ansible_collections.jetson.mamba.plugins.module_utils.environment import Wish, ensure
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

# sys._base_executable: the only name of the interpreter behind a venv, and not in the type stubs
BASE = os.path.realpath(sys.executable) if sys.prefix == sys.base_prefix else sys._base_executable  # type: ignore[attr-defined]
VERSION = "{}.{}".format(*sys.version_info[:2])


def wish(root: Path, name: str = "a", **changes: object) -> Wish:
    """Return a wish for a venv."""
    made = Wish(
        scope="venv",
        base_python=BASE,
        root=str(root),
        env=str(root / "envs" / name),
        state=str(root / "state" / name),
        constraints=["torch==1.0"],
        system_packages=[],
    )
    return made._replace(**changes)  # type: ignore[arg-type]  # fields differ in type


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


def test_check_mode_on_a_bare_device_names_all_and_writes_nothing(tmp_path: Path) -> None:
    result = ensure(wish(tmp_path / "none", activate=True), check=True)
    assert result["changed"] and not (tmp_path / "none").exists()
    assert any(action.startswith("create") for action in result["actions"])
    assert {"before", "after", "before_header", "after_header"} <= set(result["diff"][0])


def test_made_once(root: Path) -> None:
    first = ensure(wish(root), check=False)
    assert first["changed"] and first["active"] is None
    assert first["site_packages"] == str(root / f"envs/a/lib/python{VERSION}/site-packages")
    assert Path(first["site_packages"]).is_dir() and (root / "state/a").is_dir()
    assert not (Path(first["site_packages"]) / "pip").exists()
    assert "torch==1.0" in (root / "envs/a/constraints.txt").read_text()
    assert str(root / "envs/a/constraints.txt") in (root / "envs/a/pip.conf").read_text()
    for check in (True, False):
        again = ensure(wish(root), check=check)
        assert not again["changed"] and again["diff"] == []


def test_constraints_that_are_not_given_stay(root: Path) -> None:
    ensure(wish(root), check=False)
    result = ensure(wish(root, constraints=None, system_packages=None, activate=True), check=False)
    assert result["actions"] == ["activate envs/a"]
    assert "torch==1.0" in (root / "envs/a/constraints.txt").read_text()


@pytest.mark.parametrize("harm", ["config", "link", "python", "config and link"])
def test_a_half_made_environment_is_mended_and_keeps_what_is_installed(root: Path, harm: str) -> None:
    ensure(wish(root), check=False)
    kept = root / f"envs/a/lib/python{VERSION}/site-packages/kept.py"
    kept.write_text("")
    if "config" in harm:
        (root / "envs/a/pyvenv.cfg").unlink()
    if "link" in harm:
        for link in (root / "envs/a/bin").glob("python*"):
            link.unlink()
            link.symlink_to("/nowhere/python")
    if harm == "python":
        (root / "envs/a/bin/python").unlink()
    assert ensure(wish(root), check=True)["changed"]
    assert ensure(wish(root), check=False)["changed"]
    assert not ensure(wish(root), check=False)["changed"]
    assert kept.exists()
    assert environment.venv_damage(str(root / "envs/a"), VERSION) is None


def test_a_moved_environment_is_noticed(root: Path) -> None:
    ensure(wish(root), check=False)
    (root / "envs/a").rename(root / "envs/b")
    (root / "envs/a").symlink_to("b")
    assert environment.venv_damage(str(root / "envs/a"), VERSION) is None  # one folder by two names
    assert "3.7" in str(environment.venv_damage(str(root / "envs/b"), "3.7"))


def test_a_running_process_keeps_its_environment_after_a_switch(root: Path) -> None:
    for name in ("a", "b"):
        made = ensure(wish(root, name, activate=name == "a"), check=False)
        Path(made["site_packages"], "which.py").write_text(f"name = {name!r}\n")
    launcher = str(root / "bin/mamba-python")
    code = "import sys; print('up', flush=True); sys.stdin.readline(); import which; print(which.name, sys.prefix)"
    with subprocess.Popen([launcher, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout and running.stdin
        assert running.stdout.readline() == "up\n"
        result = ensure(wish(root, "b", activate=True), check=False)
        assert (result["previous"], result["active"]) == ("envs/a", "envs/b")
        running.stdin.write("\n")
        running.stdin.flush()
        assert running.stdout.read() == f"a {root}/envs/a\n"
    done = subprocess.run([launcher, "-c", "import which; print(which.name)"], capture_output=True, text=True)
    assert done.stdout == "b\n"
    assert os.readlink(root / "current") == "envs/b"


def test_preparing_another_environment_changes_nothing_that_users_start(root: Path) -> None:
    ensure(wish(root, "a", activate=True), check=False)
    ensure(wish(root, "b"), check=False)
    assert os.readlink(root / "current") == "envs/a"


def test_the_launcher_without_an_environment_explains_itself(root: Path) -> None:
    ensure(wish(root), check=False)
    done = subprocess.run([str(root / "bin/mamba-python")], capture_output=True, text=True)
    assert done.returncode == 127 and "next:" in done.stderr


def test_the_launcher_passes_its_arguments_on(root: Path) -> None:
    ensure(wish(root, activate=True), check=False)
    code = "import sys, json; print(json.dumps(sys.argv[1:]))"
    printed = subprocess.check_output([str(root / "bin/mamba-python"), "-c", code, "a b", "*", ""])
    assert json.loads(printed) == ["a b", "*", ""]


def test_problems(root: Path, tmp_path: Path) -> None:
    with pytest.raises(Problem, match="does not run"):
        ensure(wish(root, base_python="/nowhere/python3"), check=False)
    with pytest.raises(Problem, match="no folder"):
        ensure(wish(tmp_path / "none"), check=False)
    with pytest.raises(Problem, match="white space"):
        ensure(wish(root, env=str(root / "a b")), check=False)
    (root / "current").mkdir()
    with pytest.raises(Problem, match="not a link"):
        ensure(wish(root, activate=True), check=False)


def test_a_folder_that_cannot_be_written_is_a_problem(root: Path) -> None:
    (root / "envs").write_text("a file in the way")
    with pytest.raises(Problem, match="envs"):
        ensure(wish(root), check=False)


# ---------------------------------------------------------------- system packages


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that stands for the system's dist-packages, seen by a wrapper of the base interpreter."""
    folder = tmp_path / "dist-packages"
    for name in ("tensorrt", "other"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"origin = {name!r}\n")
    (folder / "cv2.py").write_text("origin = 'cv2'\n")
    info = folder / "tensorrt_dist-10.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt-dist\nVersion: 10.3\n")
    (info / "top_level.txt").write_text("tensorrt\n")
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {BASE} "$@"\n')
    wrapper.chmod(0o755)
    return wrapper


def test_chosen_system_packages_are_visible_and_no_others(root: Path, system: Path) -> None:
    def seen(name: str) -> bool:
        command = [str(root / "envs/a/bin/python"), "-c", f"import {name}; print({name}.origin)"]
        return subprocess.run(command, capture_output=True).returncode == 0

    chosen = wish(root, base_python=str(system), system_packages=["tensorrt", "cv2"])
    assert ensure(chosen, check=True)["changed"]
    ensure(chosen, check=False)
    assert seen("tensorrt") and seen("cv2") and not seen("other")
    names = sorted(os.listdir(root / "envs/a/system-packages"))
    assert names == ["cv2.py", "tensorrt", "tensorrt_dist-10.3.dist-info"]
    assert not ensure(chosen, check=False)["changed"]
    by_distribution = ensure(chosen._replace(system_packages=["tensorrt_dist"]), check=False)
    assert by_distribution["changed"] and seen("tensorrt") and not seen("cv2")
    ensure(chosen._replace(system_packages=[]), check=False)
    assert not seen("tensorrt") and not (root / "envs/a/system-packages").exists()


def test_an_absent_system_package_is_named(root: Path) -> None:
    with pytest.raises(Problem, match="no_such_thing") as refusal:
        ensure(wish(root, system_packages=["no_such_thing"]), check=False)
    assert "apt-get" in refusal.value.next_step


# ---------------------------------------------------------------- scope user


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("PYTHONUSERBASE", raising=False)
    read = environment.interpreter_facts

    def unmanaged(python: str) -> dict[str, object] | None:
        facts = read(python)
        return facts and {**facts, "externally_managed": False}

    # the Python of Debian 12 and Ubuntu 24.04, which may run these tests, is marked; a JetPack 6 is not
    monkeypatch.setattr(environment, "interpreter_facts", unmanaged)
    return path


def user_wish(root: Path, **changes: object) -> Wish:
    """Return a wish for the user site."""
    made = Wish("user", BASE, str(root), state=str(root / "state/user"), constraints=["torch==1.0"])
    return made._replace(**changes)  # type: ignore[arg-type]  # fields differ in type


def test_the_user_site_is_discovered_and_one_key_is_added(root: Path, home: Path) -> None:
    conf = home / ".config/pip/pip.conf"
    conf.parent.mkdir(parents=True)
    conf.write_text("# mine\n[global]\ntimeout = 60\n\n[install]\nno-deps = false\n")
    conf.chmod(0o600)
    result = ensure(user_wish(root, activate=True), check=False)
    assert result["site_packages"] == str(home / f".local/lib/python{VERSION}/site-packages")
    assert Path(result["site_packages"]).is_dir()
    constraints = root / "state/user/constraints.txt"
    assert conf.read_text() == (
        f"# mine\n[global]\nconstraint = {constraints}\ntimeout = 60\n\n[install]\nno-deps = false\n"
    )
    assert conf.stat().st_mode & 0o777 == 0o600
    assert not ensure(user_wish(root, activate=True), check=False)["changed"]
    prefix = subprocess.check_output([str(root / "bin/mamba-python"), "-c", "import sys; print(sys.prefix)"], text=True)
    assert Path(prefix.strip()) == Path(sys.base_prefix)
    assert not (root / "current").exists()


def test_the_launcher_follows_from_a_venv_to_the_user_site_and_back(root: Path, home: Path) -> None:
    ensure(wish(root, activate=True), check=False)
    launcher = root / "bin/mamba-python"
    of_venv = launcher.read_text()
    planned = ensure(user_wish(root), check=True)
    assert f"write {launcher}" in planned["actions"] and launcher.read_text() == of_venv
    assert ensure(user_wish(root), check=False)["changed"]
    assert launcher.read_text() == environment.launcher_text(str(root), BASE)
    assert not ensure(user_wish(root), check=False)["changed"]
    ensure(wish(root), check=False)  # prepared only
    assert launcher.read_text() == environment.launcher_text(str(root), BASE)
    ensure(wish(root, activate=True), check=False)
    assert launcher.read_text() == of_venv


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "[global]\nconstraint = /c\n"),
        ("[install]\nx = 1\n", "[install]\nx = 1\n[global]\nconstraint = /c\n"),
        ("[global]\n", "[global]\nconstraint = /c\n"),
        ("[global]\nconstraint = /a\n", "[global]\nconstraint = /a /c\n"),
        ("[global]\nconstraint: /a\n  /b\nx = 1\n", "[global]\nconstraint = /a /b /c\nx = 1\n"),
        ("[global]\nconstraint = /a /c\n", "[global]\nconstraint = /a /c\n"),
        ("[install]\nconstraint = /a\n[global]\n", "[install]\nconstraint = /a\n[global]\nconstraint = /c\n"),
    ],
)
def test_merge_constraint(before: str, after: str) -> None:
    assert environment.merge_constraint(before, "/c") == after
    assert environment.merge_constraint(after, "/c") == after


def test_constraints_of_the_legacy_file_are_not_hidden(root: Path, home: Path) -> None:
    (home / ".pip").mkdir()
    (home / ".pip/pip.conf").write_text("[global]\nconstraint = /old\n")
    ensure(user_wish(root), check=False)
    text = (home / ".config/pip/pip.conf").read_text()
    assert f"constraint = /old {root}/state/user/constraints.txt\n" in text


@pytest.mark.parametrize(("key", "value"), [("externally_managed", True), ("user_site_enabled", False)])
def test_a_user_site_that_cannot_be_used_is_a_problem(
    root: Path, home: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: bool
) -> None:
    facts = environment.interpreter_facts(BASE)
    assert facts
    monkeypatch.setattr(environment, "interpreter_facts", lambda _python: {**facts, key: value})
    with pytest.raises(Problem, match=r"EXTERNALLY-MANAGED|user site"):
        ensure(user_wish(root), check=False)
    ensure(wish(root), check=True)  # a venv does not mind


# ---------------------------------------------------------------- texts


def test_constraint_lines() -> None:
    wheels = [
        {"name": "torch", "version": "2.5.0a0+872d972e41.nv24.08.17622132"},
        {"name": "numpy", "version": "1.26.4"},
        {"name": "triton", "version": "3.5.1"},
        {"name": "transformers", "version": "4.57.6"},
        {"name": "einops", "version": "0.8.2"},
    ]
    lines = environment.constraint_lines(wheels, None, ["einops==0.8.2", "numpy==1.26.4"])
    assert lines == [
        "torch==2.5.0a0+872d972e41.nv24.8",
        "numpy==1.26.4",
        "triton==3.5.1",
        "torchvision==0.20.*",
        "transformers<5",
        "einops==0.8.2",
    ]
    assert "torchvision==0.20.0" in environment.constraint_lines(wheels, "0.20.0")
    wheels.append({"name": "torchvision", "version": "0.20.0a0+afc54f7"})
    assert [line for line in environment.constraint_lines(wheels, "0.20.0") if "vision" in line] == [
        "torchvision==0.20.0a0+afc54f7"
    ]
    assert environment.constraint_lines([], None) == []


def test_config_files_are_what_ensure_writes(root: Path) -> None:
    ensure(wish(root), check=False)
    for name, text in environment.config_files(str(root / "envs/a"), ["torch==1.0"]).items():
        assert (root / "envs/a" / name).read_text() == text
