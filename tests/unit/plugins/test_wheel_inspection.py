"""Wheels on the controller, read by pyelftools: the x86-64 trap, and that both readers see the same."""

from __future__ import annotations

import _ctypes
import random
import shutil
import struct
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import elf, inspection
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.plugin_utils import wheel_inspection

from tests.unit.plugins.wheel_kit import container, entry, make_elf, make_wheel

REAL = Path(__file__).resolve().parents[1] / "data" / "fatbins"
MODULE = "causal_conv1d_cuda"
FILE = f"{MODULE}.cpython-310-aarch64-linux-gnu.so"
ORIN = inspection.Expectation("aarch64", "3.10", "2.35", "87", "causal_conv1d", "1.6.0", (MODULE,), True)


def wheel(folder: Path, files: dict[str, bytes], **more: Any) -> Path:
    """Write a wheel of causal_conv1d 1.6.0 that is named for an Orin."""
    options = {"name": "causal_conv1d", "version": "1.6.0", "tag": "cp310-cp310-linux_aarch64", **more}
    return make_wheel(folder, files=files, **options)


def test_a_good_wheel(tmp_path: Path) -> None:
    gpu = container(entry(87), entry(53, payload=2_000_000 - 64))
    path = wheel(tmp_path, {FILE: make_elf(needed=["libc10.so", "libcudart.so.12"], gpu=gpu)})
    found = wheel_inspection.inspect(path, ORIN)
    assert found.needed == ["libcudart.so.12"]
    assert found.warnings == ["it holds GPU code for 1 other GPU too (sm_53), which costs 2.0 MB"]
    # the device's own reader says the same of the same file
    assert found.facts == inspection.read_wheel(str(path))
    assert wheel_inspection.inspect(path, ORIN, {"libc10.so", "libcudart.so.12"}).needed == []


def x86_library(folder: Path) -> bytes:
    """Return a real x86-64 library: compiled here, or an extension module of this interpreter."""
    if sysconfig.get_platform() == "linux-x86_64" and shutil.which("gcc"):
        source = folder / "trap.c"
        source.write_text("int PyInit_causal_conv1d_cuda(void) { return 1; }\n")
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(folder / "trap.so"), str(source)], check=True)
        return (folder / "trap.so").read_bytes()
    own = Path(str(_ctypes.__file__))
    return own.read_bytes() if elf.machine_of(str(own)) == "x86_64" else (REAL / "two_units.so").read_bytes()


def test_the_x86_wheel_trap(tmp_path: Path) -> None:
    inside = f"{MODULE}.cpython-310-x86_64-linux-gnu.so"
    path = wheel(tmp_path, {inside: x86_library(tmp_path)}, inside_tag="cp310-cp310-linux_x86_64")
    assert path.name == "causal_conv1d-1.6.0-cp310-cp310-linux_aarch64.whl"
    with pytest.raises(Problem) as refusal:
        wheel_inspection.inspect(path, ORIN)
    problem = refusal.value
    assert problem.found.startswith(
        f"{path.name}: its WHEEL file says cp310-cp310-linux_x86_64 and {inside} is for x86_64, not for aarch64"
    )
    assert "ready-made x86-64 wheel under another name" in problem.next_step
    assert "setup.py downloads one" in problem.next_step and "renames it" in problem.next_step
    assert "*_FORCE_BUILD=TRUE (exactly TRUE)" in problem.next_step and "take another file" in problem.next_step


@pytest.mark.parametrize("shape", ["tag", "library"])
def test_half_a_trap_is_one_too(shape: str, tmp_path: Path) -> None:
    library = x86_library(tmp_path) if shape == "library" else make_elf(gpu=container(entry(87)))
    path = wheel(tmp_path, {FILE: library}, inside_tag="cp310-cp310-linux_x86_64" if shape == "tag" else None)
    problem = _refusal(path)
    assert "under another name" in problem.next_step
    assert ("WHEEL file says" in problem.found) == (shape == "tag")


def test_a_wheel_that_says_what_it_is_for_is_no_trap(tmp_path: Path) -> None:
    inside = f"{MODULE}.cpython-310-x86_64-linux-gnu.so"
    problem = _refusal(wheel(tmp_path, {inside: x86_library(tmp_path)}, tag="cp310-cp310-linux_x86_64"))
    assert f"{inside} is for x86_64, not for aarch64" in problem.found
    assert "under another name" not in problem.next_step and "made for this class" in problem.next_step


def _refusal(path: Path) -> Problem:
    with pytest.raises(Problem) as refusal:
        wheel_inspection.inspect(path, ORIN)
    return refusal.value


