"""What is there against what is wanted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.jetson.mamba.plugins.module_utils import inspection, plan

DATA = Path(__file__).parents[3] / "collections/ansible_collections/jetson/mamba/plugins/data"
ROWS = yaml.safe_load((DATA / "platforms.yml").read_text())["platforms"]
SETTINGS: dict[str, Any] = {
    "jetson_platform_root": "/opt/jetson-mamba",
    "jetson_platform_build_root": "",
    "jetson_platform_tmp_root": "",
    "jetson_platform_scope": "venv",
    "wheelhouse_swap_mb": 0,
}


def orin(**changes: Any) -> dict[str, Any]:
    """Return the survey of a healthy, bare Orin; changes are {"a.b": value}."""
    state: dict[str, Any] = {
        "l4t": {"release": "36.4.7", "source": "/etc/nv_tegra_release", "text": "# R36 …"},
        "soc": {"soc": "tegra234", "model": "NVIDIA Jetson AGX Orin Developer Kit", "compatible": []},
        "machine": "aarch64",
        "glibc": "2.35",
        "clock": 1760000000,
        "cuda": {"link": None, "toolkits": [{"path": "/usr/local/cuda-12.6", "version": "12.6.68", "nvcc": True}]},
        "interpreters": [
            {
                "version": "3.10.12",
                "path": "/usr/bin/python3.10",
                "headers": True,
                "externally_managed": False,
                "user_site": "/home/jetson/.local/lib/python3.10/site-packages",
                "user_base": "/home/jetson/.local",
            }
        ],
        "tools": {"gcc": "/usr/bin/gcc", "g++": "/usr/bin/g++", "patch": "/usr/bin/patch"},
        "libraries": ["libopenblas.so.0"],
        "memory": {"total_mb": 8000, "available_mb": 6000, "swap_free_mb": 0, "zram_free_mb": 3500},
        "disk": {
            name: {
                "path": f"/{name}",
                "existing": "/",
                "exists": False,
                "device": number,
                "free_mb": 50000,
                "read_only": False,
                "writable": False,
            }
            for number, name in enumerate(("root", "build", "tmp", "user"))
        },
        "user": {"name": "jetson"},
        "environments": {"current": None, "venvs": {}},
        "user_sites": {},
        "files": {},
    }
    for path, value in changes.items():
        target = state
        *parents, last = path.split(".")
        for name in parents:
            target = target[name]
        target[last] = value
    return state


NEEDS = {"disk_mb": {"root": 6000, "tmp": 1000, "user": 0}}
BUILD_NEEDS = {"disk_mb": {"root": 6000, "build": 2000, "tmp": 1000, "user": 0}, "memory_mb": 2500}
WORK = [{"outcome": "torch_jetpack"}, {"outcome": "mamba_ssm"}]


@pytest.mark.parametrize(
    ("release", "soc", "row"),
    [
        ("36.4.7", "tegra234", "jetpack-6.1-6.2"),
        ("36.4.0", "tegra234", "jetpack-6.1-6.2"),
        ("36.3.0", "tegra234", "jetpack-6.0"),
        ("38.2.1", "tegra264", "jetpack-7.0-7.1"),
        ("39.2.0", "tegra234", "jetpack-7.2-orin"),
        ("39.2.0", "tegra264", "jetpack-7.2-thor"),
    ],
)
def test_platforms_of_the_table(release: str, soc: str, row: str) -> None:
    match = plan.match_platform(orin(**{"l4t.release": release, "soc.soc": soc}), ROWS)
    assert match.problem is None
    assert match.row is not None
    assert match.row["id"] == row


@pytest.mark.parametrize(
    ("changes", "found", "next_step"),
    [
        ({"l4t.release": "36.4.9"}, "L4T 36.4.9", "jetson_platform_rows"),
        ({"l4t.release": "35.6.0"}, "L4T 35.6.0", "JetPack 5"),
        ({"l4t.release": None, "l4t.text": "garbage"}, "'garbage'", "nvidia-l4t-core"),
        ({"soc.soc": "tegra194"}, "tegra194", "jetson_platform_rows"),
        ({"machine": "x86_64"}, "machine x86_64", "inventory"),
    ],
)
def test_devices_that_no_row_fits(changes: dict[str, Any], found: str, next_step: str) -> None:
    match = plan.match_platform(orin(**changes), ROWS)
    assert match.row is None
    assert match.problem is not None
    assert found in match.problem["found"]
    assert next_step in match.problem["next"]


def test_a_users_row_for_a_workstation_needs_no_l4t() -> None:
    row = {
        "id": "ws",
        "l4t": ["none"],
        "soc": ["any"],
        "machine": "x86_64",
        "python": "3.12",
        "cuda": "13.0",
        "sm": "90",
    }
    match = plan.match_platform(orin(machine="x86_64", **{"l4t.release": None, "soc.soc": None}), [row, *ROWS])
    assert match.row == row


ROW = next(row for row in ROWS if row["id"] == "jetpack-6.1-6.2")


def problems(**changes: Any) -> list[dict[str, str]]:
    return plan.find_problems(ROW, orin(**changes), SETTINGS, NEEDS, WORK)


def test_a_healthy_device_has_no_problem() -> None:
    assert problems() == []


@pytest.mark.parametrize(
    ("changes", "found", "next_step"),
    [
        ({"interpreters": []}, "no python3", "python3.10"),
        ({"cuda.toolkits": []}, "none under /usr/local", "cuda-toolkit-12-6"),
        (
            {"cuda.toolkits": [{"path": "/usr/local/cuda-12.2", "version": "12.2.140", "nvcc": True}]},
            "12.2.140",
            "cuda_env_install=true",
        ),
        ({"disk.root.free_mb": 5999}, "5999 MB free", "jetson_platform_root"),
        ({"disk.tmp.read_only": True}, "read-only", "jetson_platform_tmp_root"),
        ({"memory.available_mb": 699}, "699 MB of memory", "swap"),
        ({"clock": 3 * 86400}, "3 days after 1970", "timedatectl"),
    ],
)
def test_each_problem_is_named(changes: dict[str, Any], found: str, next_step: str) -> None:
    (problem,) = problems(**changes)
    assert found in problem["found"]
    assert next_step in problem["next"]
    assert problem["expected"]


def test_folders_on_one_file_system_share_its_room() -> None:
    one = {f"disk.{name}.device": 7 for name in ("root", "build", "tmp", "user")}
    room = {f"disk.{name}.free_mb": 6999 for name in ("root", "build", "tmp", "user")}
    (problem,) = problems(**one, **room)
    assert "6999 MB free" in problem["found"]
    assert "7000 MB" in problem["expected"]
    assert problems(**one, **dict.fromkeys(room, 7000)) == []
    (problem,) = unfit(**one, **dict.fromkeys(room, 8999))
    assert "9000 MB" in problem["expected"], "a builder needs the environment and the room to build"
    assert unfit(**one, **dict.fromkeys(room, 9000)) == []


def test_somebody_elses_folder_is_refused() -> None:
    (problem,) = problems(**{"disk.root.exists": True})
    assert "/root belongs to another user" in problem["found"]
    assert "/root/jetson-mamba" in problem["next"]
    assert problems(**{"disk.root.exists": True, "disk.root.writable": True}) == []


def test_a_toolkit_at_the_users_own_place() -> None:
    toolkit = {"path": "/ssd/cuda", "version": "12.6.68", "nvcc": True}
    state = orin(**{"cuda.toolkits": [toolkit]})
    assert plan.find_problems(ROW, state, {**SETTINGS, "cuda_env_home": "/ssd/cuda"}, NEEDS, WORK) == []
    (problem,) = plan.find_problems(ROW, state, {**SETTINGS, "cuda_env_home": "/elsewhere"}, NEEDS, WORK)
    assert "12.6 at /elsewhere" in problem["expected"]
    (problem,) = plan.find_problems(ROW, state, {**SETTINGS, "cuda_env_version": "12.8"}, NEEDS, WORK)
    assert "cuda-toolkit-12-8" in problem["next"]


def test_an_admins_own_setenv_is_met_before_anything_changes() -> None:
    settings = {**SETTINGS, "cuda_env_ssh": True}
    work = [{"outcome": "cuda_env"}]
    state = orin(sshd={"readable": True, "include": True, "set_env": ["/etc/ssh/sshd_config:12"]})
    (problem,) = plan.find_problems(ROW, state, settings, NEEDS, work)
    assert "/etc/ssh/sshd_config:12" in problem["found"]
    assert "cuda_env_ssh" in problem["next"]
    assert plan.find_problems(ROW, state, {**settings, "cuda_env_ssh": False}, NEEDS, work) == []
    assert plan.find_problems(ROW, state, settings, NEEDS, WORK) == [], "no work on it, no problem"


def test_verification_takes_the_active_environment_where_the_wanted_one_is_absent() -> None:
    paths = {"root": "/r", "env": "/r/envs/wanted", "python": "x", "site_packages": "y", "state": "z"}
    found = {"current": "envs/other", "venvs": {"other": {"exists": True, "site_packages": "/r/envs/other/site"}}}
    assert plan.active_paths(paths, found)["python"] == "/r/envs/other/bin/python"
    assert plan.active_paths(paths, {"current": None, "venvs": {}}) == paths


def test_all_problems_come_at_once() -> None:
    found = problems(interpreters=[], clock=0, **{"cuda.toolkits": [], "disk.root.free_mb": 1})
    assert [item["outcome"] for item in found] == ["torch_jetpack", "cuda_env", "torch_jetpack", "jetson_platform"]


def test_swap_counts_and_zram_does_not() -> None:
    assert problems(**{"memory.available_mb": 500, "memory.swap_free_mb": 2500}) == []
    assert unfit(**{"memory.available_mb": 500, "memory.swap_free_mb": 2000}) == []
    assert unfit(**{"memory.available_mb": 500, "memory.zram_free_mb": 9000})


# --- builders ---


def unfit(settings: Any = None, row: Any = None, **changes: Any) -> list[dict[str, str]]:
    return plan.builder_problems(row or ROW, orin(**changes), settings or SETTINGS, BUILD_NEEDS, "mamba_ssm")


def test_memory_that_swap_makes_up_for_keeps_nobody_from_building() -> None:
    little = {"memory.available_mb": 1500}
    (problem,) = unfit(**little)
    assert "wheelhouse_swap_mb: -1" in problem["next"]
    automatic = {**SETTINGS, "wheelhouse_swap_mb": -1}
    assert unfit(automatic, **little) == []
    (problem,) = unfit(automatic, **little, **{"disk.build.free_mb": 4999})
    assert "5072 MB" in problem["expected"], "the swap file takes room beside the build"
    assert unfit(automatic, **little, **{"disk.build.free_mb": 5072}) == []
    assert unfit(automatic, **{"disk.build.free_mb": 2000}) == [], "and none where nothing lacks"
    assert unfit({**SETTINGS, "wheelhouse_swap_mb": 1000}, **little) == []
    assert len(unfit({**SETTINGS, "wheelhouse_swap_mb": 999}, **little)) == 1


NO_NVCC = {"cuda.toolkits": [{"path": "/usr/local/cuda-12.6", "version": "12.6.68", "nvcc": False}]}


def test_a_healthy_device_can_build() -> None:
    assert unfit() == []


@pytest.mark.parametrize(
    ("changes", "found", "next_step"),
    [
        (NO_NVCC, "no bin/nvcc in /usr/local/cuda-12.6", "cuda-nvcc-12-6"),
        ({"disk.build.free_mb": 1999}, "1999 MB free", "jetson_platform_build_root"),
        ({"disk.build.read_only": True}, "read-only", "jetson_platform_build_root"),
        ({"disk.root.free_mb": 5999}, "5999 MB free", "jetson_platform_root"),
        ({"memory.available_mb": 2499}, "2499 MB of memory", "swap"),
    ],
)
def test_what_a_build_alone_needs_makes_a_builder_unfit(changes: dict[str, Any], found: str, next_step: str) -> None:
    (problem,) = unfit(**changes)
    assert found in problem["found"] and next_step in problem["next"]
    assert problem["outcome"] == "mamba_ssm", "what cannot be built, not what lacks"
    assert {*problem} == {"outcome", "found", "expected", "next"}


@pytest.mark.parametrize("changes", [NO_NVCC, {"disk.build.free_mb": 10}, {"memory.available_mb": 2499}])
def test_what_a_build_alone_needs_forbids_no_installation(changes: dict[str, Any]) -> None:
    assert problems(**changes) == []


def test_everything_that_makes_a_builder_unfit_comes_at_once() -> None:
    assert len(unfit(**NO_NVCC, **{"disk.build.free_mb": 1, "memory.available_mb": 1})) == 3


def test_nvcc_is_wanted_of_those_alone_who_compile_for_a_gpu() -> None:
    assert unfit(row={**ROW, "sm": "cpu"}, **NO_NVCC) == []
    assert unfit(settings={**SETTINGS, "cuda_env_install": True}, **NO_NVCC) == [], "the run installs it"
    (problem,) = unfit(settings={**SETTINGS, "cuda_env_home": "/usr/local/cuda-12.6"}, **NO_NVCC)
    assert "nvcc" in problem["found"]


# --- packages ---


@pytest.mark.parametrize(
    ("changes", "use", "name", "why"),
    [
        ({"tools.gcc": None}, "run", "gcc", "Triton"),
        ({"tools.patch": None}, "run", "patch", "patches"),
        ({"tools.g++": None}, "build", "g++", "compiled"),
    ],
)
def test_missing_tools_are_packages(changes: dict[str, Any], use: str, name: str, why: str) -> None:
    found = plan.find_packages(ROW, orin(**changes), {})
    ((only,), nothing) = (found[use], found["build" if use == "run" else "run"])
    assert only["name"] == name and why in only["why"] and nothing == []


def test_a_healthy_device_lacks_no_package() -> None:
    assert plan.find_packages(ROW, orin(), {"libopenblas.so.0": "libopenblas0"}) == {"run": [], "build": []}


def test_headers_are_those_of_the_platforms_python() -> None:
    state = orin()
    state["interpreters"][0]["headers"] = False
    state["interpreters"].append({**state["interpreters"][0], "version": "3.12.3", "headers": True})
    (package,) = plan.find_packages(ROW, state, {})["run"]
    assert package["name"] == "python3.10-dev"
    assert plan.find_packages({**ROW, "python": "3.12"}, state, {})["run"] == []
    assert plan.find_packages(ROW, orin(interpreters=[]), {})["run"] == [], "that Python is a problem of its own"


def test_missing_libraries_are_named_with_their_packages_once() -> None:
    libraries = {"libcusparseLt.so.0": "libcusparselt0", "libopenblas.so.0": "libopenblas0", "x.so": "libcusparselt0"}
    (package,) = plan.find_packages(ROW, orin(), libraries)["run"]
    assert package["name"] == "libcusparselt0" and "libcusparseLt.so.0" in package["why"]


def test_missing_packages_are_one_problem_where_the_run_may_install_none() -> None:
    state = orin(**{"tools.gcc": None, "tools.patch": None})
    missing = plan.find_packages(ROW, state, {"libcusparseLt.so.0": "libcusparselt0"})["run"]
    (problem,) = plan.package_problems(missing, "debian_packages")
    assert problem["outcome"] == "debian_packages"
    assert "sudo apt-get install gcc patch libcusparselt0," in problem["next"]
    assert all(word in problem["found"] for word in ("gcc (", "patch (", "libcusparseLt.so.0"))
    assert "debian_packages_source" in problem["expected"] and "debian_packages_source" in problem["next"]
    assert plan.package_problems([], "debian_packages") == []


def test_a_device_without_work_needs_no_disk_and_no_memory() -> None:
    state = orin(**{"disk.root.free_mb": 1, "memory.available_mb": 1})
    assert plan.find_problems(ROW, state, SETTINGS, NEEDS, []) == []


def test_the_user_site_of_a_managed_python_is_refused() -> None:
    state = orin()
    state["interpreters"][0]["externally_managed"] = True
    settings = {**SETTINGS, "jetson_platform_scope": "user"}
    (problem,) = plan.find_problems(ROW, state, settings, NEEDS, WORK)
    assert "EXTERNALLY-MANAGED" in problem["found"]


def test_the_class_ignores_the_l4t_release() -> None:
    first = plan.class_id(ROW, orin(), "2.5.0", "12.6")
    assert first == plan.class_id(ROW, orin(**{"l4t.release": "36.4.4"}), "2.5.0", "12.6")
    assert first == "aarch64-glibc2.35-cu12.6-cp310-torch2.5.0-cxx11-sm87"


@pytest.mark.parametrize(
    ("row", "state", "torch", "cuda", "part"),
    [
        ({}, {}, "2.5.0", "12.8", "-cu12.8-"),
        ({}, {}, "2.5.0", "none", "-cunone-"),
        ({}, {}, "2.6.0", "12.6", "-torch2.6.0-"),
        ({}, {"glibc": "2.39"}, "2.5.0", "12.6", "-glibc2.39-"),
        ({"python": "3.12"}, {}, "2.5.0", "12.6", "-cp312-"),
        ({"machine": "x86_64"}, {}, "2.5.0", "12.6", "x86_64-"),
        ({"cxx11_abi": False}, {}, "2.5.0", "12.6", "-cxx98-"),
        ({"sm": "110"}, {}, "2.5.0", "12.6", "-sm110"),
        ({"sm": "cpu"}, {}, "2.5.0", "12.6", "-cpu"),
    ],
)
def test_the_class_follows_everything_that_a_binary_needs(
    row: dict[str, Any], state: dict[str, Any], torch: str, cuda: str, part: str
) -> None:
    found = plan.class_id({**ROW, **row}, orin(**state), torch, cuda)
    assert part in found and found != plan.class_id(ROW, orin(), "2.5.0", "12.6")


def test_the_toolkit_of_the_class_is_the_one_that_is_compiled_with() -> None:
    assert plan.wanted_cuda(ROW, SETTINGS) == "12.6"
    assert plan.wanted_cuda(ROW, {**SETTINGS, "cuda_env_version": "12.8.61"}) == "12.8"


# --- work ---


def library(**changes: Any) -> dict[str, Any]:
    """Return what the survey reports of an extension for Orin."""
    return {
        "machine": "aarch64",
        "needed": ["libc10.so", "libc.so.6"],
        "soname": None,
        "runpath": [],
        "glibc": "2.34",
        "cxx11": None,
        "archs": {"87": {"cubins": 3, "ptx": 0, "bytes": 1000}},
        "fault": None,
        **changes,
    }


WANTED: dict[str, Any] = {
    "files": {"/etc/profile.d/x.sh": "a" * 64},
    "wheels": [
        {"name": "torch", "version": "2.5.0a0+872d972e41.nv24.08.17622132"},
        {"name": "numpy", "version": "1.26.4"},
    ],
    "config": {"constraints.txt": "numpy==1.26.4\n"},
    "components": {
        "causal_conv1d": {"version": "1.6.0", "key": "k1", "minutes": 30, "disk_mb": 500},
        "mamba_ssm": {"version": "2.2.4", "key": "k2", "minutes": 60, "disk_mb": 900},
    },
    "expectations": {
        name: inspection.Expectation("aarch64", "3.10", "2.35", "87", name, version, (module,))
        for name, version, module in (
            ("causal_conv1d", "1.6.0", "causal_conv1d_cuda"),
            ("mamba_ssm", "2.2.4", "selective_scan_cuda"),
        )
    },
    "packages": [],
    "shim": {"shim.pth": "b" * 64},
    "patches": {
        "mamba_ssm": {"mamba_ssm/x.py": {"final": "f" * 64, "pristine": "p" * 64, "known": ["f" * 64, "p" * 64]}}
    },
    "minutes": 5,
    "disk_mb": 6000,
}
PATHS = {"env": "/opt/jetson-mamba/envs/e1", "base_python": "/usr/bin/python3.10"}
DONE: dict[str, Any] = {
    "exists": True,
    "python_runs": True,
    "site_packages": "/opt/jetson-mamba/envs/e1/lib/python3.10/site-packages",
    "packages": {
        "torch": {"version": "2.5.0a0+872d972e41.nv24.8", "damage": None},
        "numpy": {"version": "1.26.4", "damage": None},
        "causal_conv1d": {"version": "1.6.0", "damage": None},
        "mamba_ssm": {"version": "2.2.4", "damage": None},
    },
    "config": {"constraints.txt": "numpy==1.26.4\n"},
    "records": {"causal_conv1d": {"key": "k1"}, "mamba_ssm": {"key": "k2"}},
    "files": {"shim.pth": "b" * 64, "mamba_ssm/x.py": "f" * 64},
    "torch": {"version": "2.5.0a0+872d972e41.nv24.08"},
    "inspection": {
        name: {"name": name, "version": version, "libraries": {f"{module}.so": library()}}
        for name, version, module in (
            ("causal_conv1d", "1.6.0", "causal_conv1d_cuda"),
            ("mamba_ssm", "2.2.4", "selective_scan_cuda"),
        )
    },
}


def provisioned(**changes: Any) -> dict[str, Any]:
    site = copy.deepcopy(DONE)
    for path, value in changes.items():
        target = site
        *parents, last = path.split("|")
        for name in parents:
            target = target[name]
        target[last] = value
    state = orin(files={"/etc/profile.d/x.sh": "a" * 64})
    state["environments"]["venvs"]["e1"] = site
    return state


def work(state: dict[str, Any], wanted: dict[str, Any] | None = None) -> dict[str, str]:
    items = plan.find_work(state, PATHS, "venv", wanted or WANTED)
    return {item["outcome"]: item["reason"] for item in items}


def test_a_bare_device_has_all_the_work_in_order() -> None:
    packages = [{"name": "gcc", "why": "x"}, {"name": "libopenblas0", "why": "y"}]
    found = work(orin(), {**WANTED, "packages": packages})
    assert list(found) == [name for name in plan.OUTCOMES if name != "jetson_platform"]
    assert found["debian_packages"] == "missing: gcc, libopenblas0"
    assert found["torch_jetpack"] == "no environment for this selection"


def test_a_provisioned_device_has_none() -> None:
    assert work(provisioned()) == {}


@pytest.mark.parametrize(
    ("changes", "outcome", "reason"),
    [
        ({"packages|torch|version": "2.4.0"}, "torch_jetpack", "torch 2.4.0 found, 2.5.0a0+872"),
        ({"packages|numpy|damage": "numpy/a.py is missing"}, "torch_jetpack", "numpy is damaged"),
        ({"python_runs": False}, "torch_jetpack", "does not run"),
        ({"config|constraints.txt": "x"}, "torch_jetpack", "constraints.txt is different"),
        ({"packages|causal_conv1d|version": "1.5.0"}, "causal_conv1d", "1.5.0 found, 1.6.0 wanted"),
        ({"packages|causal_conv1d|damage": "x differs"}, "causal_conv1d", "damaged: x differs"),
        ({"records|causal_conv1d": None}, "causal_conv1d", "no record"),
        ({"records|causal_conv1d|key": "old"}, "causal_conv1d", "other inputs"),
        (
            {"inspection|mamba_ssm|libraries": {"selective_scan_cuda.so": library(machine="x86_64")}},
            "mamba_ssm",
            "x86_64",
        ),
        (
            {"inspection|mamba_ssm|libraries": {"selective_scan_cuda.so": library(glibc="2.38")}},
            "mamba_ssm",
            "asks for glibc 2.38, there is 2.35",
        ),
        (
            {
                "inspection|causal_conv1d|libraries": {
                    "causal_conv1d_cuda.so": library(archs={"72": {"cubins": 1, "ptx": 0, "bytes": 9}})
                }
            },
            "causal_conv1d",
            "holds code for sm_72, not for sm_87",
        ),
        ({"inspection|causal_conv1d|libraries": {}}, "causal_conv1d", "holds no extension causal_conv1d_cuda"),
        ({"files|shim.pth": None}, "sitecustomize", "shim.pth is absent"),
        ({"files|mamba_ssm/x.py": "p" * 64}, "source_patches", "mamba_ssm/x.py"),
    ],
)
def test_each_difference_is_named(changes: dict[str, Any], outcome: str, reason: str) -> None:
    found = work(provisioned(**changes))
    assert list(found) == [outcome, *(["source_patches"] if outcome == "mamba_ssm" else [])]
    assert reason in found[outcome]


@pytest.mark.parametrize(
    ("toolkits", "reason"),
    [
        ([], "CUDA 12.6 is not installed"),
        ([{"path": "/usr/local/cuda-12.6", "version": "12.6.68", "nvcc": False}], "/usr/local/cuda-12.6 has no nvcc"),
        ([{"path": "/usr/local/cuda-12.6", "version": "12.6.68", "nvcc": True}], None),
    ],
)
def test_a_toolkit_is_work_only_where_the_run_may_install_it(toolkits: list[Any], reason: str | None) -> None:
    state = provisioned()
    state["cuda"]["toolkits"] = toolkits
    wish = plan.toolkit_wish(ROW, state, {"cuda_env_install": True})
    assert work(state, {**WANTED, "toolkit": wish}).get("cuda_env") == reason
    assert plan.toolkit_wish(ROW, state, {"cuda_env_install": False}) is None


def test_a_file_that_shall_go_is_work() -> None:
    assert "shall not be" in work(provisioned(), {**WANTED, "shim": {"shim.pth": None}})["sitecustomize"]


def foreign(path: str, *work: dict[str, str]) -> list[dict[str, str]]:
    site = {"site_packages": "/site", "foreign": [{"path": path, "found": "aarch64", "expected": "x86_64"}]}
    return plan.find_foreign_problems(site, work, "x86_64")


@pytest.mark.parametrize("name", ["x.so", "torch/lib/libc10.so", "pkg/_x.cpython-311-x86_64-linux-gnu.so"])
def test_a_library_of_another_machine_is_a_problem_unless_it_is_replaced(name: str) -> None:
    (problem,) = foreign(f"/site/{name}")
    assert f"/site/{name} is made for aarch64" in problem["found"]
    assert foreign(f"/site/{name}", {"reason": f"x is damaged: {name} differs"}) == []


def test_libraries_that_a_package_carries_as_data_are_nobodys_fault() -> None:
    assert foreign("/site/debugpy/_vendored/attach_linux_amd64.so") == []


def test_a_lost_system_shim_and_a_stale_launcher_are_work() -> None:
    shim_wish = {**WANTED, "system_shim": {"/usr/local/lib/python3.10/dist-packages/shim.pth": "b" * 64}}
    assert "system Python" in work(provisioned(), shim_wish)["sitecustomize"]
    launcher = {**WANTED, "launcher": {"/opt/jetson-mamba/bin/mamba-python": "c" * 64}}
    assert work(provisioned(), launcher) == {}, "in scope venv that is the activation's"
    state = provisioned()
    state["user_sites"]["/usr/bin/python3.10"] = state["environments"]["venvs"]["e1"]
    items = plan.find_work(state, PATHS, "user", launcher)
    assert [(item["outcome"], item["reason"]) for item in items] == [("torch_jetpack", "mamba-python is absent")]


def test_installing_a_component_costs_no_build() -> None:
    """Minutes and room of a build are the builder's."""
    items = {item["outcome"]: item for item in plan.find_work(orin(), PATHS, "venv", WANTED)}
    assert items["mamba_ssm"]["minutes"] < 1 and items["mamba_ssm"]["disk_mb"] <= 100
    assert items["mamba_ssm"]["what"] == "install"


