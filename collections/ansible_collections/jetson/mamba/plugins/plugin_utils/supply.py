"""Where a component's wheel comes from: the wheelhouse, the user's other sources, or a build on some host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.plugin_utils import wheel_inspection, wheel_sources
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheelhouse import (
    Wheelhouse,
    inspect_row,
    parse_class_id,
)

Data = dict[str, Any]
Say = Callable[[str], Any]
# of the plan's part about the wheelhouse
DEFAULTS: Data = {"sources": [], "sha256": {}, "trust_on_first_use": False, "build": True, "patience_minutes": 240}


def complete(options: Mapping[str, Any]) -> Data:
    """Return the plan's part about the wheelhouse, whole.

    Args:
        options: path (required), sources, sha256, trust_on_first_use, build, patience_minutes.

    Raises:
        Problem: the path is missing, or an option is unknown.
    """
    unknown = sorted(set(options) - set(DEFAULTS) - {"path"})
    if unknown or not options.get("path"):
        raise Problem(
            f"wheelhouse has {', '.join(unknown)}" if unknown else "wheelhouse names no path",
            f"path, and any of {', '.join(DEFAULTS)}",
            "pass jetson_platform_plan.wheelhouse (role jetson_platform)",
        )
    return {**DEFAULTS, **options}


@dataclass(frozen=True)
class Wish:
    """The wheel that a host wants.

    Args:
        component: such as mamba_ssm.
        project: its name in a package index.
        version: of the component.
        key: of the build that would make it.
        class_id: what a binary needs of the host.
        source_sha256: digest of the packed source.
        flags: NAME=VALUE settings of the build.
    """

    component: str
    project: str
    version: str
    key: str
    class_id: str
    source_sha256: str
    flags: tuple[str, ...]

    @classmethod
    def of_plan(cls, plan: Mapping[str, Any], name: str) -> Wish:
        """Return the wish for a component of a host's plan."""
        component = plan["components"][name]
        return cls(
            component=name,
            project=component["project"],
            version=component["version"],
            key=component["key"],
            class_id=plan["class_id"],
            source_sha256=component["source_sha256"],
            flags=tuple(component["build_flags"]),
        )

    @property
    def sm(self) -> str:
        """The GPU's number, or "cpu"."""
        return parse_class_id(self.class_id).sm

    def row(self, sha256: str, origin: str, filename: str, needed: list[str]) -> Data:
        """Return a row of the manifest for a wheel that others built."""
        return {
            "component": self.component,
            "version": self.version,
            "class_id": self.class_id,
            "filename": filename,
            "sha256": sha256,
            "origin": origin,
            "sm": self.sm,
            "flags": list(self.flags),
            "needed": needed,
        }


@dataclass(frozen=True)
class Supply:
    """What the controller has for a wish.

    Args:
        row: of the wheelhouse's manifest, or None.
        path: the verified wheel, or None.
        reasons: why nothing, or nothing else, will do.
        faulty: whether the wheelhouse names a wheel for this very wish that cannot be used.
        promised: where it will come from, found in check mode, in which nothing is put into the wheelhouse.
    """

    row: Data | None = None
    path: Path | None = None
    reasons: tuple[str, ...] = ()
    faulty: bool = False
    promised: str | None = None

    @property
    def served(self) -> Data | None:
        """Return what later steps need to know of the wheel, as plain data, or None where there is none."""
        if self.row is None or self.path is None:
            return None
        names = ("component", "version", "filename", "sha256", "size", "origin", "needed")
        return dict({name: self.row[name] for name in names}, path=str(self.path))


def at_hand(house: Wheelhouse, wish: Wish) -> Supply:
    """Return what the wheelhouse has for a wish: a build of the same inputs, else an imported wheel.

    Raises:
        Problem: the manifest is damaged.
    """
    # entering a wheel would fail too, so nobody shall build for an hour first
    house.manifest(wish.class_id)
    look = house.look(wish.class_id, wish.key)
    if look.row is not None and look.path is not None and not look.fault:
        return Supply(look.row, look.path)
    if look.fault:
        return Supply(look.row, None, (f"wheelhouse: {look.fault}",), faulty=look.row is not None)
    imported = house.find_imported(wish.class_id, wish.component, wish.version)
    if imported is not None:
        found = house.look(wish.class_id, imported["key"])
        if found.path is not None and not found.fault:
            return Supply(found.row, found.path)
        return Supply(found.row, None, (f"wheelhouse: {found.fault}",), faulty=found.row is not None)
    known = {"key": wish.key, "source_sha256": wish.source_sha256, "flags": list(wish.flags), "sm": wish.sm}
    differs = house.explain(wish.class_id, wish.component, wish.version, known)
    return Supply(reasons=(f"wheelhouse: {differs}",) if differs else ())


