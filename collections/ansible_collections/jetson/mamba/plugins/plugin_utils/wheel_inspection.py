"""Look into a wheel on the controller before it goes anywhere: every file, every library, read by pyelftools."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ansible_collections.jetson.mamba.plugins.module_utils import elf, inspection
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.inspection import Expectation
from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection
from elftools.elf.sections import SymbolTableSection

# what a damaged file makes pyelftools raise beside its own errors
_DAMAGE = (ELFError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError)
# no real library comes near; a made-up one could keep a loop running for ever
_LIMIT = 65536
_FURTHER = 5


class Inspection(NamedTuple):
    """What a good wheel holds (plain data), what it costs (one line each), what the device's linker must find."""

    facts: dict[str, Any]
    warnings: list[str]
    needed: list[str]


def inspect(path: str | Path, expectation: Expectation, provided: Collection[str] | None = None) -> Inspection:
    """Look into a wheel.

    Args:
        path: the wheel; libraries are unpacked to the temporary folder, one at a time.
        expectation: what it must be.
        provided: sonames that the environment brings (torch's own lib folder); None for those of every torch.

    Raises:
        Problem: it is something else, damaged, or for other devices.
    """
    facts = inspection.read_wheel(str(path), read_elf)
    verdict = inspection.judge(facts, expectation, provided)
    if verdict.errors:
        first, *further = verdict.errors
        found = "\n          ".join([first["found"], *(f"and {error['reason']}" for error in further[:_FURTHER])])
        raise Problem(found, first["expected"], first["next"])
    return Inspection(facts, verdict.warnings, verdict.needed)


def read_elf(path: str) -> dict[str, Any]:
    """Return what module_utils/elf.read_facts does, read by pyelftools.

    Raises:
        ValueError: an ELF file whose tables cannot be.
        OSError: it cannot be read.
    """
    blank: dict[str, Any] = {
        "machine": elf.machine_of(path),
        "needed": [],
        "soname": None,
        "runpath": [],
        "glibc": None,
        "cxx11": None,
        "fatbins": [],
    }
    if blank["machine"] is None:
        return blank
    # what misleads is refused here, and glibc found as the dynamic linker does, which needs no sections: a device
    # would refuse what is hidden from them
    glibc = elf.read_facts(path)["glibc"]
    with open(path, "rb") as handle:
        try:
            found = {**blank, **_read(handle)}
        except _DAMAGE as error:
            raise ValueError(str(error) or type(error).__name__) from error
    both = [one for one in (glibc, found["glibc"]) if one]
    return {**found, "glibc": max(both, key=elf.version_numbers, default=None)}


def read_dynamic(path: str) -> dict[str, list[str]]:
    """Return what the dynamic linker is told: {DT_NEEDED, DT_SONAME, DT_RPATH, DT_RUNPATH: values}.

    Raises:
        ValueError: no ELF file, or one whose tables cannot be.
        OSError: it cannot be read.
    """
    with open(path, "rb") as handle:
        try:
            return _dynamic(ELFFile(handle))
        except _DAMAGE as error:
            raise ValueError(str(error) or type(error).__name__) from error


def _read(handle: BinaryIO) -> dict[str, Any]:
    file = ELFFile(handle)
    if file.elfclass != 64 or not file.little_endian:
        return {}
    _refuse_cut(file, os.fstat(handle.fileno()).st_size)
    dynamic = _dynamic(file)
    fatbins: list[tuple[int, int]] | None = [] if file.num_sections() else None
    versions: list[str] = []
    undefined: list[bytes] = []
    for section in file.iter_sections():
        if fatbins is not None and section.name in elf.FATBIN_SECTIONS:
            fatbins.append((section["sh_offset"], section["sh_size"]))
        elif isinstance(section, GNUVerNeedSection):
            versions += _versions(section)
        elif isinstance(section, SymbolTableSection) and section["sh_type"] == "SHT_DYNSYM":
            # thousands of them: an object of pyelftools for each would take seconds
            names = file.get_section(section["sh_link"])
            symbols = section.data()
            undefined += elf.undefined_names(symbols[: len(symbols) - len(symbols) % 24], names.data())
    return {
        "needed": dynamic["DT_NEEDED"],
        "soname": dynamic["DT_SONAME"][-1] if dynamic["DT_SONAME"] else None,
        "runpath": [part for part in ":".join(dynamic["DT_RUNPATH"] or dynamic["DT_RPATH"]).split(":") if part],
        "glibc": elf.newest_glibc(versions),
        "cxx11": elf.string_abi(undefined),
        "fatbins": fatbins,
    }


def _refuse_cut(file: ELFFile, size: int) -> None:
    if max(file.num_sections(), file.num_segments()) > _LIMIT:
        raise ValueError("its headers claim more entries than there can be")
    for segment in file.iter_segments("PT_LOAD"):
        missing = segment["p_offset"] + segment["p_filesz"] - size
        if missing > 0:
            raise ValueError(f"it is cut off: {missing} bytes are missing at its end")


def _dynamic(file: ELFFile) -> dict[str, list[str]]:
    if file.num_segments() > _LIMIT:
        raise ValueError("its headers claim more entries than there can be")
    found: dict[str, list[str]] = {"DT_NEEDED": [], "DT_SONAME": [], "DT_RPATH": [], "DT_RUNPATH": []}
    for segment in file.iter_segments("PT_DYNAMIC"):
        if isinstance(segment, DynamicSegment):
            for tag in segment.iter_tags():
                name = str(tag.entry.d_tag)
                if name in found:
                    # pyelftools names the value after the tag
                    found[name].append(str(getattr(tag, name[len("DT_") :].lower())))
    return found


def _versions(section: GNUVerNeedSection) -> Iterator[str]:
    seen = 0
    for _library, entries in section.iter_versions():
        for entry in entries:
            seen += 1
            if seen > _LIMIT:
                raise ValueError("its version needs have no end")
            yield str(entry.name)
        seen += 1
