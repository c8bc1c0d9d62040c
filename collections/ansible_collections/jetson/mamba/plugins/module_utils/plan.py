"""Decide, from what is there and what is wanted, what forbids a run and what there is to do. Pure functions."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from ansible_collections.jetson.mamba.plugins.module_utils import inspection, swap
from ansible_collections.jetson.mamba.plugins.module_utils.cuda_env import sshd_problem
from ansible_collections.jetson.mamba.plugins.module_utils.records import canonical_name
from ansible_collections.jetson.mamba.plugins.module_utils.versions import same_version

SCHEMA = 1
# a device whose clock is before this (a Jetson without RTC battery starts in 1970) makes zip files and TLS fail
OLDEST_CLOCK = 1704067200  # 2024-01-01 UTC
# pip unpacks beside the downloaded wheel, so an environment needs its own size and a bit at once
MEMORY_FOR_INSTALL_MB = 700
# an estimate of NVIDIA's toolkit packages, unpacked
TOOLKIT_MB = 6000
# estimates of a compiler with its headers, and of an installed component for one GPU
PACKAGES_MB = 400
COMPONENT_MINUTES = 0.2
COMPONENT_MB = 100
# the order in which outcomes are realised
OUTCOMES = (
    "jetson_platform",
    "debian_packages",
    "cuda_env",
    "torch_jetpack",
    "causal_conv1d",
    "mamba_ssm",
    "sitecustomize",
    "source_patches",
)
# what a host needs of these to build for others
FOR_BUILDING = ("debian_packages", "cuda_env", "torch_jetpack")
# import packages that this project installs and whose every library must be for this machine
OURS = ("torch", "torchvision", "torch.libs", "torchvision.libs", "numpy", "triton", "causal_conv1d", "mamba_ssm")
Row = Dict[str, Any]


def problem(outcome: str, found: str, expected: str, next_step: str) -> Dict[str, str]:
    """Return one reason that forbids a run, as plain data."""
    return {"outcome": outcome, "found": found, "expected": expected, "next": next_step}


class Match(NamedTuple):
    """A platform row that fits a device, or the problem that none does."""

    row: Optional[Row]
    problem: Optional[Dict[str, str]]


def describe_rows(rows: Sequence[Row]) -> str:
    """Return the known platforms in one line."""
    return "; ".join(
        "{} (L4T {} on {})".format(row["id"], ", ".join(row["l4t"]), "/".join(row["soc"]))
        for row in rows
        if not row.get("unsupported")
    )


def match_platform(state: Dict[str, Any], rows: Sequence[Row]) -> Match:
    """Return the first row whose L4T patterns, SoC list and machine fit the device.

    A row that fits all but the machine, or that says `unsupported`, gives a problem.
    """
    release, soc = state["l4t"]["release"], state["soc"]["soc"]
    if not release and not any("none" in row["l4t"] for row in rows):
        return Match(
            None,
            problem(
                "jetson_platform",
                "no L4T release: /etc/nv_tegra_release is absent or unreadable (first line: {!r}) and the package "
                "nvidia-l4t-core is not installed".format(state["l4t"]["text"]),
                "a flashed Jetson, or a row in jetson_platform_rows with l4t: [none] for another machine",
                "check that this host is a Jetson; if its release file was damaged, reinstall nvidia-l4t-core",
            ),
        )
    wrong_machine: Optional[Row] = None
    for row in rows:
        if not any(fnmatch.fnmatchcase(release or "none", str(pattern)) for pattern in row["l4t"]):
            continue
        if "any" not in row["soc"] and soc not in row["soc"]:
            continue
        if row.get("unsupported"):
            return Match(
                None,
                problem(
                    "jetson_platform",
                    "L4T {} (JetPack {})".format(release, row.get("jetpack")),
                    "one of: " + describe_rows(rows),
                    row["unsupported"],
                ),
            )
        if row["machine"] != state["machine"]:
            wrong_machine = wrong_machine or row
            continue
        return Match(row, None)
    if wrong_machine:
        return Match(
            None,
            problem(
                "jetson_platform",
                "machine {} with L4T {}".format(state["machine"], release),
                "machine {}, as platform row {} says".format(wrong_machine["machine"], wrong_machine["id"]),
                "correct the row's machine, or take this host out of the inventory",
            ),
        )
    return Match(
        None,
        problem(
            "jetson_platform",
            "L4T {} on {} ({})".format(release, soc or "an unknown SoC", state["soc"]["model"]),
            "one of: " + describe_rows(rows),
            "flash a supported JetPack, or describe this one as a row in jetson_platform_rows (CONTRIBUTING.md)",
        ),
    )


def class_id(row: Row, state: Dict[str, Any], torch_version: str, cuda: str) -> str:
    """Return the platform class: everything that a binary needs of this host, and no more.

    The L4T release is not part of it: an apt upgrade compiles nothing.

    Args:
        row: the platform row.
        state: the survey.
        torch_version: as pip spells it.
        cuda: major.minor of the toolkit that is compiled with, or "none".
    """
    sm = str(row["sm"])
    return "-".join(
        [
            row["machine"],
            "glibc{}".format(state["glibc"]),
            f"cu{cuda}",
            "cp{}".format(str(row["python"]).replace(".", "")),
            f"torch{torch_version}",
            "cxx11" if row.get("cxx11_abi", True) else "cxx98",
            sm if sm == "cpu" else f"sm{sm}",
        ]
    )


def env_id(row: Row, torch_version: str, wanted: Any) -> str:
    """Return the name of the environment's folder: readable, and a digest of everything wanted inside."""
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode("utf-8")).hexdigest()[:10]
    return "torch{}-cp{}-{}".format(torch_version.split("+")[0], str(row["python"]).replace(".", ""), digest)


