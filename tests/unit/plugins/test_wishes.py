"""Settings, platform row, lock, sources and patches brought together."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.jetson.mamba.plugins.plugin_utils import building, patch_series
from ansible_collections.jetson.mamba.plugins.plugin_utils import settings as checks
from ansible_collections.jetson.mamba.plugins.plugin_utils.wishes import Wishes, read_platforms

ROOT = Path(__file__).parents[3]
GUIDE = next(row for row in read_platforms() if row["id"] == "jetpack-6.1-6.2")
STATE: dict[str, Any] = {
    "glibc": "2.35",
    "machine": "aarch64",
    "environment_path": {"environment": None, "login_defs": None},
}

DEVICE: dict[str, Any] = {
    **STATE,
    "cuda": {"toolkits": []},
    "interpreters": [{"version": "3.10.12", "path": "/usr/bin/python3.10", "headers": False}],
    "tools": {"gcc": None, "g++": None, "patch": "/usr/bin/patch"},
    "libraries": [],
}
PATHS = {"cuda_home": "/usr/local/cuda-12.6", "env": "/e", "root": "/r", "base_python": "/usr/bin/python3.10"}


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
    problems = wishes(tmp_path, settings, row).problems
    (problem,) = [one for one in problems if one["outcome"] == "torch_jetpack"]
    assert "torch_jetpack_wheel" in problem["next"]


@pytest.mark.parametrize(("cuda", "files"), [(None, 0), ("12.6", 0), ("13.0", 1), ("13.2", 1)])
@pytest.mark.parametrize("version", ["2.2.4", "2.2.5"])
def test_the_cub_of_cuda_13_needs_a_source_patch(version: str, cuda: str | None, files: int) -> None:
    companions = {"causal_conv1d": "1.6.0", "mamba_ssm": version, "cuda": cuda}
    series = patch_series.load_series(str(ROOT / "files/patches"), "mamba_ssm", version, companions, "source")
    assert [patch["target"] for patch in series] == ["csrc/selective_scan/reverse_scan.cuh"] * files


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
    made = Wishes(GUIDE, DEVICE, settings, ROOT / "files/patches", tmp_path / "cache")
    assert made.wanted(PATHS)["system_shim"] == {}
    settings["sitecustomize_system"] = True
    made = Wishes(GUIDE, DEVICE, settings, ROOT / "files/patches", tmp_path / "cache")
    assert all(
        path.startswith("/usr/local/lib/python3.10/dist-packages/") for path in made.wanted(PATHS)["system_shim"]
    )
    assert made.wanted(PATHS)["system_shim"]


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


# --- packages ---


def surveyed(tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Wishes:
    """Return the wishes for a bare device, whose torch wheel is linked with a library that it lacks."""
    monkeypatch.setattr(Wishes, "libraries", lambda _self: {"libcusparseLt.so.0": "libcusparselt0"})
    return Wishes(GUIDE, DEVICE, settings, ROOT / "files/patches", tmp_path / "cache")


@pytest.mark.parametrize("source", ["controller", "folder", "device"])
def test_what_a_device_lacks_is_wanted_where_the_run_may_install_it(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    settings["debian_packages_source"] = source
    made = surveyed(tmp_path, settings, monkeypatch)
    assert [item["name"] for item in made.packages()["run"]] == ["gcc", "python3.10-dev", "libcusparselt0"]
    assert [item["name"] for item in made.packages()["build"]] == ["g++"]
    assert made.missing_packages() == {"run": [], "build": []} and made.installs_packages
    assert made.wanted(PATHS)["packages"] == made.packages()["run"]


def test_what_a_device_lacks_is_a_problem_where_the_run_may_install_nothing(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["debian_packages_source"] = "none"
    made = surveyed(tmp_path, settings, monkeypatch)
    assert made.packages() == {"run": [], "build": []} and made.wanted(PATHS)["packages"] == []
    (run,), (build,) = made.missing_packages()["run"], made.missing_packages()["build"]
    assert all(name in run["next"] for name in ("gcc", "python3.10-dev", "libcusparselt0")) and "g++" not in run["next"]
    assert "g++" in build["next"] and "gcc" not in build["next"]
    assert run["outcome"] == "debian_packages"


def test_a_whole_device_wants_and_lacks_nothing(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = {
        **DEVICE,
        "tools": dict.fromkeys(("gcc", "g++", "patch"), "/usr/bin/x"),
        "interpreters": [{**DEVICE["interpreters"][0], "headers": True}],
    }
    for source in ("controller", "none"):
        settings["debian_packages_source"] = source
        made = Wishes(GUIDE, whole, settings, ROOT / "files/patches", tmp_path / "cache")
        nothing: dict[str, Any] = {"run": [], "build": []}
        assert made.packages() == nothing and made.missing_packages() == nothing


# --- what others need to know of a component ---


def test_a_component_carries_all_that_its_builder_is_asked_for(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings["mamba_ssm_build_flags"] = ["A=1"]
    data = wishes(tmp_path, settings).components["mamba_ssm"]
    assert data["project"] == "mamba-ssm" and data["modules"] == ["selective_scan_cuda"]
    assert data["source"] == settings["mamba_ssm_source"] and len(data["source_sha256"]) == 64
    assert data["build_flags"] == ["A=1"] and data["memory_mb"] > 0 and data["disk_mb"] > 0 and data["minutes"] > 0


@pytest.mark.parametrize(
    ("config", "abi"),
    [
        ('set(TORCH_CXX_FLAGS "-D_GLIBCXX_USE_CXX11_ABI=0")', "cxx98"),
        ('set(TORCH_CXX_FLAGS "-D_GLIBCXX_USE_CXX11_ABI=1")', "cxx11"),
        ("", "cxx11"),
        (None, "cxx11"),
    ],
)
def test_the_class_has_the_abi_of_the_users_own_torch(
    tmp_path: Path, settings: dict[str, Any], config: str | None, abi: str
) -> None:
    path = tmp_path / "torch-2.5.1-cp310-cp310-linux_aarch64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("torch/version.py", "__version__ = '2.5.1'\n")
        if config is not None:
            archive.writestr("torch/share/cmake/Torch/TorchConfig.cmake", config)
    settings["torch_jetpack_wheel"] = {"version": "2.5.1", "path": str(path)}
    assert f"-{abi}-sm87" in wishes(tmp_path, settings).class_id
    path.write_bytes(b"no wheel")
    assert "-cxx98-sm87" in wishes(tmp_path, settings, {**GUIDE, "cxx11_abi": False}).class_id


def test_the_key_of_the_plan_is_the_key_of_the_build(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The plan looks for a wheel by its key, the builder computes it again from what it was asked for."""
    settings["causal_conv1d_build_flags"] = ["B=2", "A=1"]
    made = wishes(tmp_path, settings)
    for name, data in made.components.items():
        order = building.make_order(
            {
                "component": name,
                "version": data["version"],
                "source": data["source"],
                "patch_root": str(ROOT / "files/patches"),
                "companions": made.companions(),
                "cache": str(tmp_path / "another cache"),
                "class_id": made.class_id,
                "sm": GUIDE["sm"],
                "build_flags": data["build_flags"],
                "build_root": "/b",
                "python": "/p",
                "cuda_home": "",
            }
        )
        assert order.key == data["key"] and order.source.sha256 == data["source_sha256"]
        assert order.wish(made.class_id).flags == tuple(data["build_flags"])
        flags_are_set = f"{name}_build_flags is set" if data["build_flags"] else None
        assert order.wish(made.class_id).special == data["special"] == flags_are_set


