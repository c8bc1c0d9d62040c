"""ELF files, read by the standard library: what they are for and what they ask for."""

from __future__ import annotations

import io
import random
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import elf, fatbin
from ansible_collections.jetson.mamba.plugins.plugin_utils import wheel_inspection

from tests.unit.plugins.wheel_kit import container, entry, make_elf


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
        (header(62)[:4] + b"\x01" + header(62)[5:], "x86_64 (32-bit)"),
        (header(183, big=True), "aarch64 (big-endian)"),
        (header(40)[:4] + b"\x01" + header(40)[5:], "armv7l"),
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


# ---------------------------------------------------------------- what a library asks for


def write(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "x.so"
    path.write_bytes(data)
    return str(path)


def test_every_fact_of_a_library(tmp_path: Path) -> None:
    gpu = container(entry(87))
    data = make_elf(
        needed=["libc10.so", "libcudart.so.12"],
        glibc=["GLIBC_2.9", "GLIBC_2.17", "GLIBC_PRIVATE", "GLIBCXX_3.4.30"],
        undefined=["_ZN3c106detail14torchCheckFailEPKcS2_jRKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"],
        gpu=gpu,
        soname="own.so",
        runpath="$ORIGIN/torch/lib:/opt/x",
    )
    assert elf.read_facts(write(tmp_path, data)) == {
        "machine": "aarch64",
        "needed": ["libc10.so", "libcudart.so.12"],
        "soname": "own.so",
        "runpath": ["$ORIGIN/torch/lib", "/opt/x"],
        "glibc": "2.17",
        "cxx11": True,
        "fatbins": [(data.index(gpu), len(gpu))],
    }


def test_what_is_no_library_of_this_kind(tmp_path: Path) -> None:
    assert elf.read_facts(write(tmp_path, b"INPUT(libm.so.6)"))["machine"] is None
    whole = make_elf()
    small = bytearray(whole)
    small[4] = 1
    assert elf.read_facts(write(tmp_path, bytes(small))) == {
        "machine": "aarch64 (32-bit)", "needed": [], "soname": None, "runpath": [], "glibc": None, "cxx11": None,
        "fatbins": [],
    }
    stripped = bytearray(whole)
    struct.pack_into("<Q", stripped, 40, 0)
    found = elf.read_facts(write(tmp_path, bytes(stripped)))
    assert found["fatbins"] is None and found["needed"] == ["libc10.so", "libc.so.6"] and found["glibc"] == "2.34"


@pytest.mark.parametrize(
    ("offset", "code", "value", "words"),
    [
        (32, "<Q", 2**63, "program headers reach"),
        (40, "<Q", 2**64 - 1, "section headers reach"),
        (54, "<H", 1, "1 bytes each"),
        (58, "<H", 32, "32 bytes each"),
        (62, "<H", 200, "have no names"),
        (64 + 32, "<Q", 2**40, "it is cut off"),
        (64 + 56 + 32, "<Q", 2**50, "dynamic entries reach"),
    ],
)
def test_headers_that_mislead_are_refused(tmp_path: Path, offset: int, code: str, value: int, words: str) -> None:
    data = bytearray(make_elf())
    struct.pack_into(code, data, offset, value)
    with pytest.raises(ValueError, match=words):
        elf.read_facts(write(tmp_path, bytes(data)))


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    data = make_elf(gpu=container(entry(87)))
    for size in (20, 63, 64, 100, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError):
            elf.read_facts(write(tmp_path, data[:size]))


def test_no_damage_makes_it_hang_or_fail_otherwise(tmp_path: Path) -> None:
    chance = random.Random(183)
    whole = make_elf(gpu=container(entry(87)), undefined=["_ZN3c101aESs"], soname="x.so")
    tables = whole.index(b"\0libc10.so")
    began = time.monotonic()
    for number in range(1500):
        data = bytearray(whole)
        for _change in range(chance.randint(1, 4)):
            # every other time in the headers alone, which are short
            place = chance.randrange(16, tables) if number % 2 else chance.randrange(16, len(data))
            data[place] = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))
        try:
            elf.read_facts(write(tmp_path, bytes(data)))
        except ValueError:
            continue
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        (["GLIBC_2.9", "GLIBC_2.17"], "2.17"),
        (["GLIBC_2.2.5"], "2.2.5"),
        (["GLIBC_PRIVATE", "GLIBC_9" * 900, "GCC_3.0"], None),
        (["GLIBC_2.34", "GLIBC_ABI_DT_RELR"], "2.36"),
        ([], None),
    ],
)
def test_newest_glibc(names: list[str], newest: str | None) -> None:
    assert elf.newest_glibc(names) == newest


