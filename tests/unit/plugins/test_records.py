"""Installed files against RECORD."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import records


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg/a.py").write_text("x = 1\n")
    info = tmp_path / "My_Pkg-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: My-Pkg\nVersion: 1.0\n\nbody\nVersion: 9\n")
    digest = records.record_hash(str(tmp_path / "pkg/a.py"))
    (info / "RECORD").write_text(
        f"pkg/a.py,{digest},6\npkg/__pycache__/a.cpython-311.pyc,,\nMy_Pkg-1.0.dist-info/RECORD,,\n"
    )
    return tmp_path


def damage(site: Path, *hashed: str) -> str | None:
    found = records.survey(str(site), hashed)
    assert found["my_pkg"]["version"] == "1.0"
    value = found["my_pkg"]["damage"]
    assert value is None or isinstance(value, str)
    return value


def test_whole_installation(site: Path) -> None:
    assert damage(site, "my-pkg") is None


def test_same_size_change_needs_hashing(site: Path) -> None:
    (site / "pkg/a.py").write_text("x = 2\n")
    assert damage(site) is None
    assert damage(site, "my_pkg") == "pkg/a.py differs from its RECORD hash"


def test_truncated_file(site: Path) -> None:
    (site / "pkg/a.py").write_text("x")
    assert damage(site) == "pkg/a.py has 1 bytes, RECORD says 6"


def test_missing_file(site: Path) -> None:
    (site / "pkg/a.py").unlink()
    assert damage(site) == "pkg/a.py is missing"


@pytest.mark.parametrize("content", [None, "", '"unclosed'])
def test_interrupted_installation(site: Path, content: str | None) -> None:
    path = site / "My_Pkg-1.0.dist-info/RECORD"
    path.unlink() if content is None else path.write_text(content)
    assert "interrupted" in (damage(site) or "")
