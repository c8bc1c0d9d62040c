"""Locks: pip's format, read strictly."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.versions import Target
from ansible_collections.jetson.mamba.plugins.plugin_utils import fetch, locks

ROOT = Path(__file__).resolve().parents[3]
LOCKS = ROOT / "collections/ansible_collections/jetson/mamba/plugins/data/locks"
ORIN = Target("aarch64", "3.10", "2.35")
A, B = "a" * 64, "b" * 64


def test_reads_names_versions_hashes_and_file_comments() -> None:
    text = (
        "# head\n"
        "# numpy-1.26.4-cp310-cp310-linux_aarch64.whl 1234\n"
        f"NumPy==1.26.4 \\\n    --hash=sha256:{A} \\\n    --hash=sha256:{B}\n    # via torch\n"
        f"typing_extensions==4.1  --hash=sha256:{A}  # why\n"
    )
    first, second = locks.parse_lock(text, "lock")
    assert (first.name, first.version, first.hashes) == ("numpy", "1.26.4", (A, B))
    assert (first.filename, first.size) == ("numpy-1.26.4-cp310-cp310-linux_aarch64.whl", 1234)
    assert (second.name, second.filename) == ("typing-extensions", None)
    assert first.line() == f"numpy==1.26.4 --hash=sha256:{A} --hash=sha256:{B}"


def test_markers_are_evaluated_for_the_target() -> None:
    text = f"a==1 ; python_version < '3.9' --hash=sha256:{A}\nb==1 ; platform_machine == 'aarch64' --hash=sha256:{A}\n"
    assert [entry.name for entry in locks.parse_lock(text, "lock", ORIN)] == ["b"]
    assert [entry.name for entry in locks.parse_lock(text, "lock")] == ["a", "b"]


@pytest.mark.parametrize(
    "line",
    [
        "numpy==1.26.4",
        f"numpy>=1 --hash=sha256:{A}",
        f"numpy==1.* --hash=sha256:{A}",
        f"numpy==1,!=2 --hash=sha256:{A}",
        f"numpy @ https://example.org/n.whl --hash=sha256:{A}",
        f"numpy==1 --hash=md5:{A[:32]}",
        f"numpy==1 --hash=sha256:{A[:63]}",
        "--index-url https://example.org/simple",
        "-r other.txt",
        f"numpy== --hash=sha256:{A}",
        f"numpy==1 --hash=sha256:{A}\nnumpy==2 --hash=sha256:{A}",
    ],
)
def test_anything_else_is_refused_with_its_line(line: str) -> None:
    with pytest.raises(Problem, match=r"lock, line [23]"):
        locks.parse_lock("# head\n" + line + "\n", "lock")


def test_an_absent_lock_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(Problem) as refusal:
        locks.read_lock(tmp_path / "none.txt")
    assert "torch_jetpack_lock" in refusal.value.next_step


@pytest.mark.parametrize(
    ("path", "target"),
    [
        (LOCKS / "cp310-linux_aarch64.txt", ORIN),
        (LOCKS / "cp312-linux_aarch64.txt", Target("aarch64", "3.12", "2.39")),
        (ROOT / "simulator/locks/cp311-linux_x86_64.txt", Target("x86_64", "3.11", "2.36")),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else None,
)
def test_our_locks_are_whole_and_for_their_target(path: Path, target: Target) -> None:
    entries = {entry.name: entry for entry in locks.read_lock(path, target)}
    fetch.check_lock_fits(entries.values(), target, path.name)
    assert all(entry.filename and entry.size and len(entry.hashes) == 1 for entry in entries.values())
    assert {"pip", "wheel", "setuptools", "packaging", "ninja", "sympy", "jinja2", "filelock"} <= set(entries)
    assert not {"torch", "torchvision"} & set(entries)
    assert entries["numpy"].version.startswith("1.")
    assert entries["triton"].version == "3.5.1"
    assert entries["transformers"].version.startswith("4.") and not entries["transformers"].version.startswith("4.51")
    assert 70 <= int(entries["setuptools"].version.split(".")[0]) < 81


def test_a_lock_for_another_machine_is_refused() -> None:
    entries = locks.read_lock(LOCKS / "cp310-linux_aarch64.txt")
    with pytest.raises(Problem, match="not for"):
        fetch.check_lock_fits(entries, Target("x86_64", "3.11", "2.36"), "lock")
    with pytest.raises(Problem, match="manylinux"):
        fetch.check_lock_fits(entries, Target("aarch64", "3.10", "2.17"), "lock")
