"""Wrong settings end on the controller, with a suggestion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.jetson.mamba.plugins.plugin_utils import settings

ROOT = Path(__file__).parents[3]
GOOD: dict[str, Any] = {
    "id": "mine",
    "l4t": ["36.4.7"],
    "soc": ["tegra234"],
    "machine": "aarch64",
    "python": "3.10",
    "cuda": "12.6",
    "sm": "87",
    "lock": "cp310-linux_aarch64.txt",
    "torch": {"version": "2.5.0", "path": "/x/t.whl", "sha256": "0" * 64},
}


def test_the_shipped_platforms_are_whole() -> None:
    path = ROOT / "collections/ansible_collections/jetson/mamba/plugins/data/platforms.yml"
    rows = yaml.safe_load(path.read_text())["platforms"]
    assert settings.check_rows(rows, "platforms.yml") == []
    locks = {row["lock"] for row in rows if "lock" in row}
    assert all((path.parent / "locks" / name).is_file() for name in locks)


def test_a_whole_row_has_no_problem() -> None:
    assert settings.check_rows([GOOD], "jetson_platform_rows") == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"python": 3.10}, "python is 3.1 (float)"),
        ({"sm": 87}, "sm is 87 (int)"),
        ({"sm": "sm_87"}, "sm is 'sm_87'"),
        ({"cuuda": "12.6"}, "key cuuda"),
        ({"l4t": "36.4.7"}, "l4t is '36.4.7' (str)"),
        ({"torch": {"version": "2", "path": "/x", "sha256": "XYZ"}}, "sha256 'XYZ'"),
        ({"torch": {"version": "2", "path": "/x", "url": "y", "sha256": None}}, "both or none"),
        ({"torch": {"path": "/x", "sha256": None}}, "version None"),
    ],
)
def test_wrong_rows(change: dict[str, Any], found: str) -> None:
    problems = settings.check_rows([{**GOOD, **change}], "jetson_platform_rows")
    assert any(found in problem["found"] for problem in problems), problems
    assert all(problem["expected"] and problem["next"] for problem in problems)


@pytest.mark.parametrize("key", ["id", "l4t", "soc", "machine", "python", "cuda", "sm", "lock"])
def test_missing_keys(key: str) -> None:
    row = {name: value for name, value in GOOD.items() if name != key}
    assert any(f"no {key}" in problem["found"] for problem in settings.check_rows([row], "rows"))


def test_rows_must_be_a_list() -> None:
    assert settings.check_rows({"id": "x"}, "rows")[0]["expected"] == "a list of rows"


DEFAULTS: dict[str, Any] = {
    "torch_jetpack_wheel": {},
    "torch_jetpack_torchvision": {},
    "torch_jetpack_sha256": "",
    "jetson_platform_root": "/opt/jetson-mamba",
    "jetson_platform_build_root": "",
    "jetson_platform_tmp_root": "",
    "cuda_env_home": "",
}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, None),
        ({"jetson_platform_root": "/ssd/mamba-1.0"}, None),
        ({"jetson_platform_root": "~/mamba"}, "'~/mamba'"),
        ({"jetson_platform_root": "relative/x"}, "'relative/x'"),
        ({"jetson_platform_root": "/"}, "'/'"),
        ({"jetson_platform_tmp_root": "/with blank"}, "'/with blank'"),
        ({"jetson_platform_build_root": "/a/../b"}, "'/a/../b'"),
        ({"cuda_env_home": "/usr/local/cuda;x"}, "cuda_env_home"),
        ({"torch_jetpack_sha256": "abc"}, "'abc'"),
        ({"torch_jetpack_wheel": {"version": "2.8.0"}}, "torch_jetpack_wheel: both or none of url and path"),
    ],
)
def test_values(change: dict[str, Any], found: str | None) -> None:
    problems = settings.check_values({**DEFAULTS, **change})
    assert [found in problem["found"] for problem in problems if found] == ([True] if found else []), problems
    assert bool(problems) == bool(found)


SPECS = {"mamba_ssm": {"mamba_ssm_version": {}}, "cuda_env": {"cuda_env_home": {}}}


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("mamba_ssm_verison", "mamba_ssm_version"), ("mamba_smm_version", "mamba_ssm_version"), ("cuda_env_hom", "home")],
)
def test_a_typo_is_named_with_a_suggestion(name: str, suggestion: str) -> None:
    (problem,) = settings.find_unknown_variables([name, "mamba_ssm_version"], SPECS, [])
    assert name in problem["found"]
    assert suggestion in problem["expected"]


def test_other_peoples_variables_are_left_alone() -> None:
    names = [
        "ansible_host",
        "__jetson_platform_planned",
        "site_dns",
        "my_app_version",
        "cuda_env_home",
        "mamba_ssm_internal",
    ]
    assert settings.find_unknown_variables(names, SPECS, ["mamba_ssm_internal"]) == []


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"role_path": "/p/roles/mamba_ssm", "playbook_dir": "/elsewhere"}, "/p"),
        ({"playbook_dir": "/p/playbooks"}, "/p"),
        ({"playbook_dir": "/p"}, "/p"),
        ({}, None),
    ],
)
def test_relative_paths_count_from_the_project(variables: dict[str, str], expected: str | None) -> None:
    root = expected or str(Path.cwd())
    assert settings.in_project("a/b", variables) == f"{root}/a/b"
    assert settings.in_project("/a/b", variables) == "/a/b"
    assert settings.in_project("~/b", variables) == str(Path("~/b").expanduser())
    assert (settings.in_project("", variables), settings.in_project(None, variables)) == ("", None)
