"""Wheels: what is in an archive, what a site folder lacks, and installing exactly that with a real pip."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import records, wheels
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.versions import Target

from tests.unit.plugins.wheel_kit import make_wheel

ORIN = Target("aarch64", "3.10", "2.35")
X86 = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\x3e\x00"
ARM = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\xb7\x00"


def row(path: Path, **more: Any) -> dict[str, Any]:
    """Return a wheel as the module is told of it, and where its file is."""
    name, version = path.name.split("-")[:2]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"name": name, "version": version, "filename": path.name, "sha256": digest, "path": str(path), **more}


# ---------------------------------------------------------------- archives


def test_inspect(tmp_path: Path) -> None:
    path = make_wheel(tmp_path, tag="cp310-cp310-linux_aarch64", files={"a.so": ARM, "b.py": b"", "c.so": b"text"})
    assert wheels.inspect(str(path)) == ("thing", "1.0", ["cp310-cp310-linux_aarch64"], {"a.so": "aarch64"})


def test_a_wheel_that_fits_passes(tmp_path: Path) -> None:
    wheels.check_archive(str(make_wheel(tmp_path)), ORIN)
    wheels.check_archive(str(make_wheel(tmp_path, tag="cp310-cp310-linux_aarch64", files={"a.so": ARM})), ORIN)


def test_the_x86_wheel_trap_in_its_three_shapes(tmp_path: Path) -> None:
    honest = make_wheel(tmp_path, tag="cp311-cp311-linux_x86_64")
    with pytest.raises(Problem, match="cp311"):
        wheels.check_archive(str(honest), ORIN)
    renamed = make_wheel(tmp_path, tag="cp310-cp310-linux_aarch64", inside_tag="cp310-cp310-linux_x86_64")
    with pytest.raises(Problem, match="WHEEL file says cp310-cp310-linux_x86_64") as refusal:
        wheels.check_archive(str(renamed), ORIN)
    assert "FORCE_BUILD" in refusal.value.next_step
    library = make_wheel(tmp_path, tag="cp310-cp310-linux_aarch64", files={"deep/x.cpython-310.so": X86})
    with pytest.raises(Problem, match=r"deep/x.cpython-310.so is for x86_64"):
        wheels.check_archive(str(library), ORIN)


def test_no_wheel_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a-1-py3-none-any.whl"
    path.write_bytes(b"<html>")
    with pytest.raises(Problem, match="no readable wheel"):
        wheels.inspect(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.py", "")
    with pytest.raises(Problem, match="WHEEL is missing"):
        wheels.inspect(str(path))


# ---------------------------------------------------------------- what is there


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Return a site folder with thing 1.0, as unpacked."""
    folder = tmp_path / "site"
    folder.mkdir()
    with zipfile.ZipFile(make_wheel(tmp_path)) as archive:
        archive.extractall(folder)
    return folder


def reasons(site: Path, **wheel: Any) -> list[str]:
    """Return why a wheel is missing."""
    return [row["reason"] for row in wheels.query(str(site), [{"name": "thing", "version": "1.0", **wheel}], ["thing"])]


def test_query_of_a_whole_installation_is_empty(site: Path) -> None:
    assert reasons(site) == []
    assert reasons(site, name="Thing", version="1.0.0") == []


@pytest.mark.parametrize(
    ("path", "data", "reason"),
    [
        ("thing/__init__.py", None, "missing"),
        ("thing/__init__.py", b"value = 22\n", "bytes"),
        ("thing/__init__.py", b"value = 2\n", "hash"),
        ("thing-1.0.dist-info/RECORD", None, "RECORD is missing"),
        ("thing-1.0.dist-info/RECORD", b"", "RECORD is missing or empty"),
    ],
)
def test_query_finds_damage(site: Path, path: str, data: bytes | None, reason: str) -> None:
    (site / path).unlink()
    if data is not None:
        (site / path).write_bytes(data)
    (found,) = reasons(site)
    assert reason in found


def test_query_finds_other_versions_and_builds(site: Path) -> None:
    assert reasons(site, version="2.0") == ["version 1.0 is installed"]
    assert reasons(site, name="other") == ["not installed"]
    (site / "thing-1.0.dist-info/direct_url.json").write_text(
        json.dumps({"url": "file:///x", "archive_info": {"hash": "sha256=" + "a" * 64}})
    )
    assert reasons(site, sha256="a" * 64) == []
    assert "another build" in reasons(site, sha256="b" * 64)[0]
    (site / "thing-0.9.dist-info").mkdir()
    assert "several versions" in reasons(site)[0]


def test_query_of_a_bare_device(tmp_path: Path) -> None:
    assert wheels.query(str(tmp_path / "none"), [{"name": "thing", "version": "1.0"}])[0]["reason"] == "not installed"
    assert wheels.free_mb(str(tmp_path / "none/deeper")) > 0


def test_free_mb_of_the_root() -> None:
    assert wheels.free_mb("/") > 0


# ---------------------------------------------------------------- installing


def test_locate_checks_every_file(tmp_path: Path) -> None:
    path = make_wheel(tmp_path)
    wanted, source = row(path), tmp_path / "source"
    source.mkdir()
    shutil.copy(path, source)
    (found,) = wheels.locate([wanted], str(source))
    assert Path(found["path"]) == source / path.name
    (source / path.name).write_bytes(b"other")
    with pytest.raises(Problem, match="sha256"):
        wheels.locate([wanted], str(source))
    (source / path.name).unlink()
    with pytest.raises(Problem, match="absent"):
        wheels.locate([wanted], str(source))


