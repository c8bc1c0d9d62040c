"""Fleets over a backend that only remembers: definitions, addresses, snapshots, messages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from simulator import base, manager, requirements
from simulator.backend import Backend, Host, Network
from simulator.errors import Problem
from simulator.manager import Manager
from simulator.store import Store, read_json


class Remembers(Backend):
    """A backend without a machine."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.open: set[str] = set()
        self.on: set[str] = set()
        self.refuses: set[str] = set()
        self.graceful: list[str] = []

    def check(self, hosts: int = 0) -> None:
        pass

    def open_network(self, network: Network) -> None:
        self.open.add(network.name)

    def close_network(self, network: str) -> None:
        self.open.discard(network)
        self.on = {name for name in self.on if not name.startswith(f"{network}/")}

    def networks(self, prefix: str) -> list[str]:
        return sorted(name for name in self.open if name.startswith(prefix))

    def start(self, network: Network, host: Host) -> None:
        if host.spec.name in self.refuses:
            raise Problem(f"{host.spec.name} refuses", "it starts", "ask again")
        (self.store.root / host.folder / "upper").mkdir(exist_ok=True)
        (self.store.root / host.folder / "work").mkdir(exist_ok=True)
        self.on.add(f"{network.name}/{host.spec.name}")

    def stop(self, network: Network, host: Host, graceful: bool = False) -> None:
        if graceful:
            self.graceful.append(host.spec.name)
        self.on.discard(f"{network.name}/{host.spec.name}")

    def pid(self, network: Network, host: Host) -> int | None:
        return 42 if f"{network.name}/{host.spec.name}" in self.on else None

    def command(self, network: Network, host: Host, argv: Sequence[str]) -> list[str]:
        return ["echo", "running"]

    def proxy_command(self, network: str) -> str:
        return f"enter {network} %h:%p"

    def banner(self, network: str, address: str, timeout_s: float) -> str:
        return "SSH-2.0-remembered"

    def log(self, host: Host) -> Path:
        return self.store.root / host.folder / "console.log"


@pytest.fixture
def fleets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manager:
    """A manager whose base is there and whose keys cost nothing."""
    store = Store(tmp_path / "a place")

    def make_key(path: Path, comment: str) -> None:
        if not path.exists():
            path.write_text("private\n")
            path.with_suffix(".pub").write_text(f"ssh-ed25519 {comment}{path.parent.name} {comment}\n")

    def ensure(store: Store) -> str:
        (store.root / base.rootfs("there")).mkdir(parents=True, exist_ok=True)
        return "there"

    monkeypatch.setattr(manager, "_make_key", make_key)
    monkeypatch.setattr(base, "ensure", ensure)
    monkeypatch.setattr(requirements, "check", lambda: None)
    return Manager(store, Remembers(store))


def backend(fleets: Manager) -> Remembers:
    assert isinstance(fleets.backend, Remembers)
    return fleets.backend


def test_up_writes_what_ansible_needs(fleets: Manager) -> None:
    fleet = fleets.up("mine", None, None, None)
    folder = fleets.folder(fleet)
    group = yaml.safe_load((folder / "inventory.yml").read_text())["all"]["children"]["jetsons"]
    addresses = [host["ansible_host"] for host in group["hosts"].values()]
    assert list(group["hosts"]) == ["orin-a", "orin-b", "orin-c"]
    assert len(set(addresses)) == 3
    assert group["vars"]["ansible_user"] == "jetson"
    assert group["vars"]["ansible_ssh_private_key_file"] == str(folder / "key")
    arguments = group["vars"]["ansible_ssh_common_args"]
    assert f"""'UserKnownHostsFile="{folder / "known_hosts"}"'""" in arguments
    assert "StrictHostKeyChecking=yes" in arguments
    assert f"'ProxyCommand=enter {fleet.network.name} %h:%p'" in arguments
    known = (folder / "known_hosts").read_text().splitlines()
    assert [line.split()[0].split(",")[0] for line in known] == addresses


def test_up_again_starts_only_what_is_off(fleets: Manager) -> None:
    fleet = fleets.up("mine", None, None, None)
    known = (fleets.folder(fleet) / "known_hosts").read_text()
    assert fleets.power_off("mine", "orin-b") is True
    assert fleets.power_off("mine", "orin-b") is False
    fleets.up("mine", None, None, None)
    assert len(backend(fleets).on) == 3
    assert (fleets.folder(fleet) / "known_hosts").read_text() == known
    assert fleets.power_on("mine", "orin-b") is False


def test_another_definition_of_a_fleet_that_is_there_is_refused(fleets: Manager) -> None:
    fleets.up("mine", None, 2, None)
    fleets.up("mine", None, None, None)  # no wish: as it is
    with pytest.raises(Problem) as caught:
        fleets.up("mine", None, 3, None)
    assert caught.value.next_step == "python -m simulator down --fleet mine"


def test_every_host_that_fails_is_named_and_the_rest_is_up(fleets: Manager) -> None:
    backend(fleets).refuses = {"orin-01", "orin-03"}
    with pytest.raises(Problem, match=r"orin-01 refuses; orin-03 refuses"):
        fleets.up("mine", None, 3, None)
    assert len(backend(fleets).on) == 1
    backend(fleets).refuses = set()
    fleets.up("mine", None, 3, None)
    assert len(backend(fleets).on) == 3


