"""Every role is described by its own files, and they agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.jetson.mamba.plugins.module_utils import plan

ROOT = Path(__file__).resolve().parents[2]
ROLES = sorted(path for path in (ROOT / "roles").iterdir() if (path / "tasks" / "main.yml").exists())
OUTCOMES = {
    *("jetson_platform", "cuda_env", "torch_jetpack", "causal_conv1d", "mamba_ssm", "sitecustomize"),
    *("source_patches", "kernel_smoke_tests", "debian_packages", "wheelhouse"),
}
by_role = pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def options(role: Path) -> dict[str, Any]:
    """Return the options of a role's main entry point."""
    spec: dict[str, Any] = load(role / "meta" / "argument_specs.yml")["argument_specs"]["main"]
    return spec.get("options") or {}


def disagreements(defaults: dict[str, Any], spec: dict[str, Any]) -> list[str]:
    """Return what differs between defaults/main.yml and argument_specs.yml."""
    found = [f"{name} is only in defaults" for name in sorted(set(defaults) - set(spec))]
    found += [f"{name} is only in argument_specs" for name in sorted(set(spec) - set(defaults))]
    for name in sorted(set(defaults) & set(spec)):
        # A default of null and no default are the same thing to a spec.
        if defaults[name] != spec[name].get("default"):
            found.append(f"{name}: {defaults[name]!r} in defaults, {spec[name].get('default')!r} in argument_specs")
    return found


def test_all_outcomes_have_a_role() -> None:
    assert {role.name for role in ROLES} >= OUTCOMES


def test_no_folder_of_roles_is_half_a_role() -> None:
    assert {path for path in (ROOT / "roles").iterdir() if path.is_dir()} == set(ROLES)


@by_role
def test_defaults_equal_the_argument_spec(role: Path) -> None:
    assert not disagreements(load(role / "defaults" / "main.yml") or {}, options(role))


@by_role
def test_every_option_is_described_and_typed(role: Path) -> None:
    bare = [name for name, option in options(role).items() if not option.get("description") or not option.get("type")]
    assert not bare


def test_each_outcome_of_a_plan_is_a_role() -> None:
    """playbooks/tasks/install.yml enters a role by the name of the outcome, in the order of the plan."""
    assert set(plan.OUTCOMES) <= {role.name for role in ROLES}
    tasks = load(ROOT / "playbooks" / "tasks" / "install.yml")
    entered = [task["ansible.builtin.include_role"]["name"] for task in tasks]
    assert entered == [name for name in plan.OUTCOMES if name != "jetson_platform"]
    assert [task["when"] for task in tasks] == [f"'{name}' in jetson_platform_plan.outcomes" for name in entered]


def test_a_builder_gets_what_building_needs_in_the_order_of_the_plan() -> None:
    """Beside the wheels: what plan.FOR_BUILDING names is what a host that only builds has work for."""
    tasks = load(ROOT / "playbooks" / "tasks" / "build_here.yml")
    entered = [task["ansible.builtin.include_role"]["name"] for task in tasks]
    assert entered == [*plan.FOR_BUILDING, "wheelhouse"]


@by_role
def test_public_variables_carry_the_roles_name(role: Path) -> None:
    assert not [name for name in options(role) if not name.startswith(role.name + "_")]


@by_role
def test_meta_is_whole(role: Path) -> None:
    info = load(role / "meta" / "main.yml")["galaxy_info"]
    assert info["license"] == "Apache-2.0"
    assert info["min_ansible_version"] == "2.17"
    assert info["author"]
    assert info["description"]
    assert {release for platform in info["platforms"] for release in platform["versions"]} == {"jammy", "noble"}


@by_role
def test_readme_names_every_variable(role: Path) -> None:
    readme = (role / "README.md").read_text(encoding="utf-8")
    assert not [name for name in options(role) if name not in readme]


@by_role
def test_readme_names_no_variable_that_is_gone(role: Path) -> None:
    readme = (role / "README.md").read_text(encoding="utf-8")
    # The first cell of a table row is a variable; elsewhere a README may well speak of other things.
    named = set(re.findall(rf"^\|\s*`({role.name}_\w+)`", readme, re.MULTILINE))
    assert named <= set(options(role))


@pytest.mark.parametrize(
    ("defaults", "spec", "expected"),
    [
        ({"a": 1}, {"a": {"default": 1}}, []),
        ({"a": None}, {"a": {}}, []),
        ({"a": 1}, {}, ["a is only in defaults"]),
        ({}, {"a": {}}, ["a is only in argument_specs"]),
        ({"a": 1}, {"a": {"default": 2}}, ["a: 1 in defaults, 2 in argument_specs"]),
    ],
)
def test_a_disagreement_is_seen(defaults: dict[str, Any], spec: dict[str, Any], expected: list[str]) -> None:
    assert disagreements(defaults, spec) == expected
