"""Settings, platform row, lock, sources and patches brought together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.jetson.mamba.plugins.plugin_utils import settings as checks
from ansible_collections.jetson.mamba.plugins.plugin_utils.wishes import Wishes, read_platforms

ROOT = Path(__file__).parents[3]
GUIDE = next(row for row in read_platforms() if row["id"] == "jetpack-6.1-6.2")
STATE: dict[str, Any] = {
    "glibc": "2.35",
    "machine": "aarch64",
    "environment_path": {"environment": None, "login_defs": None},
}


def tree(folder: Path, package: str, version: str) -> dict[str, str]:
    """Return a source setting that names a small tree of a component."""
    (folder / package / package).mkdir(parents=True)
    (folder / package / "setup.py").write_text("from setuptools import setup\nsetup()\n")
    (folder / package / package / "__init__.py").write_text(f'__version__ = "{version}"\n')
    return {"kind": "tree", "path": str(folder / package)}


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Return the defaults of all roles, with small trees for sources."""
    values: dict[str, Any] = {}
    for role in checks.read_role_specs(ROOT / "roles"):
        values.update(yaml.safe_load((ROOT / "roles" / role / "defaults/main.yml").read_text()) or {})
    values["causal_conv1d_source"] = tree(tmp_path, "causal_conv1d", "1.6.0")
    values["mamba_ssm_source"] = tree(tmp_path, "mamba_ssm", "2.2.4")
    values["torch_jetpack_trust_on_first_use"] = True
    return values


def wishes(tmp_path: Path, settings: dict[str, Any], row: dict[str, Any] = GUIDE) -> Wishes:
    return Wishes(row, STATE, settings, ROOT / "files/patches", tmp_path / "cache")


def test_the_guides_platform_row(tmp_path: Path, settings: dict[str, Any]) -> None:
    made = wishes(tmp_path, settings)
    assert made.problems == []
    assert made.class_id == "aarch64-glibc2.35-cu12.6-cp310-torch2.5.0a0+872d972e41.nv24.8-cxx11-sm87"
    names = {wheel["name"]: wheel["version"] for wheel in made.wheels()}
    assert names["torch"] == "2.5.0a0+872d972e41.nv24.8"
    assert names["torchvision"] == "0.20.0a0+afc54f7"
    assert names["numpy"].startswith("1.")
    assert "torchvision==0.20.0a0+afc54f7" in made.constraints()
    assert list(made.patch_targets()["mamba_ssm"]) == [
        "mamba_ssm/ops/selective_scan_interface.py",
        "mamba_ssm/ops/triton/ssd_combined.py",
    ]


def test_patches_that_shall_go_want_the_pristine_file(tmp_path: Path, settings: dict[str, Any]) -> None:
    present = wishes(tmp_path, settings).patch_targets()["mamba_ssm"]
    settings["source_patches_state"] = "absent"
    absent = wishes(tmp_path, settings).patch_targets()["mamba_ssm"]
    assert present.keys() == absent.keys()
    for path, hashes in absent.items():
        assert hashes["final"] == hashes["pristine"] == present[path]["pristine"]
        assert present[path]["final"] != hashes["final"]


