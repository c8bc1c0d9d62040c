"""What a wheel asks of the system's linker."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.plugin_utils import fetch, wheel_libs

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="a C compiler makes the libraries")


def library(folder: Path, soname: str, *needs: Path) -> Path:
    """Compile an empty library."""
    path = folder / soname
    source = folder / "empty.c"
    source.write_text("void f_{}(void) {{}}\n".format("".join(c for c in soname if c.isalnum())))
    command = ["gcc", "-shared", "-nostdlib", "-Wl,--no-as-needed", f"-Wl,-soname,{soname}", "-o", str(path)]
    subprocess.run([*command, str(source), *(str(need) for need in needs)], check=True)
    return path


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """Return a wheel whose one library needs another of the wheel, and two of the system."""
    outside = [library(tmp_path, "libcusparseLt.so.0"), library(tmp_path, "libelse.so.9")]
    inside = library(tmp_path, "libinside.so")
    main = library(tmp_path, "main.so", inside, *outside)
    path = tmp_path / "torch-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(inside, "torch/lib/libinside.so")
        archive.write(main, "torch/main.so")
        archive.writestr("torch/text.so", "INPUT(libm.so.6)")
    return path


@needs_compiler
def test_needed_is_what_the_wheel_does_not_hold(wheel: Path) -> None:
    assert wheel_libs.needed_of_wheel(wheel) == ["libcusparseLt.so.0", "libelse.so.9"]


@needs_compiler
def test_packages_are_named_and_the_finding_is_kept(wheel: Path, tmp_path: Path) -> None:
    cache = fetch.Cache(tmp_path / "cache")
    described = {"name": "torch", "version": "1.0", "path": str(wheel)}
    assert wheel_libs.needed([described], cache) == {"libcusparseLt.so.0": "libcusparselt0"}
    (note,) = (cache.root / "needed").iterdir()
    note.write_text(json.dumps({"schema": 1, "needed": ["libopenblas.so.0"]}))
    assert wheel_libs.needed([described], cache) == {"libopenblas.so.0": "libopenblas0"}
    note.write_text("{")
    assert wheel_libs.needed([described], cache) == {"libcusparseLt.so.0": "libcusparselt0"}


@pytest.fixture
def described(tmp_path: Path) -> dict[str, str]:
    """Return a wheel in the cache `cache` of which it is noted what it needs: each library of the table."""
    path = tmp_path / "torch-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("torch-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("torch-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    note = tmp_path / "cache" / "needed" / (hashlib.sha256(path.read_bytes()).hexdigest() + ".json")
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps({"schema": 1, "needed": sorted(wheel_libs.PACKAGES)}))
    return {"name": "torch", "version": "1.0", "path": str(path)}


@pytest.mark.parametrize(
    ("locked", "brought"),
    [
        ([], set()),
        (["nvidia-cudnn-cu12"], {"libcudnn.so.8", "libcudnn.so.9"}),
        (["nvidia_cusparselt_cu13"], {"libcusparseLt.so.0"}),
        (["nvidia-cudnn-frontend", "nvidia-cusparse-cu12", "cudnn", "numpy"], set()),
    ],
)
def test_what_the_locks_wheels_bring_is_not_asked_of_the_system(
    described: dict[str, str], tmp_path: Path, locked: list[str], brought: set[str]
) -> None:
    left = wheel_libs.needed([described], tmp_path / "cache", locked)
    assert set(left) == set(wheel_libs.PACKAGES) - brought


def test_the_two_tables_speak_of_the_same_libraries() -> None:
    assert set(wheel_libs.IN_WHEELS) <= {soname.partition(".so")[0] for soname in wheel_libs.PACKAGES}


def test_what_is_not_fetched_yet_counts_for_nothing(tmp_path: Path) -> None:
    described = {"name": "torch", "version": "1.0", "url": "http://127.0.0.1:9/t.whl", "sha256": "a" * 64}
    assert wheel_libs.needed([described], tmp_path / "cache") == {}


def test_a_broken_wheel(tmp_path: Path) -> None:
    path = tmp_path / "t.whl"
    path.write_bytes(b"no zip")
    with pytest.raises(Problem, match="cannot be read"):
        wheel_libs.needed_of_wheel(path)
