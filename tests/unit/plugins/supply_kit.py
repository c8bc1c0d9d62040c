"""Small real wheels of both components, a wheelhouse to put them into, and plans of hosts that want them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ansible_collections.jetson.mamba.plugins.module_utils.build import build_key
from ansible_collections.jetson.mamba.plugins.plugin_utils.supply import Wish
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheelhouse import Wheelhouse, parse_class_id

from tests.unit.plugins.wheel_kit import container, entry, make_elf, make_wheel

ORIN = "aarch64-glibc2.35-cu12.6-cp310-torch2.5.0a0+872d972e41.nv24.8-cxx11-sm87"
CPU = "x86_64-glibc2.36-cu12.6-cp311-torch2.13.0+cpu-cxx11-cpu"
MODULES = {"causal_conv1d": "causal_conv1d_cuda", "mamba_ssm": "selective_scan_cuda"}
VERSIONS = {"causal_conv1d": "1.6.0", "mamba_ssm": "2.2.4"}
SOURCE = "5" * 64


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def real_wheel(
    folder: Path,
    component: str = "causal_conv1d",
    class_id: str = ORIN,
    *,
    version: str = "",
    machine: str = "",
    needed: Sequence[str] = ("libc10.so", "libc.so.6"),
    text: str = "",
) -> Path:
    """Write a wheel that passes inspection for a class.

    Args:
        machine: of the library inside, where it shall be another than the file's name says.
        needed: what the library is linked with.
        text: makes two wheels differ.
    """
    parts = parse_class_id(class_id)
    python = parts.python.replace(".", "")
    gpu = b"" if parts.sm == "cpu" else container(entry(int(parts.sm)))
    library = make_elf(machine or parts.machine, needed=needed, glibc=("GLIBC_2.17",), gpu=gpu)
    folder.mkdir(parents=True, exist_ok=True)
    return make_wheel(
        folder,
        component,
        version or VERSIONS[component],
        f"cp{python}-cp{python}-linux_{parts.machine}",
        files={
            f"{MODULES[component]}.cpython-{python}-{parts.machine}-linux-gnu.so": library,
            f"{component}/__init__.py": f"# {text}\n".encode(),
        },
    )


def wish(
    component: str = "causal_conv1d",
    class_id: str = ORIN,
    version: str = "",
    source: str = SOURCE,
    flags: Sequence[str] = (),
    special: str | None = None,
) -> Wish:
    """Return the wish for a component, with the key that belongs to it. One with flags is special."""
    special = special or (f"{component}_build_flags is set" if flags else None)
    version = version or VERSIONS[component]
    key = build_key(component, version, source, class_id, parse_class_id(class_id).sm, list(flags))
    return Wish(component, component.replace("_", "-"), version, key, class_id, source, tuple(flags), special)


def stock(house: Wheelhouse, wanted: Wish, wheel: Path, host: str = "orin-z") -> dict[str, Any]:
    """Put a wheel into the wheelhouse as one that was built for a wish; returns its row."""
    row = wanted.row(sha256(wheel), f"built on {host}", wheel.name, [])
    return house.add(wheel, {**row, "key": wanted.key, "source_sha256": wanted.source_sha256, "builder": host})


def stock_imported(house: Wheelhouse, wanted: Wish, wheel: Path) -> dict[str, Any]:
    """Put a wheel into the wheelhouse as one that others built; returns its row."""
    return house.add(wheel, wanted.row(sha256(wheel), "folder /archive", wheel.name, []))


def damage(house: Wheelhouse, row: dict[str, Any]) -> Path:
    """Change a byte of a wheel in the wheelhouse, as a failing disk would; returns its path."""
    path = house.path_of(row)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    return path


def plan_of(
    house: Path,
    class_id: str = ORIN,
    *,
    components: Sequence[str] = ("causal_conv1d", "mamba_ssm"),
    outcomes: Sequence[str] = ("causal_conv1d", "mamba_ssm"),
    unfit: Sequence[str] = (),
    source: str = SOURCE,
    special: str | None = None,
    **wheelhouse: Any,
) -> dict[str, Any]:
    """Return the parts of a host's plan that the choice of builders looks at.

    Args:
        unfit: why the host cannot build, any component.
        source: digest of the components' source, so that keys differ.
        special: why wheels that others built will not do.
        wheelhouse: options of the role wheelhouse, without its prefix.
    """
    return {
        "class_id": class_id,
        "versions": dict(VERSIONS),
        "outcomes": list(outcomes),
        "artefacts": {"cache": str(house.parent / "cache")},
        "wheelhouse": {"path": str(house), "build": True, "patience_minutes": 0.02, **wheelhouse},
        "components": {
            name: {
                "version": VERSIONS[name],
                "key": wish(name, class_id, source=source).key,
                "project": name.replace("_", "-"),
                "modules": [MODULES[name]],
                "source": None,
                "source_sha256": source,
                "build_flags": [],
                "special": special,
                "max_jobs": 0,
                "minutes": 13,
                "disk_mb": 300,
                "memory_mb": 2600,
                "reinstall": False,
                "unfit": [
                    {"outcome": name, "found": text, "expected": "more", "next": "get it"} for text in unfit
                ],
                "served": None,
            }
            for name in components
        },
    }