def test_an_unknown_checksum_stops_with_the_command_that_prints_it(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings["torch_jetpack_trust_on_first_use"] = False
    problems = wishes(tmp_path, settings).problems
    assert len(problems) == 2, "torch and torchvision"
    assert "sha256sum" in problems[0]["next"]
    assert "torch_jetpack_trust_on_first_use" in problems[0]["next"]


def test_the_users_checksum_is_enough(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings["torch_jetpack_trust_on_first_use"] = False
    settings["torch_jetpack_sha256"] = "a" * 64
    (problem,) = wishes(tmp_path, settings).problems
    assert "torchvision" in problem["found"]


def test_a_platform_without_a_known_torch(tmp_path: Path, settings: dict[str, Any]) -> None:
    row = next(row for row in read_platforms() if row["id"] == "jetpack-7.0-7.1")
    (problem,) = wishes(tmp_path, settings, row).problems
    assert "torch_jetpack_wheel" in problem["next"]


@pytest.mark.parametrize(
    ("filename", "found"),
    [
        ("torch-2.5.0-cp311-cp311-linux_aarch64.whl", "cp311"),
        ("torch-2.5.0-cp310-cp310-linux_x86_64.whl", "linux_x86_64"),
        ("torch-2.5.0-cp310-cp310-manylinux_2_39_aarch64.whl", "glibc 2.35"),
        ("torch.whl", "not a wheel's file name"),
        ("torch-2.5.0-cp310-cp310-linux_aarch64.whl", "there is no"),
    ],
)
def test_an_own_wheel_that_does_not_fit(tmp_path: Path, settings: dict[str, Any], filename: str, found: str) -> None:
    settings["torch_jetpack_wheel"] = {"version": "2.5.0", "path": str(tmp_path / filename), "sha256": None}
    problems = wishes(tmp_path, settings, {**GUIDE, "torchvision": None}).problems
    assert [found in problem["found"] for problem in problems] == [True], problems


@pytest.mark.parametrize(("version", "kept"), [("2.8.0", False), ("2.5.1", True)])
def test_an_own_torch_does_not_get_the_rows_torchvision(
    tmp_path: Path, settings: dict[str, Any], version: str, kept: bool
) -> None:
    (tmp_path / f"torch-{version}-cp310-cp310-linux_aarch64.whl").write_bytes(b"")
    path = str(tmp_path / f"torch-{version}-cp310-cp310-linux_aarch64.whl")
    settings["torch_jetpack_wheel"] = {"version": version, "path": path, "sha256": None}
    made = wishes(tmp_path, settings)
    assert ("torchvision" in [wheel["name"] for wheel in made.wheels()]) is kept
    assert any(line.startswith("torchvision==0.23" if not kept else "torchvision==0.20") for line in made.constraints())


def test_versions_that_do_not_fit_together(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "torch-2.3.0-cp310-cp310-linux_aarch64.whl").write_bytes(b"")
    path = str(tmp_path / "torch-2.3.0-cp310-cp310-linux_aarch64.whl")
    settings["torch_jetpack_wheel"] = {"version": "2.3.0", "path": path, "sha256": None}
    (problem,) = wishes(tmp_path, settings).problems
    assert problem["found"] == "torch 2.3.0 beside causal_conv1d 1.6.0"
    assert problem["expected"] == "torch>=2.4"


def test_the_same_version_rebuilt_is_another_environment(tmp_path: Path, settings: dict[str, Any]) -> None:
    wheel = tmp_path / "torch-2.5.0-cp310-cp310-linux_aarch64.whl"
    wheel.write_bytes(b"one")
    settings["torch_jetpack_wheel"] = {"version": "2.5.0", "path": str(wheel), "sha256": None}
    first = wishes(tmp_path, settings).env_id
    wheel.write_bytes(b"two")
    assert wishes(tmp_path, settings).env_id != first


def test_the_system_shim_is_wanted_where_a_setting_asks(tmp_path: Path, settings: dict[str, Any]) -> None:
    paths = {"cuda_home": "/usr/local/cuda-12.6", "env": "/e", "root": "/r", "base_python": "/usr/bin/python3.10"}
    surveyed = {**STATE, "cuda": {"toolkits": []}}
    made = Wishes(GUIDE, surveyed, settings, ROOT / "files/patches", tmp_path / "cache")
    assert made.wanted(paths)["system_shim"] == {}
    settings["sitecustomize_system"] = True
    made = Wishes(GUIDE, surveyed, settings, ROOT / "files/patches", tmp_path / "cache")
    assert all(
        path.startswith("/usr/local/lib/python3.10/dist-packages/") for path in made.wanted(paths)["system_shim"]
    )
    assert made.wanted(paths)["system_shim"]


@pytest.mark.parametrize(
    "change",
    [
        {"torch_jetpack_system_packages": ["cv2"]},
        {"torch_jetpack_sha256": "b" * 64},
        {"causal_conv1d_build_flags": ["NVCC_APPEND_FLAGS=-O1"]},
        {"jetson_platform_scope": "user"},
    ],
)
def test_another_wish_is_another_environment(tmp_path: Path, settings: dict[str, Any], change: dict[str, Any]) -> None:
    first = wishes(tmp_path, settings).env_id
    assert wishes(tmp_path, settings).env_id == first
    assert wishes(tmp_path, {**settings, **change}).env_id != first


def test_a_tree_that_no_patch_knows_is_refused_before_it_is_built(tmp_path: Path, settings: dict[str, Any]) -> None:
    target = tmp_path / "mamba_ssm/mamba_ssm/ops/selective_scan_interface.py"
    target.parent.mkdir()
    target.write_text("# somebody's own\n")
    (problem,) = wishes(tmp_path, settings).problems
    assert "selective_scan_interface.py" in problem["found"]
    assert "mamba_ssm_source" in problem["next"]


def test_a_source_of_another_version_is_a_problem(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings["mamba_ssm_version"] = "2.2.5"
    (problem,) = wishes(tmp_path, settings).problems
    assert problem["outcome"] == "mamba_ssm"
    assert "2.2.4" in problem["found"]
