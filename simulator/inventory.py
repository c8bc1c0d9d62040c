"""The fleet as an Ansible inventory: addresses, keys, and what the user adds."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from simulator.backend import Host
from simulator.errors import Problem
from simulator.identity import USER

GROUP = "jetsons"


def ssh_options(fleet_folder: Path, proxy_command: str) -> list[str]:
    """Return ssh's options to reach a host of the fleet, host keys checked against the fleet's own file."""
    known_hosts = _for_ssh(fleet_folder / "known_hosts")
    return [
        "-o", f'UserKnownHostsFile="{known_hosts}"',
        "-o", "StrictHostKeyChecking=yes",
        "-o", "IdentitiesOnly=yes",
        "-o", f"ProxyCommand={proxy_command}",
    ]  # fmt: skip


def key_file(fleet_folder: Path) -> str:
    """Return the fleet's private key, as ssh wants it named."""
    return _for_ssh(fleet_folder / "key")


def render(hosts: Sequence[Host], fleet_folder: Path, proxy_command: str, extra: Sequence[dict[str, Any]] = ()) -> str:
    """Return the inventory's text.

    Args:
        hosts: the fleet's hosts.
        fleet_folder: where its key and known_hosts are.
        proxy_command: ssh's ProxyCommand into the fleet's network.
        extra: variables of the group, the later the stronger.
    """
    group: dict[str, Any] = {
        "ansible_user": USER,
        "ansible_ssh_private_key_file": key_file(fleet_folder),
        "ansible_ssh_common_args": shlex.join(ssh_options(fleet_folder, proxy_command)),
    }
    for variables in extra:
        group.update(variables)
    members: dict[str, Any] = {}
    for host in hosts:
        members[host.spec.name] = {"ansible_host": host.address, **host.spec.variables}
        if host.spec.sudo_password is not None:
            members[host.spec.name].setdefault("ansible_become_password", host.spec.sudo_password)
    data = {"all": {"children": {GROUP: {"hosts": members, "vars": group}}}}
    return "---\n" + yaml.safe_dump(data, sort_keys=False, width=10000, allow_unicode=True)


def _for_ssh(path: Path) -> str:
    # ssh replaces %h and the like in file names
    return str(path).replace("%", "%%")


def read_variables(path: Path) -> dict[str, Any]:
    """Return the variables of a YAML file. Raises Problem."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Problem(f"{path}: {error.strerror}", "a YAML file of variables", "check --vars") from error
    except yaml.YAMLError as error:
        raise Problem(f"{path} is not YAML: {error}", "a mapping of variables", "correct the file") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise Problem(f"{path} holds a {type(data).__name__}", "a mapping of variables", "correct the file")
    return data
