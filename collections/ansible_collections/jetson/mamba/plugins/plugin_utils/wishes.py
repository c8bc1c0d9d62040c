"""What a host is to hold: settings, platform row, locks, sources and patches brought together as plain data."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.jetson.mamba.plugins.module_utils import (
    build,
    cuda_env,
    environment,
    inspection,
    patches,
    plan,
    shim,
    versions,
)
from ansible_collections.jetson.mamba.plugins.module_utils import state as survey
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.files import sha256_file
from ansible_collections.jetson.mamba.plugins.module_utils.passwords import without_userinfo
from ansible_collections.jetson.mamba.plugins.plugin_utils import (
    components,
    fetch,
    locks,
    patch_series,
    sources,
    supply,
    wheel_libs,
)
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheelhouse import expectation_of
from packaging.specifiers import SpecifierSet
from packaging.version import Version

DATA = Path(__file__).parent.parent / "data"
COMPONENTS = ("causal_conv1d", "mamba_ssm")
# a wheel's size on disk against its packed size
UNPACKED = 3.6
# what NVIDIA's wheels take, about, before one is in the cache
UNFETCHED_MB = {"torch": 850, "torchvision": 10}
# a C++ compiler on torch's headers, seen on x86-64
CPU_BUILD_MEMORY_MB = 800
# what state.read_torch looks at
TORCH_FACTS = ("torch/version.py", "torch/share/cmake/Torch/TorchConfig.cmake")
Settings = Mapping[str, Any]
Data = dict[str, Any]


def read_platforms() -> list[Data]:
    """Return the rows of data/platforms.yml."""
    rows: list[Data] = yaml.safe_load((DATA / "platforms.yml").read_text(encoding="utf-8"))["platforms"]
    return rows


def lock_path(name: str) -> Path:
    """Return the path of a lock: one of ours by its name, or the user's own by its path."""
    return Path(name) if "/" in name else DATA / "locks" / name


def choose_wheels(row: Data, settings: Settings) -> tuple[list[Data], list[dict[str, str]]]:
    """Return the wheels that no lock names (torch, torchvision), each with its name, and problems.

    A checksum that nobody has published is null in the row; the user gives it or accepts trust on first use.
    """
    problems = []
    torch = dict(settings["torch_jetpack_wheel"] or row.get("torch") or {})
    torchvision = dict(settings["torch_jetpack_torchvision"] or row.get("torchvision") or {})
    fitting = versions.matching_torchvision(str(torch.get("version", ""))) or ""
    own = settings["torch_jetpack_wheel"] and not settings["torch_jetpack_torchvision"]
    # the row's torchvision belongs to the row's torch; beside another one it would not even import
    if own and torchvision and not fnmatch.fnmatchcase(torchvision["version"], fitting):
        torchvision = {}
    if not torch:
        problems.append(
            plan.problem(
                "torch_jetpack",
                f"no torch wheel is known for platform {row['id']} (JetPack {row.get('jetpack', '?')})",
                "a wheel with version, url or path, and sha256",
                "name yours: torch_jetpack_wheel: {version: …, url: …, sha256: …}",
            )
        )
    if torch and settings["torch_jetpack_sha256"]:
        torch["sha256"] = settings["torch_jetpack_sha256"]
    chosen = [dict(wheel, name=name) for name, wheel in (("torch", torch), ("torchvision", torchvision)) if wheel]
    return chosen, problems


def check_wheels(wheels: Sequence[Data], target: versions.Target, settings: Settings, cache: Path) -> list[Data]:
    """Return a problem per wheel that is for another machine, that is absent, or whose checksum is unknown."""
    problems = []
    for wheel in wheels:
        filename = (wheel.get("path") or wheel["url"]).rsplit("/", 1)[-1]
        try:
            mismatch = versions.tag_mismatch(versions.parse_wheel_name(filename), target)
        except ValueError as error:
            mismatch = str(error)
        if mismatch:
            problems.append(
                plan.problem(
                    "torch_jetpack",
                    f"{wheel['name']}: {filename}: {mismatch}",
                    f"a wheel for {target.describe()}",
                    f"name one that fits: torch_jetpack_{'wheel' if wheel['name'] == 'torch' else wheel['name']}",
                )
            )
        elif wheel.get("path") and not Path(wheel["path"]).is_file():
            problems.append(
                plan.problem(
                    "torch_jetpack",
                    f"{wheel['name']}: there is no {wheel['path']} on the controller",
                    "the wheel's file",
                    "correct the path, or put the file there",
                )
            )
        else:
            try:
                fetch.check_digest_known(wheel, cache, trust=bool(settings["torch_jetpack_trust_on_first_use"]))
            except Problem as refusal:
                problems.append(dict(refusal.as_dict(), outcome="torch_jetpack"))
    return problems


