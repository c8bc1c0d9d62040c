"""Where a component's wheel comes from: the wheelhouse, the user's other sources, or a build on some host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.plugin_utils import patch_series, wheel_inspection, wheel_sources
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheelhouse import (
    Look,
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
    if not Path(str(options["path"])).expanduser().is_absolute():
        # the setting may be relative, to the project; who is asked here does not know where that is
        raise Problem(
            f"wheelhouse.path is {options['path']}",
            "an absolute path on the controller",
            "pass jetson_platform_plan.wheelhouse (role jetson_platform); the setting is wheelhouse_path",
        )
    return {**DEFAULTS, **options}


def find_special(
    component: str,
    version: str,
    flags: Sequence[str],
    patch_root: str | None,
    companions: Mapping[str, str | None],
) -> str | None:
    """Return why upstream's ordinary build of a version is not what is wanted, or None where it is.

    What others built is upstream's ordinary build at best, so it serves where this is None. A source of the user's own
    is none of the reasons: it says what to build from if something has to be built.

    Args:
        component: such as mamba_ssm.
        version: of the component.
        flags: NAME=VALUE settings of the build.
        patch_root: folder of the patch series; None or empty for no patches.
        companions: version of every package that a condition of the series may name.

    Raises:
        Problem: the patch series is damaged.
    """
    if flags:
        return f"{component}_build_flags is set"
    if patch_root:
        series = patch_series.load_series(str(patch_root), component, version, companions, applies_to="source")
        if series:
            return "{} is compiled in".format(", ".join(str(patch["file"]) for patch in series))
    return None


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
        special: why upstream's ordinary build will not do (see find_special), or None.
    """

    component: str
    project: str
    version: str
    key: str
    class_id: str
    source_sha256: str
    flags: tuple[str, ...]
    special: str | None

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
            special=component["special"],
        )

    @property
    def ordinary(self) -> bool:
        """Whether a wheel that others built of this version is what is wanted."""
        return self.special is None

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
        broken: {key, row, reason} of each wheel that the wheelhouse names for this very wish and that cannot be used.
        promised: where it will come from, found in check mode, in which nothing is put into the wheelhouse.
    """

    row: Data | None = None
    path: Path | None = None
    reasons: tuple[str, ...] = ()
    broken: tuple[Data, ...] = ()
    promised: str | None = None

    @property
    def faulty(self) -> bool:
        """Whether the wheelhouse names a wheel for this very wish that cannot be used."""
        return bool(self.broken)

    @property
    def served(self) -> Data | None:
        """Return what later steps need to know of the wheel, as plain data, or None where there is none."""
        if self.row is None or self.path is None:
            return None
        names = ("component", "version", "filename", "sha256", "size", "origin", "needed")
        return dict({name: self.row[name] for name in names}, path=str(self.path))


def at_hand(house: Wheelhouse, wish: Wish, rehash: bool = False) -> Supply:
    """Return what the wheelhouse has for a wish: a build of the same inputs, else a wheel that others built.

    Args:
        house: the wheelhouse.
        wish: what is wanted.
        rehash: read the whole wheel, even where it was verified before and looks unchanged.

    Raises:
        Problem: the manifest is damaged.
    """
    # entering a wheel would fail too, so nobody shall build for an hour first
    house.manifest(wish.class_id)
    look = house.look(wish.class_id, wish.key, rehash)
    if look.path is not None:
        return Supply(look.row, look.path)
    looks = [(wish.key, look)] if look.fault else []
    imported = house.find_imported(wish.class_id, wish.component, wish.version)
    for key in imported if wish.ordinary else []:
        look = house.look(wish.class_id, key, rehash)
        if look.path is not None:
            return Supply(look.row, look.path, *_told(looks))
        looks += [(key, look)] if look.fault else []
    reasons, broken = _told(looks)
    if not reasons:
        known = {"key": wish.key, "source_sha256": wish.source_sha256, "flags": list(wish.flags), "sm": wish.sm}
        differs = house.explain(wish.class_id, wish.component, wish.version, known)
        reasons = (f"wheelhouse: {differs}",) if differs else ()
    if imported and not wish.ordinary:
        others = house.manifest(wish.class_id)[imported[0]].get("filename")
        reasons += (f"wheelhouse: imported {others} is not used: {wish.special}",)
    return Supply(broken[0]["row"] if broken else None, None, reasons, broken)


def _told(looks: Sequence[tuple[str, Look]]) -> tuple[tuple[str, ...], tuple[Data, ...]]:
    """Return what to say of wheels that cannot be used, and what to set aside of them."""
    broken = tuple(
        {"key": key, "row": look.row, "reason": str(look.fault)} for key, look in looks if look.row is not None
    )
    return tuple(f"wheelhouse: {look.fault}" for _key, look in looks), broken


def find(
    house: Wheelhouse,
    wish: Wish,
    options: Mapping[str, Any],
    cache: str,
    say: Say,
    dry: bool = False,
    rehash: bool = True,
) -> Supply:
    """Return the wheel for a wish from the wheelhouse or, put into it now, from another source. Builds nothing.

    A wheel that cannot be used is set aside where another one is there in its place.

    Args:
        house: the wheelhouse.
        wish: what is wanted.
        options: see complete().
        cache: the controller's artefact cache.
        say: shows a line to the user.
        dry: put nothing into the wheelhouse (check mode).
        rehash: see at_hand(). What is found here is sent to devices, so only who has just done it leaves it out.

    Raises:
        Problem: a source has a wheel that must not be used.
    """
    supply = at_hand(house, wish, rehash)
    if supply.path is not None:
        if supply.faulty and not dry:
            discard(house, wish, supply, say)
        return supply
    if not options["sources"]:
        return supply
    if not wish.ordinary:
        return replace(supply, reasons=(*supply.reasons, f"wheelhouse_sources are not asked: {wish.special}"))
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
        return replace(known, reasons=(*known.reasons, *search.reasons))
    look = inspected[offer.sha256]
    for warning in look.warnings:
        say(f"{offer.filename}: {warning}")
    if dry:
        return replace(known, promised=offer.origin)
    if known.faulty:
        discard(house, wish, known, say)
    row = house.add(offer.path, wish.row(offer.sha256, offer.origin, offer.filename, look.needed))
    say(f"{offer.filename}: taken from {offer.origin}")
    return Supply(row, house.path_of(row))


def nowhere(wish: Wish, house: Wheelhouse, known: Supply) -> Problem:
    """Return the problem that a wheel is nowhere and that nothing may be built."""
    why = "".join(f"; {reason}" for reason in known.reasons)
    # what others built would not be used either
    elsewhere = (
        "import one: ansible-playbook playbooks/wheelhouse.yml -e wheelhouse_action=import …; name a source that has "
        "it: wheelhouse_sources; or "
        if wish.ordinary
        else "take back what the reason names, or another version; or "
    )
    return Problem(
        f"no wheel of {wish.component} {wish.version} for class {wish.class_id} in {house.root} or another source{why}",
        "a wheel that is there already (wheelhouse_build is false)",
        f"{elsewhere}let it be built: -e wheelhouse_build=true",
    )


def discard(house: Wheelhouse, wish: Wish, known: Supply, say: Say) -> None:
    """Set wheels aside that can't be used, and say why."""
    for one in known.broken:
        place = house.set_aside(wish.class_id, one["key"], one["reason"], seen=one["row"])
        say(f"{wish.component} {wish.version}: wheelhouse: {one['reason']}; set aside as {place}")


def inspect(wish: Wish, wheel: Path) -> wheel_inspection.Inspection:
    """Look into a wheel for what a wish wants.

    Raises:
        Problem: it is something else.
    """
    return inspect_row(wheel, wish.row("", "", wheel.name, []))


def keep(
    house: Wheelhouse,
    wish: Wish,
    wheel: Path,
    built: Mapping[str, Any],
    log: Path | None,
    inspected: wheel_inspection.Inspection | None = None,
) -> Supply:
    """Inspect a wheel that a host has built and put it into the wheelhouse.

    Args:
        house: the wheelhouse.
        wish: what it was built for.
        wheel: the fetched file.
        built: {sha256, builder, l4t, seconds, source} of the build.
        log: the build's whole log, or None.
        inspected: what inspect() has found in it, where it was looked into already.

    Raises:
        Problem: it is not what was to be built.
    """
    row = wish.row(str(built["sha256"]), "built on {}".format(built["builder"]), wheel.name, [])
    inspected = inspected or inspect(wish, wheel)
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
