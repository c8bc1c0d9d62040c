"""Made-up wheels, ELF files and containers of GPU code, for the tests of what looks into them."""

from __future__ import annotations

import base64
import hashlib
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

MACHINES = {"x86_64": 62, "aarch64": 183, "armv7l": 40}


def make_wheel(
    folder: Path,
    name: str = "thing",
    version: str = "1.0",
    tag: str = "py3-none-any",
    inside_tag: str | None = None,
    files: dict[str, bytes] | None = None,
    requires: str = "",
    file_version: str | None = None,
    record: Callable[[str], str] = str,
) -> Path:
    """Write a wheel.

    Args:
        inside_tag: what its WHEEL file says.
        file_version: what its file name says.
        files: its members, without the metadata.
        record: changes the text of RECORD.
    """
    info = f"{name}-{version}.dist-info"
    content = dict(files if files is not None else {f"{name}/__init__.py": b"value = 1\n"})
    content[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {inside_tag or tag}\n".encode()
    content[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + (f"Requires-Dist: {requires}\n" if requires else "")
        + "\nbody: no header\n"
    ).encode()
    lines = ""
    for member, data in content.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines += f"{member},sha256={digest},{len(data)}\n"
    content[f"{info}/RECORD"] = record(lines + f"{info}/RECORD,,\n").encode()
    path = folder / f"{name}-{file_version or version}-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in content.items():
            archive.writestr(member, data)
    return path


def entry(sm: int, kind: int = 2, payload: int = 64, flags: int = 0x11, header: int = 64) -> bytes:
    """Return an entry of a container: kind 1 is PTX, 2 a cubin, 8 intermediate code."""
    head = struct.pack("<HHIQIIHHIIIQ", kind, 0x101, header, payload, 0, 0, 8, 1, sm, 0, 0, flags)
    return head.ljust(header, b"\0") + b"\x7fELF".ljust(payload, b"c")[:payload]


def container(*entries: bytes) -> bytes:
    """Return a container of GPU code."""
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def make_elf(
    machine: str = "aarch64",
    needed: Sequence[str] = ("libc10.so", "libc.so.6"),
    glibc: Sequence[str] = ("GLIBC_2.17", "GLIBC_2.34"),
    undefined: Sequence[str] = (),
    gpu: bytes = b"",
    soname: str = "",
    runpath: str = "",
) -> bytes:
    """Return a shared library with all the tables that a linker looks at, and no code."""
    names = b"\0"

    def name(text: str) -> int:
        nonlocal names
        names += text.encode() + b"\0"
        return len(names) - len(text) - 1

    dynamic = [(1, name(one)) for one in needed]
    dynamic += [(14, name(soname))] if soname else []
    dynamic += [(29, name(runpath))] if runpath else []
    file = name("libc.so.6")
    versions = [name(one) for one in glibc]
    symbols = bytes(24) + b"".join(struct.pack("<IBBHQQ", name(one), 0x12, 0, 0, 0, 0) for one in undefined)
    needs = b""
    if versions:
        needs = struct.pack("<HHIII", 1, len(versions), file, 16, 0)
        for number, one in enumerate(versions, start=1):
            needs += struct.pack("<IHHII", 0, 0, number + 1, one, 16 if number < len(versions) else 0)
    # kind, link, info, content of each section; all are loaded at their place in the file
    parts: list[tuple[str, int, int, int, bytes]] = [
        (".dynstr", 3, 0, 0, names),
        (".dynsym", 11, 1, 1, symbols),
        (".gnu.version_r", 0x6FFFFFFE, 1, 1 if versions else 0, needs),
        (".dynamic", 6, 1, 0, bytes(16 * (len(dynamic) + 6))),
        (".nv_fatbin", 1, 0, 0, gpu),
    ]
    parts = [part for part in parts if part[4]]
    titles = b"\0" + b"".join(part[0].encode() + b"\0" for part in parts) + b".shstrtab\0"
    parts.append((".shstrtab", 3, 0, 0, titles))
    offset, placed = 64 + 2 * 56, {}
    for part in parts:
        offset += -offset % 8
        placed[part[0]] = offset
        offset += len(part[4])
    dynamic += [(5, placed[".dynstr"]), (10, len(names)), (6, placed[".dynsym"])]
    dynamic += [(0x6FFFFFFE, placed[".gnu.version_r"]), (0x6FFFFFFF, 1)] if versions else []
    table = b"".join(struct.pack("<QQ", *one) for one in dynamic)
    sections = offset + -offset % 8
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack(
        "<HHIQQQIHHHHHH", 3, MACHINES[machine], 1, 0, 64, sections, 0, 64, 56, 2, 64, len(parts) + 1, len(parts)
    )
    at = placed[".dynamic"]
    header += struct.pack("<IIQQQQQQ", 1, 4, 0, 0, 0, sections, sections, 8)
    header += struct.pack("<IIQQQQQQ", 2, 4, at, at, at, len(table), len(table), 8)
    data = bytearray(header)
    rows = bytes(64)
    for title, kind, link, info, content in parts:
        if title == ".dynamic":
            content = table.ljust(len(content), b"\0")
        data += bytes(placed[title] - len(data)) + content
        size = {11: 24, 6: 16}.get(kind, 0)
        rows += struct.pack(
            "<IIQQQQIIQQ",
            titles.index(title.encode() + b"\0"), kind, 2, placed[title], placed[title], len(content), link, info, 8,
            size,
        )
    return bytes(data) + bytes(sections - len(data)) + rows