def find_interpreter(state: Dict[str, Any], version: str) -> Optional[Dict[str, Any]]:
    """Return the surveyed interpreter of a version such as "3.10", or None."""
    for facts in state["interpreters"]:
        if facts["version"].split(".")[:2] == version.split("."):
            return dict(facts)
    return None


def make_paths(row: Row, state: Dict[str, Any], settings: Dict[str, Any], env_name: str) -> Dict[str, Any]:
    """Return the folders of this host (see docs/architecture.md); None for an interpreter that is absent."""
    root = settings["jetson_platform_root"]
    python = find_interpreter(state, str(row["python"])) or {}
    paths = {
        "root": root,
        "build": settings["jetson_platform_build_root"] or os.path.join(root, "build"),
        "tmp": settings["jetson_platform_tmp_root"] or os.path.join(root, "tmp"),
        "base_python": python.get("path"),
        "cuda_home": settings.get("cuda_env_home") or find_cuda_home(wanted_cuda(row, settings), state),
    }
    if settings["jetson_platform_scope"] == "user":
        paths.update(
            env=python.get("user_base"),
            python=python.get("path"),
            site_packages=python.get("user_site"),
            state=os.path.join(root, "state", "user"),
        )
    else:
        env = os.path.join(root, "envs", env_name)
        paths.update(
            env=env,
            python=os.path.join(env, "bin", "python"),
            site_packages=os.path.join(env, "lib", "python{}".format(row["python"]), "site-packages"),
            state=os.path.join(root, "state", env_name),
        )
    return paths


def find_cuda_home(version: str, state: Dict[str, Any]) -> str:
    """Return the folder of the toolkit of a version (major.minor): a surveyed one, else where apt would put it."""
    for toolkit in state["cuda"]["toolkits"]:
        if short_cuda(toolkit["version"]) == version:
            return str(toolkit["path"])
    return f"/usr/local/cuda-{version}"


def short_cuda(version: Optional[str]) -> Optional[str]:
    """Return major.minor of a full CUDA version ("12.6.68" -> "12.6")."""
    return ".".join(version.split(".")[:2]) if version else None


