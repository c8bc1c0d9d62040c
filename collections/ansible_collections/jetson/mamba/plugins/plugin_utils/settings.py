"""Check what a user has set, on the controller, before any device is touched."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]
ROW_KEYS: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "jetpack": (str,),
    "l4t": (list,),
    "soc": (list,),
    "machine": (str,),
    "python": (str,),
    "cuda": (str,),
    "sm": (str,),
    "cxx11_abi": (bool,),
    "torch": (dict, type(None)),
    "torchvision": (dict, type(None)),
    "torchvision_version": (str,),
    "lock": (str,),
    "disk_mb": (int,),
    "unsupported": (str,),
}
ROW_REQUIRED = ("id", "l4t", "soc")
ROW_REQUIRED_SUPPORTED = ("machine", "python", "cuda", "sm", "lock")
DIGEST = re.compile("[0-9a-f]{64}")
# what pip, shells and constraint files take without quoting
FOLDER = re.compile(r"(/(?!\.\.?(/|$))[A-Za-z0-9._+@-]+)+")
WHEEL_KEYS = ("version", "url", "path", "sha256")


def project_of(variables: Mapping[str, Any]) -> Path:
    """Return the folder of site.yml, roles/ and playbooks/: relative paths of settings count from there.

    Args:
        variables: of a task; in one of our roles they say it, else the playbook's folder does.
    """
    role, playbook = variables.get("role_path"), variables.get("playbook_dir")
    if role:
        return Path(str(role)).parent.parent
    folder = Path(str(playbook)) if playbook else Path.cwd()
    return folder.parent if folder.name == "playbooks" else folder


def in_project(setting: str | None, variables: Mapping[str, Any]) -> str | None:
    """Return a setting's path with what it is relative to, or what stands for no path."""
    return str(project_of(variables) / Path(str(setting)).expanduser()) if setting else setting


def problem(found: str, expected: str, next_step: str, outcome: str = "jetson_platform") -> dict[str, str]:
    """Return one reason that forbids a run, as plain data."""
    return {"outcome": outcome, "found": found, "expected": expected, "next": next_step}


def suggest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean x?" for the nearest known name, else ""."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def read_role_specs(roles: Path) -> dict[str, dict[str, Any]]:
    """Return {role: options of its main entry point} of every role below a folder."""
    specs = {}
    for path in sorted(roles.glob("*/meta/argument_specs.yml")):
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        specs[path.parent.parent.name] = data["argument_specs"]["main"].get("options", {})
    return specs


def find_unknown_variables(
    names: Iterable[str], specs: Mapping[str, Mapping[str, Any]], internal: Iterable[str]
) -> list[dict[str, str]]:
    """Return a problem per variable that has a role's prefix and that no role knows (a typo).

    Args:
        names: all variable names of a host.
        specs: options of every role.
        internal: names that the playbooks themselves set.
    """
    known = {option for options in specs.values() for option in options} | set(internal)
    problems = []
    for name in sorted(name for name in set(names) - known if not name.startswith("__")):
        role = next((role for role in specs if name.startswith(role + "_")), None)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if role is None and not near:
            continue
        problems.append(
            problem(
                f"variable {name}",
                f"a variable that a role knows{suggest(name, known)}",
                f"correct the name where it is set (inventory, group_vars or -e); "
                f"roles/{role or next(r for r in specs if near[0].startswith(r + '_'))}/README.md lists them",
            )
        )
    return problems


def check_values(settings: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return every problem of values that an argument spec can't describe: wheels, checksums, folders."""
    problems = []
    for name in ("torch_jetpack_wheel", "torch_jetpack_torchvision"):
        if settings[name]:
            problems += check_wheel(settings[name], name)
    digest = settings["torch_jetpack_sha256"]
    if digest and not DIGEST.fullmatch(digest):
        problems.append(
            problem(
                f"torch_jetpack_sha256 {digest!r}",
                "64 lower-case hexadecimal digits",
                "copy it from what sha256sum prints",
                "torch_jetpack",
            )
        )
    for name in ("jetson_platform_root", "jetson_platform_build_root", "jetson_platform_tmp_root", "cuda_env_home"):
        value = settings[name]
        if value and not FOLDER.fullmatch(value):
            problems.append(
                problem(
                    f"{name} {value!r}",
                    "an absolute path of letters, digits and . _ + - @, below /",
                    "name a folder on the device such as /opt/jetson-mamba or /ssd/jetson-mamba",
                    "cuda_env" if name == "cuda_env_home" else "jetson_platform",
                )
            )
    return problems


def check_rows(rows: Any, origin: str) -> list[dict[str, str]]:
    """Return every problem of a list of platform rows.

    Args:
        rows: the list, as read from YAML.
        origin: where it comes from, for the message.
    """
    fix = "see CONTRIBUTING.md, 'Add a JetPack release', for a row that is whole"
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return [problem(f"{origin}: {type(rows).__name__}", "a list of rows", fix)]
    problems = []
    for number, row in enumerate(rows, start=1):
        name = f"{origin}, row {number} ({row.get('id', 'without id')})"
        for key in sorted(set(row) - set(ROW_KEYS)):
            problems.append(problem(f"{name}: key {key}", f"one of {', '.join(ROW_KEYS)}{suggest(key, ROW_KEYS)}", fix))
        required = ROW_REQUIRED if row.get("unsupported") else ROW_REQUIRED + ROW_REQUIRED_SUPPORTED
        for key in required:
            if key not in row:
                problems.append(problem(f"{name}: no {key}", f"{key} in every row", fix))
        for key, value in row.items():
            if key in ROW_KEYS and not isinstance(value, ROW_KEYS[key]):
                kinds = " or ".join(kind.__name__ for kind in ROW_KEYS[key])
                problems.append(
                    problem(
                        f"{name}: {key} is {value!r} ({type(value).__name__})",
                        f'{kinds} (a version is quoted: "3.10", not 3.10)',
                        fix,
                    )
                )
        sm = row.get("sm")
        if isinstance(sm, str) and sm != "cpu" and not sm.isdigit():
            problems.append(problem(f"{name}: sm is {sm!r}", 'digits such as "87", or cpu', fix))
        for key in ("torch", "torchvision"):
            if isinstance(row.get(key), dict):
                problems += check_wheel(row[key], f"{name}: {key}")
    return problems


def check_wheel(wheel: Any, name: str) -> list[dict[str, str]]:
    """Return every problem of a wheel's description: {version, url or path, sha256}."""
    fix = 'give version, and url or path, and sha256 (or null), such as {version: "2.5.0", path: /x/torch.whl, …}'
    if not isinstance(wheel, dict):
        return [problem(f"{name} is {wheel!r}", "a wheel's description", fix, "torch_jetpack")]
    problems = []
    for key in sorted(set(wheel) - set(WHEEL_KEYS)):
        problems.append(
            problem(f"{name}: key {key}", f"{', '.join(WHEEL_KEYS)}{suggest(key, WHEEL_KEYS)}", fix, "torch_jetpack")
        )
    if not isinstance(wheel.get("version"), str):
        problems.append(problem(f"{name}: version {wheel.get('version')!r}", "a string", fix, "torch_jetpack"))
    if bool(wheel.get("url")) == bool(wheel.get("path")):
        problems.append(problem(f"{name}: both or none of url and path", "exactly one", fix, "torch_jetpack"))
    digest = wheel.get("sha256")
    if digest is not None and not (isinstance(digest, str) and DIGEST.fullmatch(digest)):
        problems.append(
            problem(f"{name}: sha256 {digest!r}", "64 lower-case hexadecimal digits, or null", fix, "torch_jetpack")
        )
    return problems
