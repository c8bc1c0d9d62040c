"""GPU code in containers: real ones, made-up ones, and ones that mislead."""

from __future__ import annotations

import io
import random
import struct
import time
from pathlib import Path

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import fatbin

from tests.unit.plugins.wheel_kit import container, entry, make_elf

REAL = Path(__file__).resolve().parents[1] / "data" / "fatbins"


def read(data: bytes) -> dict[str, dict[str, int]]:
    """Return what a section with this content holds."""
    return fatbin.read(io.BytesIO(data), [(0, len(data))])


def counts(found: dict[str, dict[str, int]]) -> dict[str, tuple[int, int]]:
    """Return {GPU: (cubins, ptx)}."""
    return {number: (row["cubins"], row["ptx"]) for number, row in found.items()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", {"87": (1, 0), "90a": (1, 0)}),
        ("zstd", {"87": (1, 0), "90a": (1, 1)}),
        ("lz4", {"87": (1, 1)}),
        ("ptx", {"87": (0, 1)}),
        ("lto", {"87": (0, 1)}),
        ("family", {"110f": (1, 1), "121a": (1, 0)}),
    ],
)
def test_what_nvcc_writes(name: str, expected: dict[str, tuple[int, int]]) -> None:
    data = (REAL / f"{name}.fatbin").read_bytes()
    found = read(data)
    assert counts(found) == expected
    # all of the file but the container's own header
    assert sum(row["bytes"] for row in found.values()) == len(data) - 16


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sm87.o", {"87": (1, 0)}),
        ("relocatable.o", {"87": (1, 0)}),
        ("two_units.so", {"80": (2, 0), "87": (2, 0)}),
    ],
)
def test_what_is_in_real_object_files(name: str, expected: dict[str, tuple[int, int]]) -> None:
    assert counts(fatbin.architectures(str(REAL / name))) == expected


def test_containers_stand_one_behind_another_with_padding() -> None:
    data = container(entry(87), entry(72, payload=8)) + bytes(24) + container(entry(87, kind=1)) + bytes(200000)
    assert read(data) == {
        "87": {"cubins": 1, "ptx": 1, "bytes": 256},
        "72": {"cubins": 1, "ptx": 0, "bytes": 72},
    }
    assert read(b"") == read(bytes(64)) == read(container()) == {}


def test_longer_headers_are_stepped_over() -> None:
    assert counts(read(container(entry(110, header=112), entry(87)))) == {"110": (1, 0), "87": (1, 0)}


def test_the_letter_of_a_gpu_is_in_the_flags() -> None:
    data = container(entry(90, flags=0x100011), entry(110, flags=0x1200011), entry(90, flags=0x11))
    assert counts(read(data)) == {"90a": (1, 0), "110f": (1, 0), "90": (1, 0)}


def _with(data: bytes, offset: int, code: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(code, changed, offset, value)
    return bytes(changed)


GOOD = container(entry(87), entry(72))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (GOOD[:-1], "claims 16"),
        (GOOD[:10], "cut off"),
        (GOOD + b"\x01" * 16, "instead of a container's"),
        (_with(GOOD, 8, "<Q", 2**64 - 1), "claims 16"),
        (_with(GOOD, 6, "<H", 0), "claims 0"),
        (_with(GOOD, 16 + 8, "<Q", 2**63), "entry of its GPU code"),
        (_with(GOOD, 16 + 4, "<I", 0), "entry of its GPU code"),
        (_with(GOOD, 16 + 4, "<I", 2**32 - 1), "entry of its GPU code"),
        (container(entry(87), b"\x02" * 24), "cut off"),
        # an entry that ends where it begins
        (container(bytes(64)), r"claims 0 \+ 0 bytes"),
    ],
)
def test_sizes_that_mislead_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(data)


def test_a_section_beyond_the_file_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond the file's end"):
        fatbin.read(io.BytesIO(GOOD), [(0, 2**62)])


def test_what_is_no_elf_file_or_has_no_section_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.so"
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="no ELF file"):
        fatbin.architectures(str(path))
    data = make_elf(gpu=GOOD)
    path.write_bytes(data)
    assert counts(fatbin.architectures(str(path))) == {"87": (1, 0), "72": (1, 0)}
    path.write_bytes(_with(data, 40, "<Q", 0))
    with pytest.raises(ValueError, match="section headers are gone"):
        fatbin.architectures(str(path))


def test_no_damage_makes_it_hang_or_fail_otherwise() -> None:
    chance = random.Random(87)
    began = time.monotonic()
    for _ in range(3000):
        data = bytearray(container(entry(87), entry(72)) + bytes(8) + container(entry(90, payload=16)))
        for _change in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))
        try:
            read(bytes(data[: chance.randint(0, len(data))]))
        except ValueError:
            continue
    assert time.monotonic() - began < 20


def test_too_many_entries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fatbin, "_ENTRY_LIMIT", 3)
    with pytest.raises(ValueError, match="more than 3 entries"):
        read(container(*[entry(87, payload=0)] * 4))