def find(
    house: Wheelhouse, wish: Wish, options: Mapping[str, Any], cache: str, say: Say, dry: bool = False
) -> Supply:
    """Return the wheel for a wish from the wheelhouse or, put into it now, from another source. Builds nothing.

    Args:
        house: the wheelhouse.
        wish: what is wanted.
        options: see complete().
        cache: the controller's artefact cache.
        say: shows a line to the user.
        dry: put nothing into the wheelhouse (check mode).

    Raises:
        Problem: a source has a wheel that must not be used.
    """
    supply = at_hand(house, wish)
    if supply.path is not None or not options["sources"]:
        return supply
    if dry:
        return _from_sources(house, wish, options, cache, say, supply, dry)
    with house.locked(wish.class_id, wish.component, wish.key, say, options["patience_minutes"] * 60):
        # another host's task, or another controller, may have put it there meanwhile
        supply = at_hand(house, wish)
        if supply.path is not None:
            return supply
        return _from_sources(house, wish, options, cache, say, supply, dry)


def _from_sources(
    house: Wheelhouse, wish: Wish, options: Mapping[str, Any], cache: str, say: Say, known: Supply, dry: bool
) -> Supply:
    inspected: dict[str, wheel_inspection.Inspection] = {}

    def accept(offer: wheel_sources.Offer) -> None:
        inspected[offer.sha256] = inspect_row(offer.path, wish.row(offer.sha256, offer.origin, offer.filename, []))

    search = wheel_sources.find(
        options["sources"],
        wish.component,
        wish.project,
        wish.version,
        parse_class_id(wish.class_id).target,
        options["sha256"],
        options["trust_on_first_use"],
        cache,
        say,
        class_id=wish.class_id,
        accept=accept,
    )
    offer = search.offer
    if offer is None:
        return Supply(known.row, None, (*known.reasons, *search.reasons), known.faulty)
    look = inspected[offer.sha256]
    for warning in look.warnings:
        say(f"{offer.filename}: {warning}")
    if dry:
        return Supply(known.row, None, known.reasons, known.faulty, promised=offer.origin)
    if known.faulty:
        discard(house, wish, known, say)
    row = house.add(offer.path, wish.row(offer.sha256, offer.origin, offer.filename, look.needed))
    say(f"{offer.filename}: taken from {offer.origin}")
    return Supply(row, house.path_of(row))


def nowhere(wish: Wish, house: Wheelhouse, known: Supply) -> Problem:
    """Return the problem that a wheel is nowhere and that nothing may be built."""
    why = "".join(f"; {reason}" for reason in known.reasons)
    return Problem(
        f"no wheel of {wish.component} {wish.version} for class {wish.class_id} in {house.root} or another source{why}",
        "a wheel that is there already (wheelhouse_build is false)",
        "import one: ansible-playbook playbooks/wheelhouse.yml -e wheelhouse_action=import …; name a source that has "
        "it: wheelhouse_sources; or let it be built: -e wheelhouse_build=true",
    )


def discard(house: Wheelhouse, wish: Wish, known: Supply, say: Say) -> None:
    """Set a wheel aside that can't be used, and say why."""
    reason = "; ".join(known.reasons)
    assert known.row is not None
    place = house.set_aside(wish.class_id, str(known.row.get("key") or wish.key), reason, seen=known.row)
    say(f"{wish.component} {wish.version}: {reason}; set aside as {place}")


def inspect(wish: Wish, wheel: Path) -> wheel_inspection.Inspection:
    """Look into a wheel for what a wish wants.

    Raises:
        Problem: it is something else.
    """
    return inspect_row(wheel, wish.row("", "", wheel.name, []))


def keep(house: Wheelhouse, wish: Wish, wheel: Path, built: Mapping[str, Any], log: Path | None) -> Supply:
    """Inspect a wheel that a host has built and put it into the wheelhouse.

    Args:
        house: the wheelhouse.
        wish: what it was built for.
        wheel: the fetched file.
        built: {sha256, builder, l4t, seconds, source} of the build.
        log: the build's whole log, or None.

    Raises:
        Problem: it is not what was to be built.
    """
    row = wish.row(str(built["sha256"]), "built on {}".format(built["builder"]), wheel.name, [])
    inspected = inspect(wish, wheel)
    row.update(
        key=wish.key,
        source=built["source"],
        source_sha256=wish.source_sha256,
        builder=built["builder"],
        l4t=built["l4t"],
        seconds=built["seconds"],
        needed=inspected.needed,
    )
    added = house.add(wheel, row, log)
    return Supply(added, house.path_of(added))