def find_problems(
    row: Row, state: Dict[str, Any], settings: Dict[str, Any], needs: Dict[str, Any], work: Sequence[Dict[str, Any]]
) -> List[Dict[str, str]]:
    """Return everything on the device that forbids a run, all at once.

    What only a builder needs is no problem here; builder_problems() has that.

    Args:
        row: the platform row.
        state: the survey.
        settings: effective variables of all roles.
        needs: {disk_mb: {root, user, tmp}}.
        work: what there is to do; disk and memory are only asked for where there is work.
    """
    outcomes = {item["outcome"] for item in work}
    return (
        _python_problems(row, state, settings)
        + _cuda_problems(row, state, settings)
        + _sshd_problems(state, settings, "cuda_env" in outcomes)
        + _disk_problems(state, needs["disk_mb"], bool(outcomes))
        + _memory_problems(state, MEMORY_FOR_INSTALL_MB if outcomes else 0, "torch_jetpack")
        + _clock_problems(state)
    )


def builder_problems(
    row: Row, state: Dict[str, Any], settings: Dict[str, Any], needs: Dict[str, Any], component: str
) -> List[Dict[str, str]]:
    """Return everything that keeps a host from building a component for its class, all at once.

    Memory that lacks is made up for by swap on the disk of the builds, where wheelhouse_swap_mb lets it.

    Args:
        row: the platform row.
        state: the survey.
        settings: effective variables of all roles.
        needs: {disk_mb: {root, user, tmp, build}, memory_mb} of the build, the environment that it needs included.
        component: such as mamba_ssm.
    """
    memory, size = needs["memory_mb"], settings["wheelhouse_swap_mb"]
    free = swap.Memory(state["memory"]["available_mb"], state["memory"]["swap_free_mb"])
    more = swap.wanted_size(size, memory, free)
    disk = dict(needs["disk_mb"], build=needs["disk_mb"].get("build", 0) + more)
    problems = _disk_problems(state, disk, True)
    problems += [
        dict(item, next="{}, or let the run make swap for the build: wheelhouse_swap_mb: -1".format(item["next"]))
        for item in _memory_problems(state, memory - more, component)
    ]
    toolkit = find_toolkit(row, state, settings)
    comes = settings.get("cuda_env_install") and settings.get("cuda_env_state") != "absent"
    if str(row["sm"]) != "cpu" and not comes and not (toolkit and toolkit["nvcc"]):
        wanted = wanted_cuda(row, settings)
        problems.append(
            problem(
                "cuda_env",
                "no bin/nvcc in {}".format(toolkit["path"]) if toolkit else f"no CUDA {wanted} toolkit",
                "the CUDA compiler",
                "install it: sudo apt-get install cuda-nvcc-{}, or let the run do it: -e cuda_env_install=true".format(
                    wanted.replace(".", "-")
                ),
            )
        )
    return [dict(item, outcome=component) for item in problems]


def _python_problems(row: Row, state: Dict[str, Any], settings: Dict[str, Any]) -> List[Dict[str, str]]:
    version = str(row["python"])
    python = find_interpreter(state, version)
    if python is None:
        found = ", ".join(facts["version"] for facts in state["interpreters"]) or "no python3 at all"
        return [
            problem(
                "torch_jetpack",
                f"Python {found}",
                "Python {}, for which the platform's torch ({}) is made".format(version, row["id"]),
                f"install it: sudo apt-get install python{version}",
            )
        ]
    problems = []
    if settings["jetson_platform_scope"] == "user" and python["externally_managed"]:
        problems.append(
            problem(
                "torch_jetpack",
                "an EXTERNALLY-MANAGED marker in Python {}".format(python["version"]),
                "a Python whose user site pip may write to (jetson_platform_scope is user)",
                "use the default jetson_platform_scope: venv",
            )
        )
    return problems