def test_every_error_is_told_and_the_weightiest_decides(tmp_path: Path) -> None:
    path = wheel(
        tmp_path,
        {FILE: make_elf(gpu=container(entry(80)), glibc=["GLIBC_2.38"])},
        record=lambda text: text.replace("sha256=", "sha256=x", 1),
    )
    found = _refusal(path).found.splitlines()
    assert found[0] == f"{path.name}: {FILE} differs from its RECORD hash"
    assert [line.strip() for line in found[1:]] == [
        f"and {FILE} asks for glibc 2.38, there is 2.35",
        f"and {FILE} holds code for sm_80, not for sm_87",
    ]


def test_a_wheel_that_was_changed_on_its_way(tmp_path: Path) -> None:
    path = wheel(tmp_path, {FILE: make_elf(gpu=container(entry(87))), "causal_conv1d/a.py": b"x = 1\n"})
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content["causal_conv1d/a.py"] = b"import os\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    assert "causal_conv1d/a.py differs from its RECORD hash" in _refusal(path).found


# ---------------------------------------------------------------- two readers


def real_libraries() -> list[Path]:
    """Return a dozen and more libraries of this interpreter and this system, and those with GPU code."""
    extensions = sorted(Path(str(_ctypes.__file__)).parent.glob("*.so"))[::6]
    folders = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/lib64", "/usr/lib64"]
    names = ["libstdc++.so.6", "libc.so.6", "libm.so.6", "libgcc_s.so.1", "libcrypto.so.3", "libz.so.1"]
    system = [Path(folder, name) for folder in folders for name in names]
    found = [*extensions, *system, Path(sys.executable).resolve(), *REAL.glob("*.so"), *REAL.glob("*.o")]
    return [path for path in found if path.is_file()]


def test_both_readers_see_the_same_in_real_libraries() -> None:
    libraries = real_libraries()
    assert len(libraries) >= 12
    for path in libraries:
        assert wheel_inspection.read_elf(str(path)) == elf.read_facts(str(path)), path
    seen = [elf.read_facts(str(path)) for path in libraries]
    assert any(one["glibc"] for one in seen) and any(one["needed"] for one in seen)
    assert sum(bool(one["fatbins"]) for one in seen) == 3


def test_glibc_that_is_hidden_from_the_sections_is_found(tmp_path: Path) -> None:
    """The dynamic linker reads no sections, and a device would refuse what the controller let pass."""
    data = bytearray(make_elf(glibc=["GLIBC_2.38"]))
    (start,) = struct.unpack_from("<Q", data, 40)
    (rows,) = struct.unpack_from("<H", data, 60)
    for at in range(start, start + 64 * rows, 64):
        if struct.unpack_from("<I", data, at + 4)[0] == 0x6FFFFFFE:
            struct.pack_into("<I", data, at + 4, 1)
    (tmp_path / "x.so").write_bytes(bytes(data))
    assert wheel_inspection.read_elf(str(tmp_path / "x.so"))["glibc"] == "2.38"


def test_both_readers_see_the_same_in_made_up_libraries(tmp_path: Path) -> None:
    path = tmp_path / "x.so"
    for data in (
        make_elf(undefined=["_ZN3c101aESs"], soname="a.so", runpath="$ORIGIN:/b", gpu=container(entry(87))),
        make_elf(needed=[], glibc=[]),
        make_elf(glibc=["GLIBC_2.34", "GLIBC_ABI_DT_RELR"]),
        make_elf("armv7l"),
        make_elf()[:4] + b"\x01" + make_elf()[5:],
        b"text",
    ):
        path.write_bytes(data)
        assert wheel_inspection.read_elf(str(path)) == elf.read_facts(str(path))


def test_no_damage_makes_it_hang_or_fail_otherwise(tmp_path: Path) -> None:
    chance = random.Random(184)
    whole = make_elf(gpu=container(entry(87)), undefined=["_ZN3c101aESs"], soname="x.so")
    path = tmp_path / "x.so"
    began = time.monotonic()
    for number in range(600):
        data = bytearray(whole)
        for _change in range(chance.randint(1, 4)):
            place = chance.randrange(16, 176) if number % 2 else chance.randrange(16, len(data))
            data[place] = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))
        path.write_bytes(bytes(data))
        try:
            wheel_inspection.read_elf(str(path))
        except ValueError:
            continue
    assert time.monotonic() - began < 60


def test_a_damaged_library_is_a_problem_with_words(tmp_path: Path) -> None:
    path = wheel(tmp_path, {FILE: make_elf(gpu=container(entry(87)))[:400]})
    assert f"{FILE} is damaged: " in _refusal(path).found
