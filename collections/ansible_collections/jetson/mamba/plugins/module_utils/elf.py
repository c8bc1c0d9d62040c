"""Read ELF files with the standard library alone: what they are for, what they ask for, where their GPU code lies.

The tables are found as the dynamic linker finds them (program headers), GPU code by its section. A file of any size
costs a few small reads, and sizes that its headers claim are believed only as far as the file reaches.
"""

from __future__ import annotations

import os
import re
import struct
from typing import Any, BinaryIO, Dict, Iterable, List, NamedTuple, Optional, Set, Tuple

# e_machine of the ELF specification, named as `uname -m` does
_MACHINES = {3: "i386", 21: "ppc64le", 22: "s390x", 40: "armv7l", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
# those of which a host runs 64-bit little-endian processes
_WIDE = ("ppc64le", "x86_64", "aarch64", "riscv64")
HEADER_BYTES = 20
# where compilers put GPU code: ready to load, and to be linked once more
FATBIN_SECTIONS = (".nv_fatbin", "__nv_relfatbin")
# no table of a real library comes near (libtorch_cuda's names take some 30 MB)
_TABLE_LIMIT = 256 << 20
_ENTRY_LIMIT = 65536
# libtorch_cpu looks for some ten thousand names elsewhere, of some kilobytes at the most
_SYMBOL_LIMIT = 4 << 20
_NAME_LIMIT = 64 << 10

_PT_LOAD, _PT_DYNAMIC = 1, 2
_SHT_DYNSYM = 11
_DT_NEEDED, _DT_STRTAB, _DT_STRSZ, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 1, 5, 10, 14, 15, 29
_DT_VERNEED, _DT_VERNEEDNUM = 0x6FFFFFFE, 0x6FFFFFFF
_GLIBC = re.compile(r"GLIBC_([0-9]{1,4}(?:\.[0-9]{1,4}){1,3})\Z")
# not a number, but it came with one
_GLIBC_FEATURES = {"GLIBC_ABI_DT_RELR": "2.36"}
_TORCH_NAMESPACES = re.compile(rb"_ZNK?(?:2at|3c10|5torch|6caffe2)")
_LONG_STRING = b"NSt7__cxx1112basic_string"
# numbers in a mangled name that are no identifier's length: substitutions, parameters, literals, arrays, constructors
_MANGLED_NOISE = re.compile(rb"[ST][0-9A-Z]*_|L[a-z]n?\d+E|A\d+_|[CD][0-5]")
_IDENTIFIER = re.compile(rb"\d+")


def machine_of_header(header: bytes) -> str | None:
    """Return the machine of a file's first 20 bytes, e.g. "aarch64"; None for what is no ELF file."""
    if len(header) < HEADER_BYTES or header[:4] != b"\x7fELF":
        return None
    order = ">" if header[5] == 2 else "<"
    (number,) = struct.unpack_from(order + "H", header, 18)
    machine = _MACHINES.get(number, f"machine {number}")
    if machine not in _WIDE:
        return machine
    # the same instructions, for another kind of process (x32, ILP32, big-endian)
    kind = "32-bit" if header[4] != 2 else "big-endian" if order == ">" else ""
    return f"{machine} ({kind})" if kind else machine


def machine_of(path: str) -> str | None:
    """Return the machine of a file, or None where it is no ELF file or cannot be read."""
    try:
        with open(path, "rb") as handle:
            return machine_of_header(handle.read(HEADER_BYTES))
    except OSError:
        return None


def is_library_name(name: str) -> bool:
    """Return whether a file name is a shared library's: x.so, x.so.1.2."""
    return name.endswith(".so") or ".so." in name


def find_foreign(root: str, machine: str) -> list[dict[str, str]]:
    """Return the shared libraries under a folder that were made for another machine.

    Args:
        root: a folder; links to folders are not followed. One that is absent holds none.
        machine: the machine that is right, as `uname -m` names it.

    Returns:
        Rows {path, found, expected}, sorted by path; path is absolute where root is.
    """
    foreign = []
    for folder, _folders, names in os.walk(root):
        for name in names:
            if not is_library_name(name):
                continue
            path = os.path.join(folder, name)
            found = machine_of(path)
            if found is not None and found != machine:
                foreign.append({"path": path, "found": found, "expected": machine})
    return sorted(foreign, key=lambda row: row["path"])


# ---------------------------------------------------------------- what a library asks for


def newest_glibc(versions: Iterable[str]) -> Optional[str]:
    """Return the newest glibc ("2.34") among version names such as GLIBC_2.34, or None where none is one."""
    found = []
    for name in versions:
        match = _GLIBC.match(name)
        if match or name in _GLIBC_FEATURES:
            found.append(match.group(1) if match else _GLIBC_FEATURES[name])
    return max(found, key=version_numbers) if found else None


def version_numbers(version: str) -> Tuple[int, ...]:
    """Return a dotted number as one that compares ("2.34" -> (2, 34))."""
    return tuple(int(part) for part in version.split("."))


def string_abi(undefined: Iterable[bytes]) -> Optional[bool]:
    """Return which std::string a library passes to torch: True for the C++11 one, False for the old one.

    Args:
        undefined: mangled names that the library looks for elsewhere. Only those of torch's namespaces count, since
            libstdc++ has both kinds of everything.

    Returns:
        None where no name tells, or where both kinds are asked for.
    """
    found: Set[bool] = set()
    for name in undefined:
        if _TORCH_NAMESPACES.match(name):
            if _LONG_STRING in name:
                found.add(True)
            elif b"Ss" in name and b"Ss" in _without_identifiers(name):
                found.add(False)
    return found.pop() if len(found) == 1 else None


def _without_identifiers(name: bytes) -> bytes:
    """Return a mangled name without the identifiers in it, so that what is left are type codes."""
    rest, position = b"", 2
    while position < len(name):
        noise = _MANGLED_NOISE.match(name, position)
        digits = _IDENTIFIER.match(name, position)
        if noise:
            position = noise.end()
            rest += b" "
        elif digits:
            position = digits.end() + int(digits.group(0)[:6])
            rest += b" "
        else:
            rest += name[position : position + 1]
            position += 1
    return rest


class Elf(NamedTuple):
    """What a 64-bit little-endian library says of itself (see read_facts)."""

    machine: str
    needed: List[str]
    soname: Optional[str]
    runpath: List[str]
    glibc: Optional[str]
    cxx11: Optional[bool]
    fatbins: Optional[List[Tuple[int, int]]]


def read_facts(path: str) -> Dict[str, Any]:
    """Return what a shared library is for and what it asks for.

    Returns:
        machine: as `uname -m` names it; None for what is no ELF file.
        needed: sonames that it needs; soname: its own, or None; runpath: folders it looks for them in.
        glibc: the newest version of the C library that it asks for ("2.34"), or None.
        cxx11: which std::string it passes to torch (see string_abi).
        fatbins: [(offset, size)] of the sections with GPU code; None where no section table tells.
        Of a 32-bit or big-endian file only the machine is read.

    Raises:
        ValueError: an ELF file whose tables cannot be (cut off, or made to mislead).
        OSError: it cannot be read.
    """
    with open(path, "rb") as handle:
        header = handle.read(64)
        machine = machine_of_header(header)
        blank = Elf(machine or "", [], None, [], None, None, [])
        if machine is None:
            return dict(blank._asdict(), machine=None)
        if len(header) < 64:
            raise ValueError("its ELF header is cut off")
        if header[4:6] != b"\x02\x01":
            return dict(blank._asdict())
        return dict(_Reader(handle, header, machine).read()._asdict())


class _Reader:
    """Reads one file; every read is checked against the file's size."""

    def __init__(self, handle: BinaryIO, header: bytes, machine: str) -> None:
        self.handle = handle
        self.machine = machine
        self.size = handle.seek(0, os.SEEK_END)
        self.program, self.sections = struct.unpack_from("<QQ", header, 32)
        entry, self.segments, section, self.section_count, self.names = struct.unpack_from("<5H", header, 54)
        if self.segments and entry != 56:
            raise ValueError(f"its program headers have {entry} bytes each instead of 56")
        if self.sections and section != 64:
            raise ValueError(f"its section headers have {section} bytes each instead of 64")

    def part(self, offset: int, size: int, what: str) -> bytes:
        """Return a part of the file, all of it."""
        if offset + size > self.size:
            raise ValueError(f"{what} reach {offset + size - self.size} bytes beyond the file's end")
        if size > _TABLE_LIMIT:
            raise ValueError(f"{what} claim {size} bytes")
        self.handle.seek(offset)
        return self.handle.read(size)

    def read(self) -> Elf:
        """Return everything."""
        segments = [
            struct.unpack_from("<IIQQQQ", self.part(self.program, self.segments * 56, "its program headers"), at * 56)
            for at in range(self.segments)
        ]
        loads = [(virtual, offset, size) for kind, _f, offset, virtual, _p, size in segments if kind == _PT_LOAD]
        for _virtual, offset, size in loads:
            if offset + size > self.size:
                raise ValueError(f"it is cut off: {offset + size - self.size} bytes are missing at its end")
        needed: List[str] = []
        soname: Optional[str] = None
        paths: Dict[int, List[str]] = {}
        versions: List[str] = []
        for kind, _flags, offset, _virtual, _physical, size in segments:
            if kind != _PT_DYNAMIC:
                continue
            entries = self._dynamic(offset, size)
            values = dict(entries)
            if _DT_STRTAB not in values:
                continue
            names = self.part(_offset_of(loads, values[_DT_STRTAB]), values.get(_DT_STRSZ, 0), "its dynamic strings")
            for tag, value in entries:
                if tag == _DT_NEEDED:
                    needed.append(_text(names, value))
                elif tag == _DT_SONAME:
                    soname = _text(names, value)
                elif tag in (_DT_RPATH, _DT_RUNPATH):
                    paths[tag] = [part for part in _text(names, value).split(":") if part]
            if _DT_VERNEED in values:
                start = _offset_of(loads, values[_DT_VERNEED])
                versions += self._versions(start, values.get(_DT_VERNEEDNUM, 0), names)
        fatbins, undefined = self._sections()
        # the linker overlooks RPATH where there is a RUNPATH
        runpath = paths.get(_DT_RUNPATH, paths.get(_DT_RPATH, []))
        return Elf(self.machine, needed, soname, runpath, newest_glibc(versions), string_abi(undefined), fatbins)

    def _dynamic(self, offset: int, size: int) -> List[Tuple[int, int]]:
        data = self.part(offset, size - size % 16, "its dynamic entries")
        entries = []
        for tag, value in struct.iter_unpack("<QQ", data):
            if tag == 0:
                break
            entries.append((tag, value))
        return entries

    def _versions(self, offset: int, count: int, names: bytes) -> List[str]:
        """Return the names of .gnu.version_r, a chain of chains."""
        found: List[str] = []
        for _library in range(min(count, _ENTRY_LIMIT)):
            _version, entries, _file, first, following = struct.unpack(
                "<HHIII", self.part(offset, 16, "its version needs")
            )
            at = offset + first
            for _entry in range(entries):
                _hash, _flags, _other, name, next_entry = struct.unpack(
                    "<IHHII", self.part(at, 16, "its version needs")
                )
                found.append(_text(names, name))
                if not next_entry:
                    break
                at += next_entry
            if not following:
                break
            offset += following
            if len(found) > _ENTRY_LIMIT:
                raise ValueError("its version needs have no end")
        return found

    def _sections(self) -> Tuple[Optional[List[Tuple[int, int]]], List[bytes]]:
        """Return where the GPU code lies (None where no table tells), and the names of undefined symbols."""
        if not self.sections or not self.section_count:
            return None, []
        data = self.part(self.sections, self.section_count * 64, "its section headers")
        table = list(struct.iter_unpack("<IIQQQQIIQQ", data))
        if self.names >= len(table):
            raise ValueError("its section headers have no names")
        names = self.part(table[self.names][4], table[self.names][5], "its section names")
        fatbins: List[Tuple[int, int]] = []
        undefined: List[bytes] = []
        tables = 0
        for name, kind, _flags, _address, offset, size, link, _info, _align, _entry in table:
            if _text(names, name) in FATBIN_SECTIONS:
                if offset + size > self.size:
                    raise ValueError(f"its GPU code reaches {offset + size - self.size} bytes beyond the file's end")
                fatbins.append((offset, size))
            elif kind == _SHT_DYNSYM and link < len(table):
                tables += 1
                if tables > 1:
                    raise ValueError("it has several tables of symbols, and a library has one")
                strings = self.part(table[link][4], table[link][5], "its symbol names")
                undefined += undefined_names(self.part(offset, size - size % 24, "its symbols"), strings)
        return fatbins, undefined


def undefined_names(symbols: bytes, strings: bytes) -> Iterable[bytes]:
    """Return the mangled names that a table of symbols looks for elsewhere, given the table of their names.

    Raises:
        ValueError: there are more of them, or longer ones, than a library has.
    """
    if len(symbols) > 24 * _SYMBOL_LIMIT:
        raise ValueError(f"it claims {len(symbols) // 24} symbols")
    room = _TABLE_LIMIT
    for name, _info, _other, section, _value, _size in struct.iter_unpack("<IBBHQQ", symbols):
        if section == 0 and strings.startswith(b"_ZN", name):
            end = strings.find(b"\0", name, name + _NAME_LIMIT)
            room -= end - name
            if end < 0 or room < 0:
                raise ValueError("the names of its symbols have no end")
            yield strings[name:end]


def _offset_of(loads: List[Tuple[int, int, int]], address: int) -> int:
    """Return where in the file an address of the loaded library comes from."""
    for virtual, offset, size in loads:
        if virtual <= address < virtual + size:
            return offset + address - virtual
    raise ValueError(f"its table at the address {address:#x} is in no segment")


def _text(names: bytes, offset: int) -> str:
    end = names.find(b"\0", offset)
    if offset >= len(names) or end < 0:
        raise ValueError("one of its names is outside the table of names")
    return names[offset:end].decode("utf-8", "replace")
