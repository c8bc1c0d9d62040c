"""The rows of data/components.yml: what can be built, from what, and what a build takes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

DATA = Path(__file__).resolve().parent.parent / "data" / "components.yml"
SCHEMA = 1
# of one C++ file over torch's headers
CPU_JOB_MEMORY_MB = 1000

# keys and types of each kind of row; a key with a leading "?" may be left out
_COMPONENT = {
    "project": str,
    "package": str,
    "force_build": str,
    "provides_modules": list,
    "build_requires": list,
    "versions": dict,
}
_VERSION = {
    "source": dict,
    "setup_py_sha256": (str, type(None)),
    "requires": dict,
    "minutes_estimate": dict,
    "disk_mb": int,
    "job_memory_mb": int,
}
_MINUTES = {"cuda": int, "cpu": int}
SOURCE_KINDS: dict[str, dict[str, Any]] = {
    "index": {"kind": str, "project": str, "filename": str, "sha256": str},
    "archive": {"kind": str, "?url": str, "?path": str, "sha256": (str, type(None))},
    "git": {"kind": str, "url": str, "commit": str},
    "tree": {"kind": str, "path": str},
    "compose": {"kind": str, "base": dict, "add": list},
}
_ADDITION = {"folder": str, "from": dict}


@dataclass(frozen=True)
class Component:
    """One component in one version.

    Args:
        minutes: estimated duration of a build on an Orin, keys cuda and cpu.
        disk_mb: free space that a build needs, MB.
        job_memory_mb: memory of one compiler process, MB.
        known: False where components.yml has no row of this version and the numbers are those of its newest row.
    """

    name: str
    version: str
    project: str
    package: str
    force_build: str
    provides_modules: tuple[str, ...]
    build_requires: tuple[str, ...]
    source: Mapping[str, Any] | None
    setup_py_sha256: str | None
    requires: Mapping[str, str] = field(default_factory=dict)
    minutes: Mapping[str, int] = field(default_factory=dict)
    disk_mb: int = 0
    job_memory_mb: int = 0
    known: bool = True

    @property
    def extension_files(self) -> tuple[str, ...]:
        """File name patterns of the extension modules in a built wheel."""
        return tuple(f"{module}*.so" for module in self.provides_modules)

    def memory_for(self, sm: str) -> int:
        """Return the memory of one compiler process in MB, for a GPU number or for "cpu"."""
        return CPU_JOB_MEMORY_MB if sm == "cpu" else self.job_memory_mb

    def minutes_for(self, sm: str) -> int:
        """Return the estimated minutes of a build for a GPU number such as "87", or for "cpu"."""
        return self.minutes["cpu" if sm == "cpu" else "cuda"]


def suggestion(wrong: str, known: Sequence[str]) -> str:
    """Return ", did you mean 'x'?" where one of the known words is near, else nothing."""
    near = difflib.get_close_matches(wrong, list(known), n=1)
    return f", did you mean '{near[0]}'?" if near else ""


def check_keys(row: Any, keys: Mapping[str, Any], where: str) -> None:
    """Check one mapping against its keys and types.

    Raises:
        Problem: a key is unknown, missing or of the wrong type; where names the row.
    """
    names = [key.lstrip("?") for key in keys]
    if not isinstance(row, Mapping):
        raise Problem(f"{where} is {row!r}", f"a mapping with {', '.join(names)}", f"correct {where}")
    for key in row:
        if str(key) not in names:
            raise Problem(
                f"{where} has the unknown key '{key}'{suggestion(str(key), names)}",
                f"only {', '.join(names)}",
                f"rename or remove '{key}' in {where}",
            )
    for key, types in keys.items():
        name = key.lstrip("?")
        if name not in row:
            if key.startswith("?"):
                continue
            raise Problem(f"{where} has no '{name}'", f"all of {', '.join(names)}", f"add '{name}' to {where}")
        value = row[name]
        if not isinstance(value, types) or isinstance(value, bool):
            wanted = types if isinstance(types, tuple) else (types,)
            text = " or ".join("null" if one is type(None) else one.__name__ for one in wanted)
            raise Problem(f"{where}.{name} is {value!r}", f"a value of type {text}", f"correct {where}.{name}")


def check_source(source: Any, where: str) -> None:
    """Check that a source is one of the known kinds, with its keys.

    Raises:
        Problem: it is not; where names it.
    """
    kind = source.get("kind") if isinstance(source, Mapping) else None
    if kind not in SOURCE_KINDS:
        raise Problem(
            f"{where} is of kind {kind!r}{suggestion(str(kind), list(SOURCE_KINDS))}",
            f"one of {', '.join(SOURCE_KINDS)}",
            f"correct {where}.kind",
        )
    check_keys(source, SOURCE_KINDS[kind], where)
    if kind == "archive" and ("url" in source) == ("path" in source):
        raise Problem(f"{where} has url and path, or neither", "exactly one of them", f"correct {where}")
    if kind == "compose":
        check_source(source["base"], f"{where}.base")
        for number, addition in enumerate(source["add"]):
            check_keys(addition, _ADDITION, f"{where}.add[{number}]")
            check_source(addition["from"], f"{where}.add[{number}].from")


def check_table(table: Any, where: str = "components.yml") -> None:
    """Check a whole table.

    Raises:
        Problem: the first thing that is wrong, by its place.
    """
    check_keys(table, {"schema": int, "components": dict}, where)
    if table["schema"] != SCHEMA:
        raise Problem(f"{where} has schema {table['schema']}", f"schema {SCHEMA}", "use the file of this release")
    for name, component in table["components"].items():
        check_keys(component, _COMPONENT, f"{where}: {name}")
        for version, row in component["versions"].items():
            place = f"{where}: {name} {version}"
            if not isinstance(version, str):
                raise Problem(f"{place}: the version is a number", "text", f"write it as '{version}', in quotes")
            check_keys(row, _VERSION, place)
            check_keys(row["minutes_estimate"], _MINUTES, f"{place}: minutes_estimate")
            check_source(row["source"], f"{place}: source")


@lru_cache(maxsize=4)
def load_table(path: Path = DATA) -> dict[str, Any]:
    """Return the checked table of a file.

    Raises:
        Problem: the file breaks the schema.
    """
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    check_table(table, path.name)
    return dict(table["components"])


def component(name: str, version: str, path: Path = DATA) -> Component:
    """Return the row of a component in a version.

    A version without a row is served with the numbers of the first row of the component and without a source.

    Args:
        name: such as mamba_ssm.
        version: such as 2.2.4.
        path: another table than the project's own.

    Raises:
        Problem: there is no such component.
    """
    table = load_table(path)
    if name not in table:
        raise Problem(
            f"there is no component '{name}'{suggestion(name, list(table))}",
            f"one of {', '.join(table)}",
            f"correct the name, or add a row to {path.name}",
        )
    row = table[name]
    known = version in row["versions"]
    numbers = row["versions"][version] if known else next(iter(row["versions"].values()))
    return Component(
        name=name,
        version=version,
        project=row["project"],
        package=row["package"],
        force_build=row["force_build"],
        provides_modules=tuple(row["provides_modules"]),
        build_requires=tuple(row["build_requires"]),
        source=numbers["source"] if known else None,
        setup_py_sha256=numbers["setup_py_sha256"] if known else None,
        requires=numbers["requires"] if known else {},
        minutes=numbers["minutes_estimate"],
        disk_mb=numbers["disk_mb"],
        job_memory_mb=numbers["job_memory_mb"],
        known=known,
    )


def find(name: str, version: str, path: Path = DATA) -> dict[str, Any]:
    """Return a component's row as plain data: the keys of components.yml, merged, with name, version and known.

    Raises:
        Problem: there is no such component.
    """
    facts = asdict(component(name, version, path))
    facts["minutes_estimate"] = dict(facts.pop("minutes"))
    return facts


def known_versions(name: str, path: Path = DATA) -> tuple[str, ...]:
    """Return the versions of a component that have a row."""
    return tuple(load_table(path).get(name, {}).get("versions", {}))
