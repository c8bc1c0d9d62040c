"""Read the machine that an ELF file was made for. Standard library only, 20 bytes a file."""

from __future__ import annotations

import os
import struct

# e_machine of the ELF specification, named as `uname -m` does
_MACHINES = {3: "i386", 21: "ppc64le", 22: "s390x", 40: "armv7l", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
HEADER_BYTES = 20


def machine_of_header(header: bytes) -> str | None:
    """Return the machine of a file's first 20 bytes, e.g. "aarch64"; None for what is no ELF file."""
    if len(header) < HEADER_BYTES or header[:4] != b"\x7fELF":
        return None
    order = ">" if header[5] == 2 else "<"
    (number,) = struct.unpack_from(order + "H", header, 18)
    return _MACHINES.get(number, f"machine {number}")


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
