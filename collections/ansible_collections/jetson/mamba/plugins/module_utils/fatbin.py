"""Read which GPUs the GPU code in a library is for, without the CUDA toolkit.

nvcc leaves containers in the section .nv_fatbin, one after another: a magic number, then one entry for each GPU with
its number in plain sight, whether the code behind it is compressed or not. Found by looking at what nvcc 13.0 writes
(tests/unit/data/fatbins); only headers are read, so a library of any size costs a few reads for each entry.
"""

from __future__ import annotations

import os
import struct
from typing import Any, BinaryIO, Dict, Iterable, Tuple

from ansible_collections.jetson.mamba.plugins.module_utils import elf

MAGIC = 0xBA55ED50
_CONTAINER = struct.Struct("<IHHQ")  # magic, format, bytes of this header, bytes behind it
# kind, format, bytes of this header, bytes behind it, packed size, options, minor, major, GPU, name, name's size, flags
_ENTRY = struct.Struct("<HHIQIIHHIIIQ")
_ENTRY_BYTES = 64
_KIND_CUBIN = 2
# code for one GPU's own instructions (sm_90a) or for those of its family (sm_110f)
_SUFFIXES = ((1 << 20, "a"), (1 << 21, "f"))
_ALIGNMENT = 8
_BLOCK = 1 << 16
# libtorch_cuda has some ten thousand
_ENTRY_LIMIT = 1000000


def architectures(path: str) -> Dict[str, Dict[str, int]]:
    """Return {GPU: {cubins, ptx, bytes}} of a library, such as {"87": {"cubins": 3, "ptx": 0, "bytes": 29000000}}.

    Args:
        path: a library or an object file.

    Returns:
        Empty for a library without GPU code. `cubins` can run as they are; `ptx` counts what must be compiled first
        (PTX, intermediate code); `bytes` is what both take in the file. Code for one GPU's own instructions has a
        letter: "90a", "110f".

    Raises:
        ValueError: it is no ELF file, its GPU code can't be found or is damaged.
        OSError: it cannot be read.
    """
    facts = elf.read_facts(path)
    if facts["machine"] is None:
        raise ValueError("it is no ELF file")
    return read_library(path, facts)


def read_library(path: str, facts: Dict[str, Any]) -> Dict[str, Dict[str, int]]:
    """Return what architectures() does for a file whose `fatbins` (offset, size) are known already."""
    if facts["fatbins"] is None:
        raise ValueError("its section headers are gone, and nothing else tells where GPU code is")
    with open(path, "rb") as handle:
        return read(handle, facts["fatbins"])


def read(handle: BinaryIO, sections: Iterable[Tuple[int, int]]) -> Dict[str, Dict[str, int]]:
    """Return {GPU: {cubins, ptx, bytes}} of the containers in parts (offset, size) of a file.

    Raises:
        ValueError: a size leads beyond its container, its part or the file, or there is something else in between.
    """
    found: Dict[str, Dict[str, int]] = {}
    length = handle.seek(0, os.SEEK_END)
    entries = 0
    for offset, size in sections:
        if offset + size > length:
            raise ValueError(f"its GPU code reaches {offset + size - length} bytes beyond the file's end")
        position, end = _skip_padding(handle, offset, offset + size), offset + size
        while position < end:
            start, stop = _container(handle, position, end)
            while start < stop:
                entries += 1
                if entries > _ENTRY_LIMIT:
                    raise ValueError(f"its GPU code has more than {_ENTRY_LIMIT} entries")
                start = _count(handle, start, stop, found)
            position = _skip_padding(handle, stop, end)
    return found


def _part(handle: BinaryIO, position: int, size: int, end: int, what: str) -> bytes:
    if position + size > end:
        raise ValueError(f"{what} at {position:#x} is cut off")
    handle.seek(position)
    return handle.read(size)


def _container(handle: BinaryIO, position: int, end: int) -> Tuple[int, int]:
    """Return where the entries of the container at a position begin and end."""
    what = "a container of its GPU code"
    magic, _format, header, size = _CONTAINER.unpack(_part(handle, position, _CONTAINER.size, end, what))
    if magic != MAGIC:
        raise ValueError(f"at {position:#x} in its GPU code is {magic:#010x} instead of a container's {MAGIC:#010x}")
    stop = position + header + size
    if header < _CONTAINER.size or stop > end:
        raise ValueError(f"{what} at {position:#x} claims {header} + {size} bytes, there are {end - position}")
    return position + header, stop


def _count(handle: BinaryIO, position: int, end: int, found: Dict[str, Dict[str, int]]) -> int:
    """Count one entry and return where the next one begins."""
    what = "an entry of its GPU code"
    if end - position < _ALIGNMENT:
        return end
    fields = _ENTRY.unpack(_part(handle, position, _ENTRY_BYTES, end, what)[: _ENTRY.size])
    kind, header, size, number, flags = fields[0], fields[2], fields[3], fields[8], fields[11]
    if header < _ENTRY_BYTES or position + header + size > end:
        raise ValueError(f"{what} at {position:#x} claims {header} + {size} bytes, there are {end - position}")
    name = str(number) + "".join(letter for bit, letter in _SUFFIXES if flags & bit)
    row = found.setdefault(name, {"cubins": 0, "ptx": 0, "bytes": 0})
    row["cubins" if kind == _KIND_CUBIN else "ptx"] += 1
    row["bytes"] += header + size
    return int(position + header + size)


def _skip_padding(handle: BinaryIO, position: int, end: int) -> int:
    """Return the next place that is not zero, as containers are aligned; the end where there is none."""
    while position < end:
        handle.seek(position)
        block = handle.read(min(_BLOCK, end - position))
        if not block:
            break
        zeros = len(block) - len(block.lstrip(b"\0"))
        if zeros < len(block):
            return position + zeros - zeros % _ALIGNMENT
        position += len(block)
    return end