class Wishes:
    """What one host is to hold, given its platform row.

    Args:
        row: the platform row that fits the host.
        state: the survey.
        settings: effective variables of all roles.
        patch_root: folder of the patch series.
        cache: the controller's artefact cache.
        progress: called with a line of text while something is fetched.
    """

    def __init__(
        self,
        row: Data,
        state: Data,
        settings: Settings,
        patch_root: Path,
        cache: Path,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.row, self.state, self.settings = row, state, settings
        self.cache = cache
        self.target = versions.Target.from_dict(
            {"machine": row["machine"], "python": row["python"], "glibc": state["glibc"] or "2.17"}
        )
        self.extra, self.problems = choose_wheels(row, settings)
        self.problems += check_wheels(self.extra, self.target, settings, cache)
        self.lock = lock_path(settings["torch_jetpack_lock"] or row["lock"])
        self.locked = locks.read_lock(self.lock, self.target)
        torch = next((wheel["version"] for wheel in self.extra if wheel["name"] == "torch"), "none")
        cuda = plan.wanted_cuda(row, dict(settings))
        self.class_id = plan.class_id(self._built_as(row), state, versions.pip_spelling(torch), cuda)
        self.series: dict[str, list[Data]] = {}
        self.components = self._components(patch_root, progress)
        self._requirement_problems()
        self.env_id = plan.env_id(
            row,
            torch,
            {
                "wheels": [[entry.name, entry.version, *entry.hashes] for entry in self.locked],
                "extra": [[wheel["name"], wheel["version"], identity(wheel)] for wheel in self.extra],
                "components": {name: data["key"] for name, data in self.components.items()},
                "scope": settings["jetson_platform_scope"],
                "system_packages": sorted(settings["torch_jetpack_system_packages"]),
            },
        )

    def _built_as(self, row: Data) -> Data:
        """Return the platform row, with the C++ ABI of the user's own torch wheel where its file tells."""
        own = next((wheel for wheel in self.extra if wheel["name"] == "torch"), None)
        found = torch_abi(own, self.cache) if own and self.settings["torch_jetpack_wheel"] else None
        return row if found is None else dict(row, cxx11_abi=found)

    def _components(self, patch_root: Path, progress: Callable[[str], None] | None) -> dict[str, Data]:
        chosen = {}
        kind = "cpu" if str(self.row["sm"]) == "cpu" else "cuda"
        companions = self.companions()
        for name in COMPONENTS:
            version = str(self.settings[f"{name}_version"])
            source = self.settings[f"{name}_source"] or None
            try:
                facts = components.find(name, version)
                archive = sources.prepare(
                    name, version, source, self.cache, progress, patch_root=str(patch_root), companions=companions
                )
                self.series[name] = patch_series.load_series(str(patch_root), name, version, companions)
                flags = self.settings[f"{name}_build_flags"]
                special = supply.find_special(name, version, flags, str(patch_root), companions)
            except Problem as refusal:
                self.problems.append(dict(refusal.as_dict(), outcome=name))
                continue
            self._check_targets(name, archive)
            key = build.build_key(
                name,
                version,
                archive.sha256,
                self.class_id,
                str(self.row["sm"]),
                flags,
            )
            chosen[name] = {
                "version": version,
                "key": key,
                "project": facts["project"],
                "modules": list(facts["provides_modules"]),
                "source": dict(source or {}),
                "source_sha256": archive.sha256,
                "build_flags": list(flags),
                "special": special,
                "max_jobs": self.settings[f"{name}_max_jobs"],
                "minutes": facts["minutes_estimate"][kind],
                "disk_mb": facts["disk_mb"],
                "memory_mb": facts["job_memory_mb"] if kind == "cuda" else CPU_BUILD_MEMORY_MB,
                "reinstall": bool(self.settings[f"{name}_reinstall"]),
            }
        return chosen

    def companions(self) -> dict[str, str | None]:
        """Return what a patch series' conditions may name: the components' versions, and CUDA's (None without)."""
        cuda = plan.wanted_cuda(self.row, dict(self.settings))
        versions_of: dict[str, str | None] = {name: str(self.settings[f"{name}_version"]) for name in COMPONENTS}
        return {**versions_of, "cuda": None if cuda == "none" or str(self.row["sm"]) == "cpu" else cuda}

    def _check_targets(self, name: str, archive: sources.SourceArchive) -> None:
        """Note a problem per file of a source that no patch will know once it is built and installed."""
        series = self.series[name]
        pristine, final = patches.pristine_hashes(series), patches.expected_hashes(series)
        for target, found in sources.hashes_of(archive, pristine).items():
            if found is None or found in known_hashes(series, target):
                continue
            self.problems.append(
                plan.problem(
                    "source_patches",
                    f"{target} in {archive.origin} has sha256 {found}",
                    f"{pristine[target]} (as upstream ships it) or {final[target]} (patched)",
                    f"take upstream's file back into that source, or name another source: {name}_source",
                )
            )

    def wheels(self) -> list[Data]:
        """Return what the environment must hold, {name, version} each."""
        return [{"name": entry.name, "version": entry.version} for entry in self.locked] + [
            {"name": wheel["name"], "version": wheel["version"]} for wheel in self.extra
        ]

    def packed_mb(self) -> int:
        """Return the size of all wheels in MB, as far as it is known."""
        size = sum(entry.size or 0 for entry in self.locked)
        for wheel in self.extra:
            found = fetch.find_wheel(wheel, self.cache)
            size += found.size if found else UNFETCHED_MB.get(wheel["name"], 0) << 20
        return size >> 20

    def installed_mb(self) -> int:
        """Return the room that the environment needs in MB: the row's figure, else an estimate from the wheels."""
        return int(self.row.get("disk_mb") or self.packed_mb() * UNPACKED)

    def patch_targets(self) -> dict[str, dict[str, Data]]:
        """Return {package: {path: {final, pristine, known}}}; final is pristine where patches shall be taken back."""
        targets: dict[str, dict[str, Data]] = {}
        for name, series in self.series.items():
            pristine = patches.pristine_hashes(series)
            present = self.settings["source_patches_state"] == "present"
            final = patches.expected_hashes(series) if present else pristine
            targets[name] = {
                path: {
                    "final": digest,
                    "pristine": pristine[path],
                    "known": known_hashes(series, path),
                }
                for path, digest in final.items()
            }
        return targets

    def wanted(self, paths: Data) -> Data:
        """Return what plan.find_work compares with the survey."""
        settings = self.settings
        state = settings["cuda_env_state"] if str(self.row["cuda"]) != "none" else "absent"
        cuda = cuda_env.planned_files(
            str(paths["cuda_home"]),
            self.state["environment_path"],
            login=settings["cuda_env_login"],
            ssh=settings["cuda_env_ssh"],
            service=settings["cuda_env_service"],
            state=state,
        )
        shim_files: Mapping[str, Any] = shim.wanted_files("")
        if settings["sitecustomize_state"] != "present":
            shim_files = dict.fromkeys(shim_files)
        config = environment.config_files(paths["env"] or "", self.constraints())
        if self.scope == "user":  # pip.conf is the user's own there
            config = {environment.CONSTRAINTS: config[environment.CONSTRAINTS]}
        packed = self.packed_mb()
        return {
            "files": digests(cuda),
            "packages": self.packages()["run"],
            "wheels": self.wheels(),
            "config": config,
            "components": self.components,
            "expectations": {
                name: expectation_of({"class_id": self.class_id, "component": name, "version": data["version"]})
                for name, data in self.components.items()
            },
            "shim": digests(shim_files),
            "patches": self.patch_targets(),
            "toolkit": plan.toolkit_wish(self.row, self.state, dict(settings)),
            "system_shim": digests(self._system_shim()),
            "launcher": self._launcher(paths),
            "minutes": round(1 + packed / 300, 1),
            "disk_mb": self.installed_mb(),
        }

    def libraries(self) -> dict[str, str]:
        """Return {soname: Debian package} that the wheels in the cache ask of the system (none before the fetch)."""
        return wheel_libs.needed(self.extra, self.cache, [entry.name for entry in self.locked])

    def packages(self) -> dict[str, list[dict[str, str]]]:
        """Return the Debian packages that the device lacks and the run may install: {run, build}."""
        if not self.installs_packages:
            return {"run": [], "build": []}
        return plan.find_packages(self.row, self.state, self.libraries())

    def missing_packages(self) -> dict[str, list[dict[str, str]]]:
        """Return problems about packages that the device lacks where the run may not install any: {run, build}."""
        if self.installs_packages:
            return {"run": [], "build": []}
        missing = plan.find_packages(self.row, self.state, self.libraries())
        return {use: plan.package_problems(names, "debian_packages") for use, names in missing.items()}

    @property
    def installs_packages(self) -> bool:
        """Whether the run may install Debian packages."""
        return bool(self.settings["debian_packages_source"] != "none")

    @property
    def scope(self) -> str:
        """The installation scope, venv or user."""
        return str(self.settings["jetson_platform_scope"])

    def _system_shim(self) -> Mapping[str, Any]:
        """Return the shim's files in the system Python, where a setting asks for them there."""
        if not self.settings["sitecustomize_system"]:
            return {}
        folder = shim.system_site_packages(f"/usr/lib/python{self.row['python']}/site-packages")
        wanted: Mapping[str, Any] = shim.wanted_files(folder)
        return wanted if self.settings["sitecustomize_state"] == "present" else dict.fromkeys(wanted)

    def _launcher(self, paths: Data) -> dict[str, str]:
        """Return {path: sha256} of the launcher."""
        user_python = str(paths["base_python"]) if self.scope == "user" else ""
        text = environment.launcher_text(paths["root"], user_python)
        path = f"{paths['root']}/{environment.LAUNCHER}"
        return {path: hashlib.sha256(text.encode("utf-8")).hexdigest()}

    def _requirement_problems(self) -> None:
        """Note what a component needs beside it and would not find."""
        chosen = {entry.name: entry.version for entry in self.locked}
        chosen.update({wheel["name"]: wheel["version"] for wheel in self.extra})
        chosen.update({name.replace("_", "-"): data["version"] for name, data in self.components.items()})
        for name, data in self.components.items():
            for other, specifier in components.find(name, data["version"])["requires"].items():
                version = chosen.get(other.replace("_", "-"))
                if version is None or SpecifierSet(specifier).contains(Version(version).base_version):
                    continue
                self.problems.append(
                    plan.problem(
                        name,
                        f"{other} {version} beside {name} {data['version']}",
                        f"{other}{specifier}",
                        f"choose versions that fit: {name}_version, or another {other}",
                    )
                )

    def constraints(self) -> list[str]:
        """Return the lines that keep later installations from replacing what was installed here."""
        own = bool(self.settings["torch_jetpack_wheel"])
        return environment.constraint_lines(
            self.wheels(),
            None if own else self.row.get("torchvision_version"),
            self.settings["torch_jetpack_constraints_extra"],
        )


def torch_abi(wheel: Data, cache: Path) -> bool | None:
    """Return whether a torch wheel was compiled with the C++11 ABI; None where it does not tell or is not here yet.

    Args:
        wheel: {name, version, url or path, sha256}.
        cache: the controller's artefact cache.
    """
    with contextlib.suppress(OSError, Problem, *inspection.ARCHIVE_ERRORS):
        # the user's own file is not hashed for this: it is large
        found = None if wheel.get("path") else fetch.find_wheel(wheel, cache)
        path = Path(wheel["path"]).expanduser() if wheel.get("path") else found.path if found else None
        if path is not None:
            with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory(prefix="torch-") as site:
                archive.extractall(site, [name for name in TORCH_FACTS if name in archive.NameToInfo])
                abi: bool | None = (survey.read_torch(site) or {}).get("cxx11_abi")
                return abi
    return None


def identity(wheel: Data) -> str | None:
    """Return what tells a wheel from another of its version: its checksum, else its URL, whoever fetches it."""
    if wheel.get("path") and not wheel.get("sha256"):
        return sha256_file(str(Path(wheel["path"]).expanduser()))
    return wheel.get("sha256") or without_userinfo(wheel.get("url"))


def known_hashes(series: Sequence[Data], target: str) -> list[str]:
    """Return every checksum that a target may have on its way through a series."""
    steps = [patch for patch in series if patch["target"] == target]
    return sorted({patch[key] for patch in steps for key in ("sha256_before", "sha256_after")})


def digests(files: Mapping[str, Any]) -> dict[str, str | None]:
    """Return {path: sha256 of the content} of wanted files; None for one that shall not be there."""
    return {
        path: None if spec is None else hashlib.sha256(spec.content.encode("utf-8")).hexdigest()
        for path, spec in files.items()
    }
