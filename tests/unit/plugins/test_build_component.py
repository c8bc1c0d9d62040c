"""An installed component against what is wanted."""

from __future__ import annotations

import base64
import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import component
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

KEY = "ab" * 32


def _install(site: Path, text: str = "x = 1\n") -> None:
    """Put mamba_ssm 2.2.4 into a site folder, as pip would."""
    info = site / "mamba_ssm-2.2.4.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (site / "mamba_ssm").mkdir(exist_ok=True)
    (site / "mamba_ssm/a.py").write_text(text)
    (info / "METADATA").write_text("Name: mamba_ssm\nVersion: 2.2.4\n")
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
    (info / "RECORD").write_text(f"mamba_ssm/a.py,sha256={digest},{len(text)}\nmamba_ssm-2.2.4.dist-info/RECORD,,\n")


@pytest.fixture
def place(tmp_path: Path) -> component.Place:
    return component.Place(sys.executable, str(tmp_path / "site"), str(tmp_path / "state"))


def reason(place: component.Place, version: str = "2.2.4", key: str = KEY) -> Any:
    return component.query(place, "mamba_ssm", version, key)["reason"]


def test_every_reason_has_its_words(place: component.Place) -> None:
    assert reason(place) == "mamba_ssm is not installed"
    _install(Path(place.site_packages))
    assert reason(place) == "nothing says how the installed mamba_ssm was built"
    path = Path(component.record_path(place, "mamba_ssm"))
    path.parent.mkdir()
    path.write_text(f'{{"key": "{KEY}"}}')
    assert reason(place) is None
    assert reason(place, version="2.2.5") == "mamba_ssm 2.2.4 is installed, 2.2.5 is wanted"
    assert "other inputs" in reason(place, key="cd" * 32)
    Path(place.site_packages, "mamba_ssm/a.py").write_text("x = 2\n")
    assert "mamba_ssm/a.py differs from its RECORD hash" in reason(place)
    _install(Path(place.site_packages), "x = 3  # patched, with RECORD brought along\n")
    assert reason(place) is None


def test_another_wheel_than_the_judged_one_is_refused(place: component.Place, tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    wheel.write_bytes(b"x")
    with pytest.raises(Problem, match="has the sha256"):
        component.install(place, "mamba_ssm", "2.2.4", str(wheel), {"wheel_sha256": "0" * 64})


def test_a_failed_installation_leaves_no_record(place: component.Place, tmp_path: Path) -> None:
    wheel = tmp_path / "mamba_ssm-2.2.4-py3-none-any.whl"
    wheel.write_bytes(b"no zip")
    path = Path(component.record_path(place, "mamba_ssm"))
    path.parent.mkdir()
    path.write_text('{"key": "old"}')
    with pytest.raises(Problem, match="pip could not install"):
        component.install(
            place, "mamba_ssm", "2.2.4", str(wheel), {"wheel_sha256": hashlib.sha256(b"no zip").hexdigest()}
        )
    assert not path.exists()
