"""The simulated Jetson's torch: PyTorch's own CPU build, repackaged so that torch.distributed is absent.

Jetson builds are made without USE_DISTRIBUTED: torch._C has no _c10d_init, and torch.distributed is an empty shell.
Hiding three names of torch._C as soon as it is loaded gives the same, with the same errors.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from simulator.artefacts import cache
from simulator.artefacts.pip_settings import no_pip
from simulator.errors import Problem
from simulator.progress import Waiting, say

VERSION = "2.13.0+cpu"
FILE_NAME = f"torch-{VERSION}-cp311-cp311-manylinux_2_28_x86_64.whl"
SHA256 = "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

_WANTED = (
    *("--python-version", "311", "--implementation", "cp", "--abi", "cp311"),
    *("--platform", "manylinux_2_28_x86_64", "--only-binary", ":all:", "--no-deps"),
)

INIT = "torch/__init__.py"
# The first line after which torch._C can be named and before which nothing asks for torch.distributed.
_ANCHOR = "from torch import _C as _C\n"
_HIDING = """
# The simulated Jetson: builds of torch for Jetson have no torch.distributed, so neither has this one.
for __name in ("_c10d_init", "_rpc_init", "_dist_autograd_init"):
    if hasattr(_C, __name):
        delattr(_C, __name)
"""
# PyTorch's own C++ test programs; nothing in the package starts them.
_UNNEEDED = re.compile(r"torch/test/|torch/bin/test_|torch/bin/\w+Test$")
# The hosts read the wheel over a local link, so time spent on packing counts for more than its size.
_PACKING_LEVEL = 1


@dataclass(frozen=True)
class Wheel:
    """A prepared wheel: its path, sha256 as hex digits, and version."""

    path: Path
    sha256: str
    version: str


def pip_download(requirement: str, folder: Path, arguments: Sequence[str]) -> tuple[Path | None, str]:
    """Fetch one wheel with pip.

    Args:
        requirement: what to fetch, pinned.
        folder: where to put it; empty.
        arguments: further options of `pip download`.
    Returns:
        The file and an empty reason, or None and what pip said last.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    answer = subprocess.run(
        [*command, *_WANTED, "--dest", str(folder), *arguments, requirement],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "LC_ALL": "C"},
        check=False,
    )
    if "No module named pip" in answer.stderr:
        raise no_pip(answer.stderr.strip().splitlines()[-1])
    files = sorted(folder.iterdir())
    if answer.returncode == 0 and files:
        return files[0], ""
    errors = [line for line in answer.stderr.splitlines() if line.startswith("ERROR:")]
    said = errors or answer.stderr.strip().splitlines() or [f"pip ended with status {answer.returncode}"]
    return None, said[-1].removeprefix("ERROR:").strip()


def find(
    folder: Path,
    sha256: str = SHA256,
    download: Callable[[str, Path, Sequence[str]], tuple[Path | None, str]] = pip_download,
) -> Path:
    """Fetch PyTorch's CPU wheel from pip's configured sources, else from PyTorch's CPU index.

    Args:
        folder: where to put it.
        sha256: the only content that is accepted.
        download: fetches a requirement into a folder, as `pip_download` does.
    Raises:
        Problem: no source has this very file.
    """
    sources: list[tuple[str, list[str]]] = [
        ("pip's configured sources", []),
        (f"PyTorch's CPU index {PYTORCH_CPU_INDEX}", ["--index-url", PYTORCH_CPU_INDEX]),
    ]
    answers = []
    for number, (source, arguments) in enumerate(sources):
        target = folder / str(number)
        target.mkdir(parents=True)
        with Waiting(f"looking for torch {VERSION} in {source}", "seconds, or minutes if it is far away"):
            path, reason = download(f"torch=={VERSION}", target, arguments)
        if path is not None:
            found = cache.sha256_file(path)
            if found == sha256:
                return path
            path.unlink()
            reason = f"{path.name} has sha256 {found}"
        answers.append(f"{source}: {reason}")
    raise Problem(
        f"no source has the simulator's torch: {'; '.join(answers)}",
        f"{FILE_NAME} with sha256 {sha256}",
        f"let this machine reach {PYTORCH_CPU_INDEX}, or put the file into a folder and name it: "
        "export PIP_FIND_LINKS=FOLDER",
    )


