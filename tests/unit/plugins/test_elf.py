"""The machine of ELF files."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import elf


def header(machine: int, big: bool = False) -> bytes:
    """Return the first 20 bytes of an ELF file."""
    order = ">" if big else "<"
    return b"\x7fELF" + bytes([2, 2 if big else 1, 1]) + bytes(9) + struct.pack(order + "HH", 3, machine)


@pytest.mark.parametrize(
    ("data", "machine"),
    [
        (header(62), "x86_64"),
        (header(183), "aarch64"),
        (header(22, big=True), "s390x"),
        (header(999), "machine 999"),
        (header(62)[:19], None),
        (b"INPUT(libm.so.6 libmvec.so.1)", None),
        (b"", None),
    ],
)
def test_machine_of_header(data: bytes, machine: str | None) -> None:
    assert elf.machine_of_header(data) == machine


def test_machine_of_a_real_program() -> None:
    assert elf.machine_of(sys.executable) == elf.machine_of("/proc/self/exe") is not None
    assert elf.machine_of("/nowhere") is None


def test_find_foreign_names_only_libraries_of_another_machine(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg/right.so").write_bytes(header(183))
    (tmp_path / "pkg/wrong.cpython-310-aarch64-linux-gnu.so").write_bytes(header(62))
    (tmp_path / "pkg/libwrong.so.1.2").write_bytes(header(62))
    (tmp_path / "pkg/script.so").write_text("INPUT(libc.so.6)")
    (tmp_path / "pkg/wrong.bin").write_bytes(header(62))
    found = elf.find_foreign(str(tmp_path), "aarch64")
    assert [Path(row["path"]).name for row in found] == [
        "libwrong.so.1.2",
        "wrong.cpython-310-aarch64-linux-gnu.so",
    ]
    assert {(row["found"], row["expected"]) for row in found} == {("x86_64", "aarch64")}
    assert elf.find_foreign(str(tmp_path / "absent"), "aarch64") == []
