"""What a way of running hosts must offer; Linux namespaces are one, a container engine could be another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simulator.definition import HostSpec


@dataclass(frozen=True)
class Host:
    """A host as it is: its wish, and where it lives.

    Args:
        spec: what it is wished to be.
        address: its IPv4 address.
        number: its place in the fleet, from 1.
        folder: its files, relative to the store.
        layers: its read-only layers, uppermost first, the base last, relative to the store.
    """

    spec: HostSpec
    address: str
    number: int
    folder: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Network:
    """A fleet's network.

    Args:
        name: name of the fleet's kernel objects, no other fleet's on this machine.
        gateway: the address at which the network itself answers.
        prefix: length of the network's prefix.
    """

    name: str
    gateway: str
    prefix: int


class Backend(ABC):
    """Starts and stops hosts; holds no state but what the machine itself shows."""

    @abstractmethod
    def check(self, hosts: int = 0) -> None:
        """Raise a Problem if this machine cannot run hosts, or not so many more."""

    @abstractmethod
    def open_network(self, network: Network) -> None:
        """Make the fleet's network; there already is fine. Raises Problem."""

    @abstractmethod
    def close_network(self, network: str) -> None:
        """End every process of the fleet and remove its network and all else that the kernel holds of it."""

    @abstractmethod
    def networks(self, prefix: str) -> list[str]:
        """Return the names of networks that exist, whole or in remnants, and begin with prefix."""

    @abstractmethod
    def start(self, network: Network, host: Host) -> None:
        """Start a host, from its own files if it ran before. Raises Problem."""

    @abstractmethod
    def stop(self, network: Network, host: Host, graceful: bool = False) -> None:
        """End all of a host's processes; graceful: let its init shut down first."""

    @abstractmethod
    def pid(self, network: Network, host: Host) -> int | None:
        """Return the machine's number of the host's process 1, None if the host is off."""

    @abstractmethod
    def command(self, network: Network, host: Host, argv: Sequence[str]) -> list[str]:
        """Return the command that runs argv as root inside a running host. Raises Problem if it is off."""

    @abstractmethod
    def proxy_command(self, network: str) -> str:
        """Return ssh's ProxyCommand to the fleet's hosts, with ssh's own %h and %p."""

    @abstractmethod
    def banner(self, network: str, address: str, timeout_s: float) -> str:
        """Return the first line that address sends on port 22; empty if none comes in time."""

    @abstractmethod
    def log(self, host: Host) -> Path:
        """Return the file of what a host's start and its init print."""
