"""Which libraries a wheel asks of the system: what its ELF files need and the wheel does not bring itself."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.jetson.mamba.plugins.module_utils import elf
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.files import write_atomic
from ansible_collections.jetson.mamba.plugins.module_utils.inspection import ARCHIVE_ERRORS
from ansible_collections.jetson.mamba.plugins.module_utils.versions import canonical_name
from ansible_collections.jetson.mamba.plugins.plugin_utils import fetch, wheel_inspection

# The package that brings a library which JetPack may lack. What comes with the C library or the CUDA toolkit is not
# listed: the one is always there, the other is cuda_env's business.
PACKAGES = {
    "libcusparseLt.so.0": "libcusparselt0",
    "libopenblas.so.0": "libopenblas0",
    "libcudnn.so.8": "libcudnn8",
    "libcudnn.so.9": "libcudnn9-cuda-12",
    "libgomp.so.1": "libgomp1",
}
# How the names of NVIDIA's wheels begin that bring libraries of the table above, by what their sonames begin with. The
# rest of a name is the CUDA series (-cu12). torch loads these libraries itself: the linker need not know them.
IN_WHEELS = {
    "libcudnn": "nvidia-cudnn-cu",
    "libcusparseLt": "nvidia-cusparselt-cu",
}
_SCHEMA = 1


def needed_of_wheel(path: str | Path) -> list[str]:
    """Return the sonames that a wheel's libraries need and that the wheel does not hold, sorted.

    Each library is unpacked to a temporary file in turn, since some are too large for memory.

    Raises:
        Problem: the wheel or one of its libraries cannot be read.
    """
    wanted: set[str] = set()
    provided: set[str] = set()
    try:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory(prefix="needed-") as folder:
            for member in archive.infolist():
                base = os.path.basename(member.filename)
                if not elf.is_library_name(base):
                    continue
                copy = Path(folder, "library")
                with archive.open(member) as reader, open(copy, "wb") as writer:
                    shutil.copyfileobj(reader, writer, 1 << 20)
                if elf.machine_of(str(copy)) is None:
                    continue
                provided.add(base)
                dynamic = wheel_inspection.read_dynamic(str(copy))
                wanted.update(dynamic["DT_NEEDED"])
                provided.update(dynamic["DT_SONAME"])
    except ARCHIVE_ERRORS as error:
        raise Problem(
            f"{path}: its libraries cannot be read: {error}",
            "a wheel with whole ELF files",
            "fetch it again (remove it from the controller's cache first)",
        ) from error
    return sorted(wanted - provided)


def needed(
    extra: Iterable[Mapping[str, Any]], cache: fetch.Cache | str | Path, locked: Sequence[str] = ()
) -> dict[str, str]:
    """Return {soname: Debian package} that wheels on the controller ask of the system and that JetPack may lack.

    Args:
        extra: {name, version, url or path, sha256} each; those not fetched yet count for nothing.
        cache: the content cache; it keeps what was found out about a wheel.
        locked: names of the lock's packages; what those of NVIDIA's bring is not asked of the system.
    """
    store = fetch.Cache.of(cache)
    sonames: set[str] = set()
    for description in extra:
        wheel = fetch.find_wheel(description, store)
        if wheel is not None:
            sonames.update(_remembered(wheel, store))
    names = [canonical_name(name) for name in locked]
    return {
        soname: PACKAGES[soname] for soname in sorted(sonames) if soname in PACKAGES and not _is_brought(soname, names)
    }


def _is_brought(soname: str, locked: Sequence[str]) -> bool:
    """Return whether one of these packages brings a library."""
    package = IN_WHEELS.get(soname.partition(".so")[0])
    return package is not None and any(name.startswith(package) for name in locked)


def _remembered(wheel: fetch.Wheel, cache: fetch.Cache) -> list[str]:
    note = cache.root / "needed" / f"{wheel.sha256}.json"
    with cache.locked("needed-" + wheel.sha256[:32], lambda _message: None, wheel.filename):
        try:
            data = json.loads(note.read_text(encoding="utf-8"))
            if data["schema"] == _SCHEMA:
                return [str(name) for name in data["needed"]]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not looked at yet
        found = needed_of_wheel(wheel.path)
        write_atomic(str(note), json.dumps({"schema": _SCHEMA, "needed": found}).encode("utf-8"), 0o644)
        return found