@pytest.mark.parametrize("name", ["causal_conv1d", "mamba_ssm"])
@pytest.mark.parametrize("change", ["source", "build_flags", "version"])
def test_the_key_follows_what_the_wheel_is_made_from(
    tmp_path: Path, settings: dict[str, Any], name: str, change: str
) -> None:
    first = {key: one["key"] for key, one in wishes(tmp_path, settings).components.items()}
    if change == "source":
        (tmp_path / name / "setup.py").write_text("# another\n")
    elif change == "build_flags":
        settings[f"{name}_build_flags"] = ["A=1"]
    else:
        settings[f"{name}_version"] = {"causal_conv1d": "1.5.0.post8", "mamba_ssm": "2.2.5"}[name]
        tree_of = Path(settings[f"{name}_source"]["path"])
        (tree_of / name / "__init__.py").write_text(f'__version__ = "{settings[f"{name}_version"]}"\n')
    second = {key: one["key"] for key, one in wishes(tmp_path, settings).components.items()}
    assert second[name] != first[name]
    if change != "version":
        assert {key for key in first if first[key] != second[key]} == {name}


def test_an_upgrade_of_l4t_changes_neither_class_nor_keys(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The row is the same, the release is no part of anything."""
    made = [
        Wishes(GUIDE, {**STATE, "l4t": {"release": release}}, settings, ROOT / "files/patches", tmp_path / "cache")
        for release in ("36.4.4", "36.4.7")
    ]
    assert made[0].class_id == made[1].class_id and made[0].env_id == made[1].env_id
    assert made[0].components == made[1].components


def test_another_toolkit_is_another_class_and_other_keys(tmp_path: Path, settings: dict[str, Any]) -> None:
    first = wishes(tmp_path, settings)
    second = wishes(tmp_path, {**settings, "cuda_env_version": "12.8"})
    assert "-cu12.8-" in second.class_id and second.class_id != first.class_id
    assert all(first.components[name]["key"] != data["key"] for name, data in second.components.items())


def test_what_is_installed_is_judged_by_the_class(tmp_path: Path, settings: dict[str, Any]) -> None:
    made = Wishes(GUIDE, DEVICE, settings, ROOT / "files/patches", tmp_path / "cache")
    expected = made.wanted(PATHS)["expectations"]["mamba_ssm"]
    assert (expected.machine, expected.python, expected.glibc, expected.sm) == ("aarch64", "3.10", "2.35", "87")
    assert (expected.component, expected.version) == ("mamba_ssm", "2.2.4")
    assert expected.modules == ("selective_scan_cuda",) and expected.cxx11 is True


def test_a_build_without_a_gpu_needs_the_memory_of_a_cpp_compiler(tmp_path: Path, settings: dict[str, Any]) -> None:
    row = {**GUIDE, "sm": "cpu"}
    made = wishes(tmp_path, settings, row)
    assert made.class_id.endswith("-cpu")
    assert made.components["causal_conv1d"]["memory_mb"] < wishes(tmp_path, settings).components["causal_conv1d"][
        "memory_mb"
    ]