def test_fleets_share_neither_names_nor_addresses(fleets: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "SUBNETS", 2)  # so that two fleets meet
    one, two = fleets.up("one", None, 2, None), fleets.up("two", None, 2, None)
    assert one.network.name != two.network.name
    assert not {host.address for host in one.hosts} & {host.address for host in two.hosts}
    with pytest.raises(Problem, match="2 fleets"):
        fleets.up("three", None, 1, None)


def test_two_checkouts_never_share_a_kernel_object(tmp_path: Path) -> None:
    assert Store(tmp_path / "a").tag != Store(tmp_path / "b").tag


def test_down_removes_all_and_is_repeatable(fleets: Manager) -> None:
    fleets.up("mine", None, 1, None)
    assert fleets.down("mine") is True
    assert backend(fleets).open == set() and backend(fleets).on == set()
    assert not fleets.store.fleets.exists()
    assert sorted(path.name for path in fleets.store.root.iterdir()) == ["bases"]
    assert fleets.down("mine") is False


def test_down_finds_what_only_the_kernel_knows(fleets: Manager) -> None:
    network = Network(f"jetsim-{fleets.store.tag}-lost", "198.18.0.1", 24)
    fleets.backend.open_network(network)
    assert fleets.remnants() == ["lost"]
    assert fleets.down("lost") is True
    assert fleets.remnants() == []


def test_a_fleet_that_was_cut_off_before_its_definition_hides_no_other(fleets: Manager) -> None:
    fleets.up("mine", None, 1, None)
    (fleets.store.fleets / "cut-off").mkdir()
    assert [fleet.name for fleet in fleets.known()] == ["mine"]
    assert fleets.remnants() == ["cut-off", "mine"]
    assert fleets.down("cut-off") is True
    assert fleets.remnants() == ["mine"]


def test_a_snapshot_becomes_a_layer_of_its_host_and_of_new_ones(fleets: Manager) -> None:
    fleet = fleets.up("mine", None, None, None)
    upper = fleets.store.root / fleet.hosts[0].folder / "upper"
    (upper / "mark").write_text("provisioned")
    fleets.snapshot("mine", "orin-a", "shot")
    assert backend(fleets).graceful == ["orin-a"]
    assert (fleets.store.snapshots / "shot/layer/mark").read_text() == "provisioned"
    assert list(upper.iterdir()) == []
    layers = ("snapshots/shot/layer", "bases/there/rootfs")
    assert fleets.fleet("mine").hosts[0].layers == layers
    assert len(backend(fleets).on) == 3
    other = fleets.up("other", None, None, "shot")
    assert [host.layers for host in other.hosts] == [layers, layers, layers[1:]]  # orin-c is of another platform
    with pytest.raises(Problem, match="stands on snapshot shot"):
        fleets.forget("shot")
    with pytest.raises(Problem, match="there already"):
        fleets.snapshot("mine", "orin-b", "shot")
    fleets.snapshot("other", "orin-a", "second")
    fleets.down("mine")
    fleets.down("other")
    with pytest.raises(Problem, match="snapshot second stands on shot"):
        fleets.forget("shot")
    fleets.forget("second")
    fleets.forget("shot")
    assert fleets.store.names(fleets.store.snapshots) == []


def test_a_snapshot_of_a_host_that_is_off_leaves_it_off(fleets: Manager) -> None:
    fleets.up("mine", None, 1, None)
    fleets.power_off("mine", "orin-01")
    fleets.snapshot("mine", "orin-01", "shot")
    assert backend(fleets).on == set()


def test_hosts_by_number_take_the_snapshots_platform(fleets: Manager) -> None:
    fleets.up("mine", None, None, None)
    fleets.snapshot("mine", "orin-c", "shot")
    other = fleets.up("other", None, 2, "shot")
    assert {(host.spec.l4t, host.spec.cuda) for host in other.hosts} == {("36.3.0", "12.2")}


def test_a_fleet_file_may_not_put_a_host_on_another_platforms_snapshot(fleets: Manager, tmp_path: Path) -> None:
    fleets.up("mine", None, None, None)
    fleets.snapshot("mine", "orin-c", "shot")
    file = tmp_path / "fleet.yml"
    file.write_text("hosts: {one: {l4t: '36.4.7', cuda: '12.6', from: shot}}\n")
    with pytest.raises(Problem, match=r"snapshot shot is of L4T 36\.3\.0"):
        fleets.up("other", file, None, None)
    assert not (fleets.store.fleets / "other").exists()


def test_names_that_are_not_there_get_the_nearest_that_is(fleets: Manager) -> None:
    fleets.up("mine", None, None, None)
    fleets.up("yours", None, 1, None)
    fleet = fleets.fleet("mine")
    cases = [
        (lambda: fleets.fleet("mime"), "did you mean 'mine'?"),
        (lambda: fleets.host(fleet, "orin-"), "did you mean 'orin-"),
        (lambda: fleets.host(fleet, "orin-01"), "add --fleet yours"),
        (lambda: fleets.read_snapshot("shot"), "python -m simulator snapshot HOST NAME"),
    ]
    for ask, answer in cases:
        with pytest.raises(Problem) as caught:
            ask()
        assert caught.value.next_step.startswith(answer)


def test_a_fleet_survives_being_written_and_read(fleets: Manager) -> None:
    fleet = fleets.up("mine", None, None, None)
    assert read_json(fleets.folder(fleet) / "fleet.json")["schema"] == 1
    assert fleets.fleet("mine") == fleet