@pytest.mark.parametrize(
    ("undefined", "cxx11"),
    [
        ([b"_ZN3c105ErrorC1ENS_14SourceLocationESs"], False),
        ([b"_ZN3c106detail14torchCheckFailEPKcS2_jRKSs"], False),
        ([b"_ZN3c105ErrorC2ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"], True),
        # identifiers with the letters Ss, and libstdc++'s own names, say nothing
        ([b"_ZN2at10ClassSsFooEv", b"_ZN3c104warnERA33_K7ProcSsX", b"_ZNSt12logic_errorC1ERKSs"], None),
        ([b"_ZN3c101aESs", b"_ZN3c101bENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"], None),
        ([], None),
    ],
)
def test_string_abi(undefined: list[bytes], cxx11: bool | None) -> None:
    assert elf.string_abi(undefined) is cxx11


@pytest.mark.skipif(shutil.which("g++") is None, reason="a C++ compiler makes the library")
@pytest.mark.parametrize("cxx11", [True, False])
def test_string_abi_of_a_real_compiler(tmp_path: Path, cxx11: bool) -> None:
    source = tmp_path / "a.cpp"
    source.write_text(
        "#include <string>\nnamespace c10 { void f(int, const std::string &, const char (&)[33]); }\n"
        "void g() { static const char x[33] = {}; c10::f(1, \"x\", x); }\n"
    )
    library = tmp_path / "a.so"
    define = f"-D_GLIBCXX_USE_CXX11_ABI={int(cxx11)}"
    subprocess.run(["g++", "-shared", "-fPIC", define, "-o", str(library), str(source)], check=True)
    assert elf.read_facts(str(library))["cxx11"] is cxx11


def many_tables(count: int, symbols: bytes) -> bytes:
    """Return a library whose section table names the same symbols again and again."""
    data = bytearray(make_elf())
    (start,) = struct.unpack_from("<Q", data, 40)
    (rows,) = struct.unpack_from("<H", data, 60)
    table = bytes(data[start : start + 64 * rows])
    offset = len(data)
    data += symbols
    table += struct.pack("<IIQQQQIIQQ", 0, 11, 2, 0, offset, len(symbols), 1, 0, 8, 24) * count
    struct.pack_into("<Q", data, 40, len(data))
    struct.pack_into("<H", data, 60, rows + count)
    return bytes(data) + table


def test_a_library_has_one_table_of_symbols(tmp_path: Path) -> None:
    path = write(tmp_path, many_tables(60, bytes(24 * 1000)))
    with pytest.raises(ValueError, match="several tables of symbols"):
        elf.read_facts(path)
    with pytest.raises(ValueError, match="several tables of symbols"):
        wheel_inspection.read_elf(path)


def test_symbols_that_would_fill_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    strings = b"_ZN" * 100000 + b"\0"
    symbols = b"".join(struct.pack("<IBBHQQ", 3 * at, 0, 0, 0, 0, 0) for at in range(1000))
    with pytest.raises(ValueError, match="names of its symbols have no end"):
        list(elf.undefined_names(symbols, strings))
    monkeypatch.setattr(elf, "_TABLE_LIMIT", 1000)
    short = b"_ZN" * 200 + b"\0"
    with pytest.raises(ValueError, match="names of its symbols have no end"):
        list(elf.undefined_names(symbols[:240], short))
    monkeypatch.setattr(elf, "_SYMBOL_LIMIT", 9)
    with pytest.raises(ValueError, match="claims 10 symbols"):
        list(elf.undefined_names(symbols[:240], b"_ZN1aE\0"))


def test_a_large_library_is_not_read_whole(tmp_path: Path) -> None:
    data = make_elf(gpu=container(*[entry(87, payload=1 << 20)] * 50))
    path = write(tmp_path, data)
    read = 0

    class Counted(io.FileIO):
        def read(self, size: int = -1) -> bytes:  # type: ignore[override]
            nonlocal read
            part = super().read(size)
            read += len(part or b"")
            return part or b""

    with pytest.MonkeyPatch.context() as patch:
        for module in (elf, fatbin):
            patch.setattr(module, "open", lambda name, mode: Counted(name, mode), raising=False)
        assert fatbin.architectures(path)["87"]["cubins"] == 50
    assert len(data) > 50 << 20 and 0 < read < 1 << 20