class Env:
    """A venv with pip, for real installations."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        version = "python{}.{}".format(*sys.version_info[:2])
        self.python = str(folder / "bin/python")
        self.site = folder / "lib" / version / "site-packages"
        found = subprocess.check_output([sys.executable, "-c", "import pip; print(pip.__path__[0])"], text=True)
        (self.site / "pip").symlink_to(found.strip())
        self.source = folder.parent / "source"
        self.source.mkdir()

    def install(self, *rows: dict[str, Any]) -> list[str]:
        """Send wheels and install them; returns conflicts."""
        for row in rows:
            shutil.copy(row["path"], self.source)
        return wheels.install(self.python, str(self.site), list(rows), str(self.source), "venv", [])

    def query(self, *rows: dict[str, Any]) -> list[dict[str, str]]:
        """Return what is missing."""
        return wheels.query(str(self.site), list(rows), [row["name"] for row in rows])

    def freeze(self) -> str:
        """Return what pip freeze prints."""
        return subprocess.check_output([self.python, "-m", "pip", "freeze", "--all"], text=True, env={"LANG": "C"})


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Env:
    return Env(tmp_path_factory.mktemp("installed") / "env")


def test_install_leaves_a_true_record_and_no_trace_of_the_copy(env: Env, tmp_path: Path) -> None:
    # like numpy's, this wheel ships a .pyc, which pip compiles over
    cached = f"thing/__pycache__/__init__.{sys.implementation.cache_tag}.pyc"
    path = make_wheel(tmp_path, files={"thing/__init__.py": b"value = 1\n", cached: b"stale"})
    assert env.query(row(path))
    assert env.install(row(path)) == []
    assert env.query(row(path)) == []
    info = str(env.site / "thing-1.0.dist-info")
    assert records.find_damage(str(env.site), info, True) is None
    assert "thing==1.0" in env.freeze().splitlines()
    assert not (env.site / "thing-1.0.dist-info/direct_url.json").exists()


def test_another_build_of_one_version_replaces_it(env: Env, tmp_path: Path) -> None:
    first = row(make_wheel(tmp_path, "built"), keep_origin=True, url="https://example.org/built.whl")
    env.install(first)
    assert env.query(first) == []
    assert records.find_damage(str(env.site), str(env.site / "built-1.0.dist-info"), True) is None
    assert f"built @ https://example.org/built.whl#sha256={first['sha256']}" in env.freeze()
    (tmp_path / "again").mkdir()
    second = row(make_wheel(tmp_path / "again", "built", files={"built/__init__.py": b"value = 2\n"}), keep_origin=True)
    assert "another build" in env.query(second)[0]["reason"]
    env.install(second)
    assert env.query(second) == []
    assert "built==1.0" in env.freeze().splitlines()
    assert "another build" in env.query(first)[0]["reason"]
    assert records.find_damage(str(env.site), str(env.site / "built-1.0.dist-info"), True) is None
    assert (env.site / "built/__init__.py").read_text() == "value = 2\n"


def test_what_a_killed_pip_left_is_cleared(env: Env, tmp_path: Path) -> None:
    wheel = row(make_wheel(tmp_path, "killed"))
    env.install(wheel)
    (env.site / "killed-1.0.dist-info/RECORD").unlink()
    (env.site / "killed-1.0.dist-info/METADATA").unlink()
    (env.site / "~illed").mkdir()
    assert env.query(wheel)
    env.install(wheel)
    assert env.query(wheel) == []
    assert not (env.site / "~illed").exists()


def test_nvidias_file_name_and_metadata_disagree_and_still_install(env: Env, tmp_path: Path) -> None:
    path = make_wheel(
        tmp_path,
        "nvtorch",
        "2.5.0a0+872d972e41.nv24.08",
        file_version="2.5.0a0+872d972e41.nv24.08.17622132",
    )
    wheel = row(path, keep_origin=True)
    env.install(wheel)
    assert env.query(wheel) == []
    assert env.query(dict(wheel, version="2.5.0a0+872d972e41.nv24.8")) == []


def test_conflicts_name_only_what_was_installed(env: Env, tmp_path: Path) -> None:
    env.install(row(make_wheel(tmp_path, "needy", requires="absentthing>=3")))
    lines = env.install(row(make_wheel(tmp_path, "harmless")))
    assert lines == []
    assert any("absentthing" in line for line in wheels.conflicts(env.python, ["needy"]))


def test_a_refused_wheel_shows_pips_words(env: Env, tmp_path: Path) -> None:
    path = make_wheel(tmp_path, "foreign", tag="cp27-cp27m-win32")
    with pytest.raises(Problem, match="not a supported wheel"):
        env.install(row(path))


def test_constraints_of_the_user_do_not_matter(env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constraint = tmp_path / "c.txt"
    constraint.write_text("free==9.9\n")
    monkeypatch.setenv("PIP_CONSTRAINT", str(constraint))
    wheel = row(make_wheel(tmp_path, "free"))
    env.install(wheel)
    assert env.query(wheel) == []


def test_without_pip_the_wheel_of_pip_is_used(tmp_path: Path) -> None:
    assert wheels._pip(os.devnull, [{"name": "pip", "path": "/x/pip-1.whl"}]) == [os.devnull, "/x/pip-1.whl/pip"]
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    with pytest.raises(Problem, match="has no pip"):
        wheels._pip(str(tmp_path / "env/bin/python"), [])
