"""What a fleet is wished to be: plain data from a YAML file, checked before anything starts."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from simulator.errors import Problem, unknown

DEFAULT_FILE = Path(__file__).parent / "fleets" / "default.yml"
MODEL = "NVIDIA Jetson AGX Orin Developer Kit"
COMPATIBLE = ("nvidia,p3737-0000+p3701-0000", "nvidia,tegra234")
MAX_HOSTS = 200
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")


@dataclass(frozen=True)
class HostSpec:
    """One host as it is wished.

    Args:
        name: host name, also the inventory's.
        l4t: L4T release, such as 36.4.7.
        cuda: toolkit release, such as 12.6; None for a host without one.
        model: the device tree's model.
        compatible: the device tree's compatible strings.
        sudo_password: the password that sudo and a console login ask for; None: sudo asks for none.
        snapshot: the snapshot the host starts from; None: the bare base.
        variables: inventory variables of this host alone.
    """

    name: str
    l4t: str
    cuda: str | None
    model: str = MODEL
    compatible: tuple[str, ...] = COMPATIBLE
    sudo_password: str | None = None
    snapshot: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the host as plain data."""
        return {**asdict(self), "compatible": list(self.compatible)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HostSpec:
        """Return the host that as_dict wrote."""
        return cls(**{**data, "compatible": tuple(data["compatible"])})


def check_name(kind: str, name: str) -> str:
    """Return name if it can be a fleet's, host's or snapshot's name. Raises Problem."""
    if not NAME.fullmatch(name):
        raise Problem(
            f"{kind} name {name!r}",
            "1 to 40 lower-case letters, digits and hyphens, with no hyphen at either end",
            f"choose another {kind} name",
        )
    return name


def load(path: Path) -> list[HostSpec]:
    """Return the hosts that a fleet file names, in its order. Raises Problem."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Problem(f"{path}: {error.strerror}", "a fleet file", f"copy and edit {DEFAULT_FILE}") from error
    except yaml.YAMLError as error:
        raise Problem(f"{path} is not YAML: {error}", "a mapping with the key hosts", "correct the file") from error
    hosts = data.get("hosts") if isinstance(data, dict) else None
    if not isinstance(hosts, dict) or not hosts:
        raise Problem(f"{path} names no hosts", "a mapping hosts: {NAME: {l4t: …, cuda: …}}", f"see {DEFAULT_FILE}")
    if len(hosts) > MAX_HOSTS:
        raise Problem(f"{path} names {len(hosts)} hosts", f"at most {MAX_HOSTS}", "make two fleets of it")
    return [_host(path, str(name), wishes) for name, wishes in hosts.items()]


def numbered(count: int) -> list[HostSpec]:
    """Return count hosts named orin-01, orin-02, … of the default platform. Raises Problem."""
    if not 1 <= count <= MAX_HOSTS:
        raise Problem(f"--hosts {count}", f"a number from 1 to {MAX_HOSTS}", "ask for fewer hosts, or make two fleets")
    model = load(DEFAULT_FILE)[0]
    return [HostSpec(name=f"orin-{number:02d}", l4t=model.l4t, cuda=model.cuda) for number in range(1, count + 1)]


def _host(path: Path, name: str, wishes: Any) -> HostSpec:
    where = f"{path}: host {name}"
    check_name("host", name)
    keys = {"l4t", "cuda", "model", "compatible", "sudo_password", "from", "variables"}
    if not isinstance(wishes, dict):
        raise Problem(f"{where} is not a mapping", "keys l4t and cuda", f"see {DEFAULT_FILE}")
    for key in wishes:
        if key not in keys:
            problem = unknown("key", str(key), keys, f"see {DEFAULT_FILE}")
            raise Problem(f"{where}: {problem.found}", problem.expected, problem.next_step)
    l4t, cuda = wishes.get("l4t"), wishes.get("cuda")
    if not isinstance(l4t, str) or not re.fullmatch(r"\d+\.\d+(\.\d+)?", l4t):
        raise Problem(f"{where}: l4t is {l4t!r}", 'a quoted release such as "36.4.7"', "correct the file")
    if "cuda" not in wishes or (cuda is not None and not (isinstance(cuda, str) and re.fullmatch(r"\d+\.\d+", cuda))):
        raise Problem(f"{where}: cuda is {cuda!r}", 'a quoted release such as "12.6", or null', "correct the file")
    compatible = wishes.get("compatible", COMPATIBLE)
    if not isinstance(compatible, (list, tuple)) or not all(isinstance(item, str) for item in compatible):
        raise Problem(f"{where}: compatible is {compatible!r}", "a list of strings", "correct the file")
    for key in ("model", "sudo_password", "from"):
        if not isinstance(wishes.get(key, ""), str):
            raise Problem(f"{where}: {key} is {wishes[key]!r}", "a quoted string", "correct the file")
    variables = wishes.get("variables", {})
    if not isinstance(variables, dict):
        raise Problem(f"{where}: variables is {variables!r}", "a mapping", "correct the file")
    return HostSpec(
        name=name,
        l4t=l4t,
        cuda=cuda,
        model=wishes.get("model", MODEL),
        compatible=tuple(compatible),
        sudo_password=wishes.get("sudo_password"),
        snapshot=wishes.get("from"),
        variables=variables,
    )
