"""Whole fleets: up, down, snapshots, power. What it knows is in the store; what runs, the backend says."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from simulator import base, inventory, requirements
from simulator.backend import Backend, Host, Network
from simulator.definition import DEFAULT_FILE, HostSpec, check_name, load, numbered
from simulator.errors import Problem, unknown
from simulator.identity import USER
from simulator.progress import Waiting, say
from simulator.store import Store, read_json, remove, write_json, write_text

PREFIX = 24
SUBNETS = 512  # of 198.18.0.0/15, which is set aside for such networks and so is nobody's
READY_S = 120.0
PARALLEL = 6


@dataclasses.dataclass
class Fleet:
    """A fleet that exists.

    Args:
        name: its name.
        network: its network.
        hosts: its hosts, in the order of their definition.
    """

    name: str
    network: Network
    hosts: list[Host]

    def as_dict(self) -> dict[str, Any]:
        """Return the fleet as plain data."""
        hosts = [{**dataclasses.asdict(host), "spec": host.spec.as_dict()} for host in self.hosts]
        return {"schema": 1, "name": self.name, "network": dataclasses.asdict(self.network), "hosts": hosts}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Fleet:
        """Return the fleet that as_dict wrote."""
        hosts = [
            Host(**{**item, "spec": HostSpec.from_dict(item["spec"]), "layers": tuple(item["layers"])})
            for item in data["hosts"]
        ]
        return cls(data["name"], Network(**data["network"]), hosts)


class Manager:
    """Does what the commands say.

    Args:
        store: the simulator's files.
        backend: the way of running hosts.
    """

    def __init__(self, store: Store, backend: Backend) -> None:
        self.store = store
        self.backend = backend

    # fleets

    def up(self, name: str, file: Path | None, count: int | None, snapshot: str | None) -> Fleet:
        """Make a fleet that is wished, or complete one that is there; return it ready. Raises Problem.

        Args:
            name: the fleet's name.
            file: a fleet file.
            count: instead of a file, a number of hosts of the default platform.
            snapshot: what the hosts start from that are of its platform.
        """
        started = time.monotonic()
        check_name("fleet", name)
        requirements.check()
        self.backend.check()
        folder = self.store.fleets / name
        with self._locked(name):
            there = self._read(name)
            asked = file is not None or count is not None or snapshot is not None
            if there is None or asked:
                specs = self._specs(file, count, snapshot)
                if there is not None and specs != [host.spec for host in there.hosts]:
                    raise Problem(
                        f"fleet {name} is there already, defined otherwise: "
                        + ", ".join(f"{host.spec.name} ({host.spec.l4t})" for host in there.hosts),
                        "no fleet of that name, or the same definition",
                        f"python -m simulator down --fleet {name}",
                    )
            fleet = self._define(name, specs, base.ensure(self.store)) if there is None else there
            self._write_access(folder, fleet)
            self.backend.open_network(fleet.network)
            off = [host for host in fleet.hosts if self.backend.pid(fleet.network, host) is None]
            if off:
                self.backend.check(len(off))
                with Waiting(f"starting {len(off)} of {len(fleet.hosts)} hosts of fleet {name}", "a few seconds"):
                    self._each(off, lambda host: self._start(fleet, host))
            say(f"fleet {name}: {len(fleet.hosts)} hosts ready after {time.monotonic() - started:.1f} s")
            return fleet

    def down(self, name: str) -> bool:
        """Remove a fleet and whatever a crash left of it; tell whether there was anything."""
        check_name("fleet", name)
        self.backend.check()
        base.sweep(self.store)
        folder = self.store.fleets / name
        network = self._network_name(name)
        with self._locked(name):
            if not folder.exists() and network not in self.backend.networks(network):
                return False
            with Waiting(f"taking down fleet {name}"):
                self.backend.close_network(network)
                remove(folder)
                with contextlib.suppress(OSError):
                    self.store.fleets.rmdir()
        return True

    def remnants(self) -> list[str]:
        """Return the names of all fleets, those included of which only the kernel knows."""
        prefix = self._network_name("")
        held = {network.removeprefix(prefix) for network in self.backend.networks(prefix)}
        return sorted(held | set(self.store.names(self.store.fleets)))

    def known(self) -> list[Fleet]:
        """Return the fleets whose definition is there; a crash may have left others."""
        found = [self._read(name) for name in self.store.names(self.store.fleets)]
        return [fleet for fleet in found if fleet is not None]

    def fleet(self, name: str) -> Fleet:
        """Return a fleet that exists. Raises Problem."""
        found = self._read(name)
        if found is None:
            known = self.store.names(self.store.fleets)
            raise unknown("fleet", name, known, f"python -m simulator up --fleet {name}")
        return found

    def host(self, fleet: Fleet, name: str) -> Host:
        """Return a host of a fleet. Raises Problem."""
        for host in fleet.hosts:
            if host.spec.name == name:
                return host
        elsewhere = [
            other.name
            for other in self.known()
            if other.name != fleet.name and name in [h.spec.name for h in other.hosts]
        ]
        if elsewhere:
            raise Problem(
                f"fleet {fleet.name} has no host {name!r}, but fleet {elsewhere[0]} has",
                f"a host of fleet {fleet.name}",
                f"add --fleet {elsewhere[0]}",
            )
        raise unknown("host", name, [host.spec.name for host in fleet.hosts], "python -m simulator ls")

    def folder(self, fleet: Fleet) -> Path:
        """Return the folder of a fleet's files."""
        return self.store.fleets / fleet.name

    def inventory(self, fleet: Fleet, extra: Sequence[dict[str, Any]] = ()) -> str:
        """Return a fleet's inventory, with more variables for its group."""
        proxy = self.backend.proxy_command(fleet.network.name)
        return inventory.render(fleet.hosts, self.folder(fleet), proxy, extra)

    def ssh_command(self, fleet: Fleet, host: Host, command: Sequence[str]) -> list[str]:
        """Return the ssh command to a host as the fleet's user."""
        folder = self.folder(fleet)
        options = inventory.ssh_options(folder, self.backend.proxy_command(fleet.network.name))
        identity = f'IdentityFile="{inventory.key_file(folder)}"'
        return ["ssh", *options, "-o", identity, f"{USER}@{host.address}", *command]

    # single hosts

    def power_off(self, name: str, host_name: str) -> bool:
        """Cut a host's power; tell whether it was on. Raises Problem."""
        with self._locked(name):
            fleet = self.fleet(name)
            host = self.host(fleet, host_name)
            on = self.backend.pid(fleet.network, host) is not None
            self.backend.stop(fleet.network, host)
            return on

    def power_on(self, name: str, host_name: str) -> bool:
        """Start a host that is off, with all that it had written; tell whether it was off. Raises Problem."""
        with self._locked(name):
            fleet = self.fleet(name)
            host = self.host(fleet, host_name)
            if self.backend.pid(fleet.network, host) is not None:
                return False
            self.backend.open_network(fleet.network)
            with Waiting(f"starting {host_name}", "a few seconds"):
                self._start(fleet, host)
            return True

    # snapshots

    def snapshot(self, name: str, host_name: str, snapshot: str) -> None:
        """Freeze what a host has written as a read-only layer, and let the host go on above it. Raises Problem."""
        check_name("snapshot", snapshot)
        place = self.store.snapshots / snapshot
        with self._locked(name):
            fleet = self.fleet(name)
            host = self.host(fleet, host_name)
            if place.exists():
                raise Problem(
                    f"snapshot {snapshot} is there already", "a new name", f"python -m simulator forget {snapshot}"
                )
            on = self.backend.pid(fleet.network, host) is not None
            with Waiting(f"freezing {host_name} as {snapshot}", "a few seconds"):
                self.backend.stop(fleet.network, host, graceful=True)
                temporary = self.store.snapshots / f".{snapshot}.{os.getpid()}"
                temporary.mkdir(parents=True)
                data = {
                    "schema": 1,
                    "layers": list(host.layers),
                    "host": host_name,
                    "fleet": name,
                    "l4t": host.spec.l4t,
                    "cuda": host.spec.cuda,
                    "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                }
                write_json(temporary / "snapshot.json", data)
                os.rename(self.store.root / host.folder / "upper", temporary / "layer")
                os.rename(temporary, place)
                frozen = dataclasses.replace(host, layers=(f"snapshots/{snapshot}/layer", *host.layers))
                fleet.hosts[fleet.hosts.index(host)] = frozen
                write_json(self.folder(fleet) / "fleet.json", fleet.as_dict())
                remove(self.store.root / host.folder / "work")
                if on:
                    self._start(fleet, frozen)

    def forget(self, snapshot: str) -> None:
        """Remove a snapshot that nothing stands on. Raises Problem."""
        self.read_snapshot(snapshot)
        layer = f"snapshots/{snapshot}/layer"
        for fleet in self.known():
            for host in fleet.hosts:
                if layer in host.layers:
                    raise Problem(
                        f"host {host.spec.name} of fleet {fleet.name} stands on snapshot {snapshot}",
                        "no host on it",
                        f"python -m simulator down --fleet {fleet.name}",
                    )
        for name in self.store.names(self.store.snapshots):
            if layer in self.read_snapshot(name)["layers"]:
                raise Problem(
                    f"snapshot {name} stands on {snapshot}", "none on it", f"python -m simulator forget {name}"
                )
        remove(self.store.snapshots / snapshot)

    def read_snapshot(self, name: str) -> dict[str, Any]:
        """Return what is recorded of a snapshot. Raises Problem."""
        data = read_json(self.store.snapshots / name / "snapshot.json")
        if data is None:
            known = self.store.names(self.store.snapshots)
            raise unknown("snapshot", name, known, "python -m simulator snapshot HOST NAME")
        for layer in data["layers"]:
            if not (self.store.root / layer).is_dir():
                raise Problem(
                    f"snapshot {name} stands on {layer}, which is gone",
                    "all its layers",
                    f"python -m simulator forget {name}, and make it again",
                )
        return data

    # the inner works

    def _specs(self, file: Path | None, count: int | None, snapshot: str | None) -> list[HostSpec]:
        frozen = self.read_snapshot(snapshot) if snapshot is not None else None
        if count is not None:
            specs = numbered(count)
            if frozen is not None:
                specs = [dataclasses.replace(spec, l4t=frozen["l4t"], cuda=frozen["cuda"]) for spec in specs]
        else:
            specs = load(file or DEFAULT_FILE)
        if frozen is not None:
            specs = [
                dataclasses.replace(spec, snapshot=snapshot)
                if spec.snapshot is None and (spec.l4t, spec.cuda) == (frozen["l4t"], frozen["cuda"])
                else spec
                for spec in specs
            ]
            for spec in specs:
                if spec.snapshot is None:
                    say(f"{spec.name} (L4T {spec.l4t}) is not of {snapshot}'s platform: it starts from the bare base")
        for spec in specs:
            if spec.snapshot is not None:
                own = self.read_snapshot(spec.snapshot)
                if (own["l4t"], own["cuda"]) != (spec.l4t, spec.cuda):
                    raise Problem(
                        f"snapshot {spec.snapshot} is of L4T {own['l4t']}, CUDA {own['cuda']}",
                        f"L4T {spec.l4t}, CUDA {spec.cuda}, as host {spec.name} is defined",
                        "correct the fleet file",
                    )
        return specs

    def _define(self, name: str, specs: Sequence[HostSpec], key: str) -> Fleet:
        hosts = []
        subnet = self._free_subnet(name)
        for number, spec in enumerate(specs, start=1):
            layers = [base.rootfs(key)]
            if spec.snapshot is not None:
                layers = [f"snapshots/{spec.snapshot}/layer", *self.read_snapshot(spec.snapshot)["layers"]]
            folder = f"fleets/{name}/hosts/{spec.name}"
            hosts.append(Host(spec, f"{subnet}.{number + 9}", number, folder, tuple(layers)))
        fleet = Fleet(name, Network(self._network_name(name), f"{subnet}.1", PREFIX), hosts)
        folder_of_fleet = self.folder(fleet)
        # of an `up` that was cut off before it had written its definition
        self.backend.close_network(fleet.network.name)
        remove(folder_of_fleet)
        folder_of_fleet.mkdir(parents=True)
        write_json(folder_of_fleet / "fleet.json", fleet.as_dict())
        return fleet

    def _write_access(self, folder: Path, fleet: Fleet) -> None:
        """Make the keys that are missing, then known_hosts and the inventory."""
        _make_key(folder / "key", f"simulator-{fleet.name}")
        lines = []
        for host in fleet.hosts:
            place = self.store.root / host.folder
            place.mkdir(parents=True, exist_ok=True)
            _make_key(place / "host_key", host.spec.name)
            public = (place / "host_key.pub").read_text(encoding="ascii").split()
            lines.append(f"{host.address},{host.spec.name} {public[0]} {public[1]}\n")
        write_text(folder / "known_hosts", "".join(lines))
        write_text(folder / "inventory.yml", self.inventory(fleet), 0o600)

    def _start(self, fleet: Fleet, host: Host) -> None:
        self.backend.start(fleet.network, host)
        deadline = time.monotonic() + READY_S
        while not self.backend.banner(fleet.network.name, host.address, 5).startswith("SSH-2.0"):
            alive = self.backend.pid(fleet.network, host) is not None
            if not alive or time.monotonic() > deadline:
                raise Problem(
                    f"host {host.spec.name}: {'no ssh banner' if alive else 'its init ended'}",
                    f"an ssh banner within {READY_S:.0f} s",
                    f"read {self.backend.log(host)}; python -m simulator exec --fleet {fleet.name} "
                    f"{host.spec.name} -- journalctl -b",
                )
            time.sleep(0.05)
        state = self._wait_for_system(fleet, host, max(5.0, deadline - time.monotonic()))
        if state != "running":
            failed = self._inside(fleet, host, ["systemctl", "--failed", "--plain", "--no-legend"], 20)
            units = ", ".join(line.split()[0] for line in failed.splitlines() if line.strip())
            say(f"{host.spec.name}: systemd is {state or 'silent'}{f'; failed: {units}' if units else ''}")

    def _wait_for_system(self, fleet: Fleet, host: Host, timeout_s: float) -> str:
        return self._inside(fleet, host, ["systemctl", "is-system-running", "--wait"], timeout_s).strip()

    def _inside(self, fleet: Fleet, host: Host, argv: Sequence[str], timeout_s: float) -> str:
        command = self.backend.command(fleet.network, host, argv)
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            return ""
        return done.stdout

    def _each(self, hosts: Sequence[Host], action: Callable[[Host], None]) -> None:
        """Do action for all hosts, some at a time, and report every failure, not only the first."""
        problems: list[Problem] = []
        with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
            for future in [pool.submit(action, host) for host in hosts]:
                try:
                    future.result()
                except Problem as problem:
                    problems.append(problem)
        if len(problems) == 1:
            raise problems[0]
        if problems:
            raise Problem("; ".join(problem.found for problem in problems), problems[0].expected, problems[0].next_step)

    def _locked(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self.store.lock(f"fleet-{name}", f"fleet {name}")

    def _network_name(self, name: str) -> str:
        return f"jetsim-{self.store.tag}-{name}"

    def _read(self, name: str) -> Fleet | None:
        data = read_json(self.store.fleets / name / "fleet.json")
        return None if data is None else Fleet.from_dict(data)

    def _free_subnet(self, name: str) -> str:
        """Return three octets that no other fleet here has: ssh keeps connections by address, whatever the network."""
        taken = {fleet.network.gateway.rpartition(".")[0] for fleet in self.known() if fleet.name != name}
        first = int(hashlib.sha256(self._network_name(name).encode()).hexdigest(), 16)
        for step in range(SUBNETS):
            number = (first + step) % SUBNETS
            subnet = f"198.{18 + number // 256}.{number % 256}"
            if subnet not in taken:
                return subnet
        raise Problem(f"{SUBNETS} fleets", "fewer", "python -m simulator down --all")


def _make_key(path: Path, comment: str) -> None:
    if path.exists() and path.with_suffix(".pub").exists():
        return
    for half in (path, path.with_suffix(".pub")):
        half.unlink(missing_ok=True)
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)],
        stdin=subprocess.DEVNULL,
        check=True,
    )
