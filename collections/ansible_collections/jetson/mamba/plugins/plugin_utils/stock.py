"""What a host is sent, as verified files on the controller, fetched where the cache lacks them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ansible_collections.jetson.mamba.plugins.module_utils import wheels
from ansible_collections.jetson.mamba.plugins.module_utils.versions import Target
from ansible_collections.jetson.mamba.plugins.plugin_utils import deb_resolver, fetch, locks, supply
from ansible_collections.jetson.mamba.plugins.plugin_utils.transfer import Parcel
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheelhouse import Wheelhouse


def locked_files(
    entries: Sequence[locks.Locked],
    target: Target,
    cache: fetch.Cache,
    progress: fetch.Report | None = None,
    names: Collection[str] | None = None,
) -> list[fetch.Wheel]:
    """Return the wheels of a lock.

    Args:
        entries: the lines of the lock.
        target: what wheels must be for.
        cache: the controller's cache.
        progress: called with a line of text, at most every 15 seconds.
        names: those that are wanted; None for all.

    Raises:
        Problem: a wheel cannot be had.
    """
    return [
        fetch.ensure_locked(entry, target, cache, progress) for entry in entries if names is None or entry.name in names
    ]


def extra_file(
    wheel: dict[str, Any],
    target: Target | None,
    cache: fetch.Cache,
    trust: bool,
    progress: fetch.Report | None = None,
) -> fetch.Wheel:
    """Return a wheel that no lock names, looked into.

    Raises:
        Problem: it cannot be had, or is for another machine.
    """
    found = fetch.ensure_wheel(wheel, cache, trust, progress)
    if target is not None:
        wheels.check_archive(found.path, target)
    return found


def needed(plan: Mapping[str, Any], progress: fetch.Report | None = None) -> list[Parcel]:
    """Return the wheels and Debian packages that a host's plan will have sent to it, as far as they are known by now.

    Args:
        plan: the host's plan.
        progress: called with a line of text, at most every 15 seconds.

    Raises:
        Problem: a wheel cannot be had.
    """
    found: list[Parcel] = []
    outcomes = plan.get("outcomes") or []
    if "torch_jetpack" in outcomes:
        artefacts = plan["artefacts"]
        cache = fetch.Cache(artefacts["cache"])
        target = Target.from_dict(artefacts["target"])
        entries = locks.read_lock(artefacts["lock"], target) if artefacts["lock"] else []
        files = locked_files(entries, target, cache, progress)
        trust = bool(artefacts.get("trust_on_first_use"))
        files += [extra_file(wheel, target, cache, trust, progress) for wheel in artefacts["extra"]]
        found += [Parcel(file.path, file.sha256, file.filename) for file in files]
    # what the controller has fetched for this host; no other source of packages sends the same files to two hosts
    if outcomes and plan.get("package_files"):
        found += deb_resolver.parcels(plan["package_files"], fetch.Cache(plan["artefacts"]["cache"]))
    for name, component in (plan.get("components") or {}).items():
        if name not in outcomes:
            continue
        # what was built in this run is in the wheelhouse, but not yet in the plan
        served = component.get("served") or _at_hand(plan, name)
        if served:
            found.append(Parcel(served["path"], served["sha256"], os.path.basename(served["path"])))
    return found


def _at_hand(plan: Mapping[str, Any], component: str) -> Mapping[str, Any] | None:
    """Return what the wheelhouse has of a component for a host."""
    if not plan.get("wheelhouse"):
        return None
    house = Wheelhouse(supply.complete(plan["wheelhouse"])["path"])
    return supply.at_hand(house, supply.Wish.of_plan(plan, component)).served


def size(parcel: Parcel) -> int:
    """Return the bytes of a parcel."""
    return os.path.getsize(parcel.path)
