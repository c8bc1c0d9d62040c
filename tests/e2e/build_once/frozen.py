"""Hosts that start with torch and lack only what has to be built, and the counting of what their compilers are asked.

Two hosts, one of each platform class, get the environment; each is frozen, and a fleet of many starts from the two.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.conftest import Fleet

# class -> (L4T, CUDA): what tells the two classes apart is CUDA
PLATFORMS: Mapping[str, tuple[str, str]] = {"a": ("36.4.7", "12.6"), "b": ("36.3.0", "12.2")}
COMPONENTS = ("causal_conv1d", "mamba_ssm")
# every extension's sources, one each
SOURCES = ("causal_conv1d.cpp", "selective_scan.cpp")
PLAYBOOK = "tests/e2e/build_once/environment.yml"
LOG = "/var/log/compiler-runs"
# In front of the compilers proper, not of their drivers: however one is called, by whatever name, it passes here.
COUNT_COMPILERS = f"""
cd /
for name in cc1 cc1plus; do
    real=$(gcc -print-prog-name=$name)
    mv "$real" "$real.real"
    printf '#!/bin/sh\\nprintf "%%s\\\\n" "$*" >> {LOG}\\nexec %s.real "$@"\\n' "$real" > "$real"
    chmod 755 "$real"
done
: > {LOG}
chmod 666 {LOG}
echo 'int main() {{}}' > /root/probe.cpp
g++ -c /root/probe.cpp -o /root/probe.o
rm /root/probe.cpp /root/probe.o
grep -q probe.cpp {LOG}
: > {LOG}
"""


def describe(hosts: Mapping[str, str], snapshots: Mapping[str, str], path: Path) -> Path:
    """Write a fleet's description.

    Args:
        hosts: {host: class}.
        snapshots: {class: snapshot to start from}; a class without one starts bare.
        path: the file to write.
    """
    wishes = {}
    for host, kind in hosts.items():
        l4t, cuda = PLATFORMS[kind]
        wishes[host] = {"l4t": l4t, "cuda": cuda, **({"from": snapshots[kind]} if kind in snapshots else {})}
    path.write_text(yaml.safe_dump({"hosts": wishes}, sort_keys=False), encoding="utf-8")
    return path


def freeze(name: str, scratch: Path, kinds: Collection[str] = tuple(PLATFORMS)) -> dict[str, str]:
    """Make a host of each class with torch and with counted compilers, and freeze it.

    Args:
        name: of the fleet that is started for it, and what the snapshots' names begin with.
        scratch: for what is written meanwhile.
        kinds: the classes.

    Returns:
        {class: snapshot}.
    """
    fleet = Fleet(name, scratch)
    forget(fleet, kinds)
    hosts = {f"seed-{kind}": kind for kind in kinds}
    try:
        fleet.up(describe(hosts, {}, scratch / f"{name}.yml"))
        run = fleet.playbook(PLAYBOOK)
        assert run.status == 0, "the environment could not be made"
        fleet.roots(hosts, COUNT_COMPILERS)
        for host, kind in hosts.items():
            fleet.simulator("snapshot", "--fleet", name, host, f"{name}-{kind}")
    finally:
        fleet.down()
    return {kind: f"{name}-{kind}" for kind in kinds}


def forget(fleet: Fleet, kinds: Iterable[str] = tuple(PLATFORMS)) -> None:
    """Remove the snapshots of a fleet's name, and the fleet."""
    fleet.down()
    for kind in kinds:
        fleet.simulator("forget", f"{fleet.name}-{kind}", check=False)


def write_inventory(
    fleet: Fleet,
    path: Path,
    hosts: Sequence[str],
    builders: Sequence[str] = (),
    variables: Mapping[str, Any] | None = None,
    of_hosts: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write an inventory of some of a fleet's hosts.

    Args:
        path: the file to write.
        hosts: the devices, in the order that they shall have.
        builders: the group of that name; none without any.
        variables: of all, beside the simulator's.
        of_hosts: {host: variables of its own}.
    """
    jetsons = yaml.safe_load(fleet.inventory.read_text(encoding="utf-8"))["all"]["children"]["jetsons"]
    named = {host: {**jetsons["hosts"][host], **(of_hosts or {}).get(host, {})} for host in hosts}
    groups: dict[str, Any] = {"jetsons": {"hosts": named}}
    if builders:
        groups["builders"] = {"hosts": {host: {} for host in builders}}
    data = {"all": {"children": groups, "vars": {**jetsons["vars"], **(variables or {})}}}
    path.write_text(yaml.safe_dump(data, sort_keys=False, width=10000, allow_unicode=True), encoding="utf-8")
    path.chmod(0o600)
    return path


def platform_rows(fleet: Fleet, more_l4t: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the platform rows of the simulator, with further releases.

    Args:
        more_l4t: {release: another release that its row covers too}.
    """
    data = yaml.safe_load(fleet.inventory.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = data["all"]["children"]["jetsons"]["vars"]["jetson_platform_rows"]
    return [{**row, "l4t": row["l4t"] + [more_l4t[one] for one in row["l4t"] if one in more_l4t]} for row in rows]


def compiled(fleet: Fleet, hosts: Iterable[str]) -> Counter[tuple[str, str]]:
    """Return how often each host's compilers have been started on each file: {(host, file): times}."""
    found: Counter[tuple[str, str]] = Counter()
    for host, text in fleet.roots(hosts, f"cat {LOG}").items():
        for line in text.splitlines():
            names = re.findall(r"[^\s/]+\.(?:c|cc|cpp|cxx|cu|C)(?=\s|$)", line)
            found[(host, names[0] if names else line)] += 1
    return found
