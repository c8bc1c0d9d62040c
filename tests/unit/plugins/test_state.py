"""The survey, read from made-up device trees."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import yaml
from ansible_collections.jetson.mamba.plugins.module_utils import state
from ansible_collections.jetson.mamba.plugins.modules import device_state

RELEASE = (
    "# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic, EABI: aarch64, "
    "DATE: Thu Sep 18 22:54:44 UTC 2025\n"
)


def put(top: Path, name: str, content: str | bytes) -> None:
    path = top / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RELEASE, "36.4.7"),
        ("# R35 (release), REVISION: 6.0, GCID: 1\n", "35.6.0"),
        ("# R36 (release), REVISION: 3.0", "36.3.0"),
        ("R36 (release), REVISION: 4.7", None),
        ("", None),
        ("# R36 (debug), REVISION: 4.7", None),
    ],
)
def test_parse_release(text: str, expected: str | None) -> None:
    assert state.parse_release(text) == expected


@pytest.mark.parametrize(
    ("version", "expected"),
    [("36.4.7-20250918154033", "36.4.7"), ("36.3.0", "36.3.0"), ("", None), ("garbage", None)],
)
def test_parse_deb_release(version: str, expected: str | None) -> None:
    assert state.parse_deb_release(version) == expected


def test_soc_is_read_from_nul_separated_strings(tmp_path: Path) -> None:
    base = "sys/firmware/devicetree/base/"
    put(tmp_path, base + "model", b"NVIDIA Jetson AGX Orin Developer Kit\0")
    put(tmp_path, base + "compatible", b"nvidia,p3737-0000+p3701-0000\0nvidia,tegra234\0")
    found = state.read_soc(str(tmp_path))
    assert found["model"] == "NVIDIA Jetson AGX Orin Developer Kit"
    assert found["soc"] == "tegra234"
    assert found["compatible"] == ["nvidia,p3737-0000+p3701-0000", "nvidia,tegra234"]


def test_no_device_tree_is_no_error(tmp_path: Path) -> None:
    assert state.read_soc(str(tmp_path)) == {"model": None, "compatible": [], "soc": None}


def test_cuda_versions_and_link(tmp_path: Path) -> None:
    put(tmp_path, "usr/local/cuda-12.6/version.json", json.dumps({"cuda": {"version": "12.6.68"}}))
    put(tmp_path, "usr/local/cuda-11.4/version.txt", "CUDA Version 11.4.19\n")
    put(tmp_path, "usr/local/cuda-12.2/version.json", "{broken")
    (tmp_path / "usr/local/cuda").symlink_to(tmp_path / "usr/local/cuda-12.6")
    found = state.read_cuda(str(tmp_path))
    assert {t["path"]: t["version"] for t in found["toolkits"]} == {
        "/usr/local/cuda-11.4": "11.4.19",
        "/usr/local/cuda-12.2": None,
        "/usr/local/cuda-12.6": "12.6.68",
    }
    assert found["link"] == str(tmp_path / "usr/local/cuda-12.6")
    assert not any(t["nvcc"] for t in found["toolkits"])


def test_dpkg_status_finds_only_the_named_package(tmp_path: Path) -> None:
    put(
        tmp_path,
        "var/lib/dpkg/status",
        "Package: nvidia-l4t-core-extra\nStatus: install ok installed\nVersion: 1\n\n"
        "Package: nvidia-l4t-core\nStatus: install ok installed\nArchitecture: arm64\n"
        "Version: 36.4.7-20250918154033\n\n",
    )
    assert state.read_debs(str(tmp_path), ["nvidia-l4t-core", "absent"]) == {
        "nvidia-l4t-core": {"version": "36.4.7-20250918154033", "status": "install ok installed"}
    }


def test_zram_is_not_counted_as_swap(tmp_path: Path) -> None:
    put(tmp_path, "proc/meminfo", "MemTotal:  8000000 kB\nMemAvailable: 2048000 kB\n")
    put(
        tmp_path,
        "proc/swaps",
        "Filename Type Size Used Priority\n/dev/zram0 partition 1024000 0 5\n/swapfile file 4096000 2048000 -2\n",
    )
    assert state.read_memory(str(tmp_path)) == {
        "total_mb": 7812,
        "available_mb": 2000,
        "swap_free_mb": 2000,
        "zram_free_mb": 1000,
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n", ("2.13.0+cpu", None)),
        ("__version__ = '2.5.0a0+872d972e41.nv24.08'\ncuda = '12.6'\n", ("2.5.0a0+872d972e41.nv24.08", "12.6")),
    ],
)
def test_torch_is_read_without_importing_it(tmp_path: Path, text: str, expected: tuple[str, str | None]) -> None:
    put(tmp_path, "torch/version.py", text)
    put(tmp_path, "torch/share/cmake/Torch/TorchConfig.cmake", 'set(F "-D_GLIBCXX_USE_CXX11_ABI=1")')
    found = state.read_torch(str(tmp_path))
    assert found is not None
    assert (found["version"], found["cuda"]) == expected
    assert found["cxx11_abi"] is True


def test_no_torch_is_none(tmp_path: Path) -> None:
    assert state.read_torch(str(tmp_path)) is None


def test_disk_of_a_folder_that_is_not_there_yet_is_its_parents(tmp_path: Path) -> None:
    found = state.read_disk(str(tmp_path / "a/b/c"))
    assert found["existing"] == str(tmp_path)
    assert not found["exists"]
    assert found["free_mb"] > 0


def test_damaged_record_is_reported_as_none(tmp_path: Path) -> None:
    put(tmp_path, "good.json", '{"key": "1"}')
    put(tmp_path, "bad.json", "{")
    assert state.read_records(str(tmp_path)) == {"good": {"key": "1"}, "bad": None}


def test_collect_gives_json_of_a_bare_device(tmp_path: Path) -> None:
    put(tmp_path, "etc/nv_tegra_release", RELEASE)
    root = str(tmp_path / "opt")
    found = state.collect(root, root + "/build", root + "/tmp", top=str(tmp_path))
    assert json.loads(json.dumps(found)) == found
    assert found["l4t"]["release"] == "36.4.7"
    assert found["environments"] == {"current": None, "venvs": {}}


def test_the_module_takes_what_collect_takes() -> None:
    taken = set(inspect.signature(state.collect).parameters) - {"top"}
    assert taken == set(yaml.safe_load(device_state.DOCUMENTATION)["options"])


def test_user_sites_are_looked_into_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "home/.local/lib/python3.10/site-packages"
    name = "causal_conv1d_cuda.cpython-310-aarch64-linux-gnu.so"
    put(site, name, b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\x3e\x00" + bytes(44))
    facts = {"path": "/usr/bin/python3.10", "version": "3.10.12", "user_site": str(site)}
    monkeypatch.setattr(state, "read_interpreters", lambda _top: [facts])
    wanted = [{"package": "causal_conv1d", "modules": ["causal_conv1d_cuda"]}]
    root = str(tmp_path / "root")
    data = state.collect(root, root, root, scope="user", inspect=wanted, top=str(tmp_path))
    found = data["user_sites"]["/usr/bin/python3.10"]["inspection"]
    assert list(found) == ["causal_conv1d"] and found["causal_conv1d"]["libraries"][name]["machine"] == "x86_64"
    without = state.collect(root, root, root, scope="user", top=str(tmp_path))
    assert without["user_sites"]["/usr/bin/python3.10"]["inspection"] == {}