def hide_distributed(source: str) -> str:
    """Return the text of torch/__init__.py with torch.distributed's entry points hidden; raise Problem if unknown."""
    if source.count("\n" + _ANCHOR) != 1:
        raise Problem(
            f"{INIT} has the line '{_ANCHOR.strip()}' {source.count(chr(10) + _ANCHOR)} times",
            "exactly one such line, as in torch 2.13.0",
            "adapt simulator/artefacts/torch_wheel.py to this version of torch",
        )
    return source.replace("\n" + _ANCHOR, "\n" + _ANCHOR + _HIDING)


def record_hash(data: bytes) -> str:
    """Return a file's hash as a wheel's RECORD writes it."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def rewrite_record(record: str, changed: dict[str, bytes], dropped: set[str]) -> str:
    """Return RECORD for a wheel in which files were changed and dropped; the other rows stay as they are."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in csv.reader(io.StringIO(record, newline="")):
        if not row or row[0] in dropped:
            continue
        if row[0] in changed:
            data = changed[row[0]]
            row = [row[0], record_hash(data), str(len(data))]
        writer.writerow(row)
    return out.getvalue()


def repackage(source: Path, target: Path) -> None:
    """Write a copy of a torch wheel without torch.distributed; the same input gives the same bytes.

    Args:
        source: the wheel as PyTorch publishes it.
        target: where the new one goes; its name is the source's.
    """
    with zipfile.ZipFile(source) as old:
        names = [info.filename for info in old.infolist()]
        records = [name for name in names if re.fullmatch(r"[^/]+\.dist-info/RECORD", name)]
        if INIT not in names or len(records) != 1:
            raise Problem(
                f"{source.name} has {len(records)} RECORD files and {'a' if INIT in names else 'no'} {INIT}",
                "a wheel of torch",
                "fetch the wheel again",
            )
        dropped = {name for name in names if _UNNEEDED.match(name)}
        changed = {INIT: hide_distributed(old.read(INIT).decode("utf-8")).encode("utf-8")}
        record = rewrite_record(old.read(records[0]).decode("utf-8"), changed, dropped)
        changed[records[0]] = record.encode("utf-8")
        with cache.new_file(target) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as new:
            for info in old.infolist():
                if info.filename in dropped:
                    continue
                # A new entry with the old one's time and mode, and nothing of how the old one was packed.
                entry = zipfile.ZipInfo(info.filename, info.date_time)
                entry.create_system = info.create_system
                entry.external_attr = info.external_attr
                data = changed[info.filename] if info.filename in changed else old.read(info)
                new.writestr(entry, data, compress_type=zipfile.ZIP_DEFLATED, compresslevel=_PACKING_LEVEL)


def prepare(out: Path) -> Wheel:
    """Return the simulator's torch wheel under a folder, made unless it is there already.

    Args:
        out: the folder of prepared artefacts; exists.
    """
    target, marker = out / FILE_NAME, out / ".state" / "torch_wheel.json"
    inputs = cache.digest_of([SHA256, Path(__file__).read_bytes()])
    record = cache.read_record(marker)
    if record.get("inputs") == inputs and target.is_file():
        status = target.stat()
        if [status.st_size, status.st_mtime_ns] == record.get("stat"):
            return Wheel(target, record["sha256"], VERSION)
        if cache.sha256_file(target) == record["sha256"]:
            return _remember(marker, inputs, target, record["sha256"])
        say(f"{target.name} is not as it was left: made again")
    with tempfile.TemporaryDirectory(prefix=cache.TEMPORARY, dir=out) as folder:
        upstream = find(Path(folder))
        with Waiting("repackaging torch without torch.distributed", "half a minute"):
            repackage(upstream, target)
    return _remember(marker, inputs, target, cache.sha256_file(target))


def _remember(marker: Path, inputs: str, target: Path, sha256: str) -> Wheel:
    status = target.stat()
    cache.write_record(
        marker, {"inputs": inputs, "sha256": sha256, "stat": [status.st_size, status.st_mtime_ns], "version": VERSION}
    )
    return Wheel(target, sha256, VERSION)