def find_packages(row: Row, state: Dict[str, Any], libraries: Dict[str, str]) -> Dict[str, List[Dict[str, str]]]:
    """Return the Debian packages that a device lacks, {name, why} each.

    Args:
        row: the platform row.
        state: the survey.
        libraries: {soname: package} of what the wheels at hand are linked with.

    Returns:
        {run: what running Mamba needs, build: what only a builder needs besides}.
    """
    version = str(row["python"])
    python = find_interpreter(state, version)
    run: List[Dict[str, str]] = []
    build: List[Dict[str, str]] = []

    def need(where: List[Dict[str, str]], name: str, why: str) -> None:
        if name not in [item["name"] for item in where]:
            where.append({"name": name, "why": why})

    if not state["tools"].get("gcc"):
        need(run, "gcc", "Triton compiles its launchers at run time")
    if python is not None and not python["headers"]:
        need(run, f"python{version}-dev", "Python.h, which Triton's launchers and extensions are compiled with")
    if not state["tools"].get("patch"):
        need(run, "patch", "it applies the source patches")
    for soname, package in sorted(libraries.items()):
        if soname not in state["libraries"]:
            need(run, package, f"{soname}, which the torch wheel is linked with")
    if not state["tools"].get("g++"):
        need(build, "g++", "extensions are compiled with it")
    return {"run": run, "build": build}


def package_problems(packages: Sequence[Dict[str, str]], outcome: str) -> List[Dict[str, str]]:
    """Return the one problem that packages are missing and that this project shall not install them."""
    if not packages:
        return []
    names = " ".join(item["name"] for item in packages)
    return [
        problem(
            outcome,
            "missing: " + "; ".join("{} ({})".format(item["name"], item["why"]) for item in packages),
            "these Debian packages (debian_packages_source is none)",
            f"install them: sudo apt-get install {names}, or let the run do it: -e debian_packages_source=controller",
        )
    ]