def test_what_a_builder_needs_comes_before_what_it_builds() -> None:
    place = [plan.OUTCOMES.index(name) for name in plan.FOR_BUILDING]
    assert place == sorted(place) and max(place) < plan.OUTCOMES.index("causal_conv1d")
    assert "mamba_ssm" not in plan.FOR_BUILDING


def test_a_rebuilt_package_is_patched_again() -> None:
    found = work(provisioned(**{"packages|mamba_ssm|version": "2.2.5"}))
    assert list(found) == ["mamba_ssm", "source_patches"]


def test_reinstall_is_work_and_lifts_the_refusal() -> None:
    state = provisioned(**{"files|mamba_ssm/x.py": "0" * 64})
    site = state["environments"]["venvs"]["e1"]
    (problem,) = plan.find_patch_problems(site, WANTED)
    assert "0" * 64 in problem["found"]
    assert "mamba_ssm_reinstall=true" in problem["next"]
    wanted = copy.deepcopy(WANTED)
    wanted["components"]["mamba_ssm"]["reinstall"] = True
    assert plan.find_patch_problems(site, wanted) == []
    assert "mamba_ssm" in work(state, wanted)


def test_a_package_that_is_replaced_anyway_is_not_refused() -> None:
    for change in ({"packages|mamba_ssm|version": "2.2.2"}, {"records|mamba_ssm|key": "old"}):
        site = provisioned(**change, **{"files|mamba_ssm/x.py": "0" * 64})["environments"]["venvs"]["e1"]
        assert plan.find_patch_problems(site, WANTED) == []


def test_known_checksums_are_no_problem() -> None:
    for digest in ("f" * 64, "p" * 64, None):
        site = provisioned(**{"files|mamba_ssm/x.py": digest})["environments"]["venvs"]["e1"]
        assert plan.find_patch_problems(site, WANTED) == []


def test_env_id_follows_every_wish() -> None:
    first = plan.env_id(ROW, "2.5.0+x", {"a": 1})
    assert first.startswith("torch2.5.0-cp310-")
    assert first == plan.env_id(ROW, "2.5.0+x", {"a": 1})
    assert first != plan.env_id(ROW, "2.5.0+x", {"a": 2})