def find_toolkit(row: Row, state: Dict[str, Any], settings: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """Return the surveyed toolkit of the wanted version, at cuda_env_home where that is set, or None."""
    wanted, home = wanted_cuda(row, settings), settings.get("cuda_env_home")
    for toolkit in state["cuda"]["toolkits"]:
        if short_cuda(toolkit["version"]) == wanted and home in ("", None, toolkit["path"]):
            return dict(toolkit)
    return None


def wanted_cuda(row: Row, settings: Dict[str, Any]) -> str:
    """Return major.minor of the CUDA toolkit that is wanted: the user's setting, else the row's."""
    return short_cuda(settings.get("cuda_env_version")) or str(row["cuda"])


def _cuda_problems(row: Row, state: Dict[str, Any], settings: Dict[str, Any]) -> List[Dict[str, str]]:
    wanted = wanted_cuda(row, settings)
    if wanted == "none" or settings.get("cuda_env_install") or settings.get("cuda_env_state") == "absent":
        return []
    found = find_toolkit(row, state, settings)
    dashed = wanted.replace(".", "-")
    if found is None:
        described = ", ".join("{} ({})".format(t["version"], t["path"]) for t in state["cuda"]["toolkits"])
        home = settings.get("cuda_env_home")
        return [
            problem(
                "cuda_env",
                "CUDA toolkit: {}".format(
                    described or "none under /usr/local{}".format(" or at " + home if home else "")
                ),
                "CUDA {}{}, as platform {} has".format(wanted, f" at {home}" if home else "", row["id"]),
                f"install it: sudo apt-get install cuda-toolkit-{dashed}, or let the run do it: "
                "-e cuda_env_install=true; if it is elsewhere, name its folder: cuda_env_home",
            )
        ]
    return []


def _sshd_problems(state: Dict[str, Any], settings: Dict[str, Any], has_work: bool) -> List[Dict[str, str]]:
    if not has_work or not settings.get("cuda_env_ssh") or settings.get("cuda_env_state") == "absent":
        return []
    found = sshd_problem(state["sshd"])
    return [dict(found, outcome="cuda_env")] if found else []


def _disk_problems(state: Dict[str, Any], needs_mb: Dict[str, int], has_work: bool) -> List[Dict[str, str]]:
    """Return a problem per file system that is read-only or too small, and per folder of somebody else's.

    Folders on one file system share its room, so what they need is added up.
    """
    problems = []
    shared: Dict[Any, List[str]] = {}
    for name, disk in state["disk"].items():
        # where nothing is put, nobody cares
        if name not in needs_mb or (name == "user" and not needs_mb["user"]):
            continue
        setting = "jetson_platform_{}root".format("" if name in ("root", "user") else name + "_")
        if disk["read_only"]:
            problems.append(
                problem(
                    "torch_jetpack",
                    "{} is on a read-only file system".format(disk["existing"]),
                    "a file system that can be written to",
                    "remount it read-write (look into dmesg first: it may have been remounted after errors), "
                    f"or set {setting}",
                )
            )
            continue
        if has_work and disk["exists"] and not disk["writable"]:
            problems.append(
                problem(
                    "torch_jetpack",
                    "{} belongs to another user".format(disk["path"]),
                    "a folder that {} may write to".format(state["user"]["name"]),
                    "name a folder below it, which the run makes ({}: {}/jetson-mamba), or give it away: "
                    "sudo chown {} {}".format(setting, disk["path"], state["user"]["name"], disk["path"]),
                )
            )
        shared.setdefault(disk["device"], []).append(name)
    for names in shared.values():
        wanted = sum(needs_mb.get(name, 0) for name in names)
        disk = state["disk"][names[0]]
        if has_work and disk["free_mb"] < wanted:
            problems.append(
                problem(
                    "torch_jetpack",
                    "{} MB free at {}".format(disk["free_mb"], disk["existing"]),
                    "{} MB for what this run puts there ({})".format(
                        wanted, ", ".join(f"{name} {needs_mb.get(name, 0)}" for name in names)
                    ),
                    "free space there, or name a larger disk (NVMe): jetson_platform_root, jetson_platform_build_root, "
                    "jetson_platform_tmp_root",
                )
            )
    return problems


def _memory_problems(state: Dict[str, Any], wanted: int, outcome: str) -> List[Dict[str, str]]:
    memory = state["memory"]
    # zram is memory that is counted already
    available = memory["available_mb"] + memory["swap_free_mb"]
    if available >= wanted:
        return []
    return [
        problem(
            outcome,
            "{} MB of memory available ({} MB of it swap on disk)".format(available, memory["swap_free_mb"]),
            f"{wanted} MB for what this run does",
            "stop what uses the memory (a desktop session takes about 1 GB), or add a swap file on NVMe",
        )
    ]


def _clock_problems(state: Dict[str, Any]) -> List[Dict[str, str]]:
    if state["clock"] >= OLDEST_CLOCK:
        return []
    return [
        problem(
            "jetson_platform",
            "the clock stands {} days after 1970-01-01".format(state["clock"] // 86400),
            "a clock that is right",
            "set it: sudo timedatectl set-ntp true, or sudo date -s …; a Jetson without RTC battery forgets it",
        )
    ]


def surveyed_site(state: Dict[str, Any], paths: Dict[str, Any], scope: str) -> Optional[Dict[str, Any]]:
    """Return the survey of the site folder that `paths` names, or None where it is absent."""
    if scope == "user":
        return state["user_sites"].get(paths["base_python"])
    return state["environments"]["venvs"].get(os.path.basename(paths["env"]))


def active_paths(paths: Dict[str, Any], environments: Dict[str, Any]) -> Dict[str, Any]:
    """Return the paths of the active environment instead, for a device that holds another one than is wanted here."""
    name = os.path.basename(environments["current"] or "")
    site = environments["venvs"].get(name)
    if not site or not site["exists"]:
        return paths
    env = os.path.join(paths["root"], "envs", name)
    return dict(
        paths,
        env=env,
        python=os.path.join(env, "bin", "python"),
        site_packages=site["site_packages"],
        state=os.path.join(paths["root"], "state", name),
    )


def find_work(state: Dict[str, Any], paths: Dict[str, Any], scope: str, wanted: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Return the outcomes that have work, in the order of the run, each with its reason.

    Args:
        state: the survey.
        paths: this host's folders.
        scope: venv or user.
        wanted: {files: {path: sha256}, wheels: [{name, version}], config: {name: text},
            toolkit: why one must be installed, or None,
            packages: [{name, why}] to be installed,
            components: {name: {version, key, reinstall}}, expectations: {name: what its binaries must be},
            shim and system_shim: {path: sha256 or None}, launcher: {path: sha256},
            patches: {package: {path: {final, pristine, known}}}, minutes, disk_mb}.
    """
    site = surveyed_site(state, paths, scope)
    work: List[Dict[str, Any]] = []

    def add(outcome: str, reason: Optional[str], what: str, minutes: float = 0, disk_mb: int = 0) -> None:
        if reason:
            work.append({"outcome": outcome, "what": what, "reason": reason, "minutes": minutes, "disk_mb": disk_mb})

    packages = [item["name"] for item in wanted.get("packages", [])]
    add("debian_packages", "missing: " + ", ".join(packages) if packages else None, "install", 1, PACKAGES_MB)
    add("cuda_env", wanted.get("toolkit"), "install", 10, TOOLKIT_MB)
    if not wanted.get("toolkit"):
        add("cuda_env", _file_reason(state["files"], wanted["files"]), "configure")
    add(
        "torch_jetpack",
        _environment_reason(state, site, paths, scope, wanted),
        "install",
        wanted["minutes"],
        wanted["disk_mb"],
    )
    for name, component in wanted["components"].items():
        reason = _component_reason(site, name, component, wanted["expectations"][name])
        add(name, reason, "install", COMPONENT_MINUTES, COMPONENT_MB)
    rebuilt = {item["outcome"] for item in work}
    shim_files = site["files"] if site else {}
    shim_reason = _file_reason(shim_files, wanted["shim"])
    system_reason = _file_reason(state["files"], wanted.get("system_shim", {}))
    add("sitecustomize", shim_reason or (f"system Python: {system_reason}" if system_reason else None), "configure")
    for package, targets in wanted["patches"].items():
        reason = _patch_reason(site, targets)
        if reason is None and package in rebuilt and targets:
            reason = f"{package} is installed anew"
        add("source_patches", reason, "patch")
    return work


def toolkit_wish(row: Row, state: Dict[str, Any], settings: Dict[str, Any]) -> Optional[str]:
    """Return why the run has to install a CUDA toolkit, where the user lets it; else None."""
    wanted = wanted_cuda(row, settings)
    if not settings.get("cuda_env_install") or settings.get("cuda_env_state") == "absent" or wanted == "none":
        return None
    found = find_toolkit(row, state, settings)
    if found is None:
        return f"CUDA {wanted} is not installed"
    if str(row["sm"]) != "cpu" and not found["nvcc"]:
        return "{} has no nvcc".format(found["path"])
    return None


def _file_reason(found: Dict[str, Optional[str]], wanted: Dict[str, Optional[str]]) -> Optional[str]:
    for path, digest in wanted.items():
        if found.get(path) != digest:
            name = os.path.basename(path)
            if digest is None:
                return f"{name} is there and shall not be"
            return "{} is {}".format(name, "absent" if found.get(path) is None else "different")
    return None


def _environment_reason(
    state: Dict[str, Any], site: Optional[Dict[str, Any]], paths: Dict[str, Any], scope: str, wanted: Dict[str, Any]
) -> Optional[str]:
    if not site or not site["exists"]:
        others = sorted(
            data["torch"]["version"] for data in state["environments"]["venvs"].values() if data.get("torch")
        )
        had = " (found: torch {} in another environment)".format(", ".join(others)) if others else ""
        return f"no environment for this selection{had}"
    if not site["python_runs"]:
        return "the environment's interpreter does not run"
    for wheel in wanted["wheels"]:
        installed = site["packages"].get(canonical_name(wheel["name"]))
        if not installed:
            return "{} is not installed".format(wheel["name"])
        if not same_version(installed["version"] or "", wheel["version"]):
            return "{} {} found, {} wanted".format(wheel["name"], installed["version"], wheel["version"])
        if installed["damage"]:
            return "{} is damaged: {}".format(wheel["name"], installed["damage"])
    # in scope venv the launcher changes with the activation
    launcher = _file_reason(state["files"], wanted.get("launcher", {})) if scope == "user" else None
    if launcher:
        return launcher
    for name, text in wanted["config"].items():
        if site["config"].get(name) != text:
            return "{} is {}".format(name, "different" if site["config"].get(name) else "absent")
    return None


def _component_reason(
    site: Optional[Dict[str, Any]], name: str, component: Dict[str, Any], expectation: inspection.Expectation
) -> Optional[str]:
    installed = (site or {}).get("packages", {}).get(name)
    if not site or not installed:
        return "{} {} is not installed".format(name, component["version"])
    if component.get("reinstall"):
        return f"{name}_reinstall is set"
    if not same_version(installed["version"] or "", component["version"]):
        return "{} {} found, {} wanted".format(name, installed["version"], component["version"])
    if installed["damage"]:
        return "{} is damaged: {}".format(name, installed["damage"])
    wrong = inspection.judge_installed((site.get("inspection") or {}).get(name) or {}, expectation)
    if wrong:
        return wrong
    record = (site["records"] or {}).get(name)
    if not record:
        return f"there is no record of how {name} was built"
    if record.get("key") != component["key"]:
        return "{} was built from other inputs (key {}, wanted {})".format(name, record.get("key"), component["key"])
    return None


def _patch_reason(site: Optional[Dict[str, Any]], targets: Dict[str, Dict[str, Any]]) -> Optional[str]:
    pending = [name for name, hashes in targets.items() if not site or site["files"].get(name) != hashes["final"]]
    if not site or not any(site["files"].get(name) for name in targets):
        pending = [name for name in pending if targets[name]["final"] != targets[name]["pristine"]]
    if not pending:
        return None
    back = all(targets[name]["final"] == targets[name]["pristine"] for name in pending)
    return "{} file(s) to {}: {}".format(len(pending), "restore" if back else "patch", ", ".join(sorted(pending)))


def find_patch_problems(site: Optional[Dict[str, Any]], wanted: Dict[str, Any]) -> List[Dict[str, str]]:
    """Return a problem per installed patch target whose checksum is neither pristine nor patched.

    A package that is replaced anyway, by another version or another build, is none.
    """
    problems = []
    for package, targets in wanted["patches"].items():
        component = wanted["components"].get(package, {})
        installed = ((site or {}).get("packages") or {}).get(package)
        record = ((site or {}).get("records") or {}).get(package) or {}
        if not site or not installed or component.get("reinstall"):
            continue
        if not same_version(installed["version"] or "", component["version"]) or record.get("key") != component["key"]:
            continue
        for name, hashes in sorted(targets.items()):
            found = site["files"].get(name)
            if found is None or found in hashes["known"]:
                continue
            problems.append(
                problem(
                    "source_patches",
                    "{}/{} has sha256 {}".format(site["site_packages"], name, found),
                    "{} (as upstream ships it) or {} (patched): somebody changed this file".format(
                        hashes["pristine"], hashes["final"]
                    ),
                    "keep your change by copying the file away, then reinstall the package: "
                    f"-e {package}_reinstall=true",
                )
            )
    return problems


def is_imported(path: str, site_packages: str) -> bool:
    """Return whether a shared library below a site folder is one that Python would import from there, or is ours.

    Packages such as debugpy carry libraries for many machines as data; those are nobody's fault.
    """
    relative = os.path.relpath(path, site_packages)
    name = os.path.basename(path)
    return os.sep not in relative or ".cpython-" in name or ".abi3." in name or relative.split(os.sep)[0] in OURS


def find_foreign_problems(
    site: Optional[Dict[str, Any]], work: Sequence[Dict[str, Any]], machine: str
) -> List[Dict[str, str]]:
    """Return a problem per shared library made for another machine, where no planned installation replaces it."""
    damaged = " ".join(item["reason"] for item in work)
    problems = []
    for item in (site or {}).get("foreign", []):
        if os.path.basename(item["path"]) in damaged or not is_imported(item["path"], (site or {})["site_packages"]):
            continue
        problems.append(
            problem(
                "torch_jetpack",
                "{} is made for {}".format(item["path"], item["found"]),
                f"a library for {machine}",
                "remove that file; if a package brought it, reinstall that package for this machine",
            )
        )
    return problems
