"""List, verify, fill and prune the controller's wheelhouse."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.versions import (
    canonical_name,
    parse_wheel_name,
    tag_mismatch,
)
from ansible_collections.jetson.mamba.plugins.modules.wheelhouse import MODES, argument_spec
from ansible_collections.jetson.mamba.plugins.plugin_utils import components, fetch, settings, wheel_sources
from ansible_collections.jetson.mamba.plugins.plugin_utils import wheelhouse as store
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheelhouse_lock import duration

display = Display()
_COLUMNS = ("component", "version", "key", "MB", "added (UTC)", "took", "origin")
_RIGHT = ("MB", "took")


class ActionModule(ActionBase):
    """Runs on the controller alone: no host is contacted."""

    _requires_connection = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run the task; returns its result."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, options = self.validate_argument_spec(argument_spec())
        try:
            mode = str(options["mode"])
            if mode not in MODES:
                near = difflib.get_close_matches(mode, MODES, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise Problem(f"wheelhouse_action '{mode}'{hint}", f"one of {', '.join(MODES)}", "correct it")
            project = Path(options["project"])
            check_variables(task_vars or {}, project / "roles")
            house = store.open_store(options["path"], project)
            made = getattr(self, f"_{mode}")(house, options, bool(self._task.check_mode))
        except Problem as problem:
            return {**result, **_failure(problem)}
        return {**result, **made}

    def _list(self, house: store.Wheelhouse, _options: dict[str, Any], _check: bool) -> dict[str, Any]:
        return self._done(house, [])

    def _verify(self, house: store.Wheelhouse, _options: dict[str, Any], check: bool) -> dict[str, Any]:
        tick = fetch.Ticker(_say)
        findings = house.verify(store.inspect_row, check, tick)
        changes = []
        for finding in findings:
            name = _name(finding.row)
            for warning in finding.warnings:
                _say(f"{name}: {warning}")
            if finding.fault:
                place = f"set aside as {finding.aside}" if finding.aside else "would be set aside"
                changes.append(f"{name}: {finding.fault} ({place})")
        if changes:
            refusal = Problem(
                _items(f"{len(changes)} of {len(findings)} wheels in {house.root} are wrong", changes, house.root),
                "wheels whose checksum, key and content are what their manifest says",
                "run it without --check to set them aside"
                if check
                else "the next run builds or fetches them anew; what was set aside lies in aside/, with the reason",
            )
            return {**_failure(refusal), "changed": not check}
        return self._done(house, [], f"{len(findings)} wheels verified, all are what they were when they came in")

    def _import(self, house: store.Wheelhouse, options: dict[str, Any], check: bool) -> dict[str, Any]:
        if not options["import_path"] or not options["class_id"]:
            raise Problem(
                "wheelhouse_action is import, and wheelhouse_import or wheelhouse_class is not set",
                "the file or folder to import, and the platform class that it was built for",
                "-e wheelhouse_import=FOLDER -e wheelhouse_class=CLASS; a run's plan and the list show the classes",
            )
        class_id = str(options["class_id"])
        wheel_sources.check_sources([], options["sha256"])
        path = Path(options["project"]) / Path(str(options["import_path"])).expanduser()
        wheels, left = find_wheels(path, class_id)
        for text in left:
            _say(f"left out: {text}")
        changes, problems = [], []
        for wheel, component in wheels:
            try:
                row, changed = house.import_wheel(
                    wheel,
                    class_id,
                    component,
                    sha256=options["sha256"].get(wheel.name),
                    inspect=store.inspect_row,
                    check=check,
                )
            except Problem as problem:
                problems.append(f"{problem.found}; expected: {problem.expected}; next: {problem.next_step}")
                continue
            if changed:
                changes.append(f"{component} {row['version']} from {wheel}")
            else:
                _say(f"{wheel.name} is there already")
        if problems:
            refusal = Problem(
                _items(f"{len(problems)} of {len(wheels)} wheels are refused", problems),
                f"wheels for {class_id}",
                "replace these wheels or leave them out; the next run builds what the wheelhouse lacks"
                + _items(f"\n{'would be ' if check else ''}imported:", changes) * bool(changes),
            )
            return {**_failure(refusal), "changed": bool(changes)}
        return self._done(house, changes, "", come=True, check=check)

    def _prune(self, house: store.Wheelhouse, options: dict[str, Any], check: bool) -> dict[str, Any]:
        removals = house.prune(options["keep"], options["aside_days"], check)
        changes = [f"{one.path} ({_megabytes(one.size)} MB): {one.reason}" for one in removals]
        freed = _megabytes(sum(one.size for one in removals))
        text = f"{'would free' if check else 'freed'} {freed} MB" if changes else "nothing to prune"
        return self._done(house, changes, text, check=check)

    def _unlock(self, house: store.Wheelhouse, _options: dict[str, Any], check: bool) -> dict[str, Any]:
        found = house.unlock(check)
        for lock in found:
            if not lock.removed:
                _say(f"kept: {lock.path}, held by {lock.owner}: {lock.reason}")
        changes = [f"{lock.path}, held by {lock.owner}: {lock.reason}" for lock in found if lock.removed]
        return self._done(house, changes, "" if found else "there are no locks", check=check)

    def _done(
        self, house: store.Wheelhouse, changes: list[str], text: str = "", *, come: bool = False, check: bool = False
    ) -> dict[str, Any]:
        """Print what changed and the table; returns the task's result."""
        verb = "imported" if come else "removed"
        lines = [f"{'would be ' if check else ''}{verb}: {change}" for change in changes]
        table = render(house)
        display.display("\n".join([*lines, *([text] if text else []), *table]))
        listed = "".join(f"{change}\n" for change in changes)
        result: dict[str, Any] = {
            "changed": bool(changes),
            "changes": changes,
            "table": table,
            "wheels": list(house.rows()),
        }
        if changes and self._task.diff:
            header = str(house.root)
            before, after = ("", listed) if come else (listed, "")
            result["diff"] = [{"before": before, "after": after, "before_header": header, "after_header": header}]
        return result


def _failure(problem: Problem) -> dict[str, Any]:
    return {"failed": True, "msg": problem.render(), "problem": problem.as_dict()}


def _items(head: str, lines: Sequence[str], root: Path | None = None) -> str:
    """Return a list under its head; paths below root are shortened."""
    texts = [" ".join(line.split()) for line in lines]
    return "\n  - ".join([head, *(text.replace(f"{root}/", "") if root else text for text in texts)])


def check_variables(names: Iterable[str], roles: Path) -> None:
    """Raise a Problem where a variable has the wheelhouse's prefix, or nearly one of its names, and is none.

    Args:
        names: all variables of the task.
        roles: the project's roles.
    """
    specs = settings.read_role_specs(roles)
    known = {"wheelhouse": {**specs.get("wheelhouse", {}), **{name: {} for name in store.PLAYBOOK_VARIABLES}}}
    others = {option for options in specs.values() for option in options}
    unknown = settings.find_unknown_variables(names, known, others)
    if unknown:
        first = unknown[0]
        found = ", ".join(problem["found"] for problem in unknown)
        raise Problem(found, first["expected"], first["next"])


def find_wheels(path: Path, class_id: str) -> tuple[list[tuple[Path, str]], list[str]]:
    """Return the wheels to import with their components, and a line for each file that is left out.

    Args:
        path: a wheel, which must be of a component, or a folder.
        class_id: what the wheels of a folder must be for, by name.

    Raises:
        Problem: there is nothing to import.
    """
    target = store.parse_class_id(class_id).target
    projects = {canonical_name(row["project"]): name for name, row in components.load_table().items()}
    if not path.exists():
        raise Problem(f"there is no {path}", "a wheel or a folder of wheels", "correct wheelhouse_import")
    wheels, left = [], []
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        try:
            name = parse_wheel_name(file.name)
        except ValueError as error:
            left.append(str(error))
            continue
        component = projects.get(canonical_name(name.name))
        mismatch = tag_mismatch(name, target) if path.is_dir() else None
        if component is None:
            left.append(f"{file.name} is no wheel of {', '.join(sorted(projects.values()))}")
        elif mismatch:
            left.append(f"{file.name}: {mismatch}")
        else:
            wheels.append((file, component))
    if not wheels:
        raise Problem(
            f"nothing to import in {path}" + "".join(f"\n  - {text}" for text in left),
            f"wheels of {', '.join(sorted(projects.values()))} for {target.describe()}",
            "correct wheelhouse_import or wheelhouse_class",
        )
    return wheels, left


def render(house: store.Wheelhouse) -> list[str]:
    """Return the wheelhouse as a table, class by class, with what else is worth knowing.

    Raises:
        Problem: a manifest is damaged.
    """
    if not house.classes():
        return [f"{house.root} holds no wheels"]
    lines = [f"wheelhouse {house.root}"]
    for class_id in house.classes():
        rows = sorted(house.manifest(class_id).values(), key=lambda row: (str(row.get("component")), _added(row)))
        cells = [_cells(row) for row in rows]
        widths = [max(len(line[place]) for line in [list(_COLUMNS), *cells]) for place in range(len(_COLUMNS))]
        lines += ["", class_id]
        for line in [list(_COLUMNS), *cells] if cells else []:
            padded = [
                cell.rjust(width) if column in _RIGHT else cell.ljust(width)
                for cell, width, column in zip(line, widths, _COLUMNS, strict=True)
            ]
            lines.append("  " + "  ".join(padded).rstrip())
        lines += ["  no wheels"] if not cells else []
        lines += [f"  {text}" for text in _remarks(house, class_id)]
    return lines


def _remarks(house: store.Wheelhouse, class_id: str) -> list[str]:
    folder = house.folder(class_id)
    remarks = []
    strays = [str(path.relative_to(folder)) for path in house.strays(class_id)]
    if strays:
        remarks.append(
            f"in no manifest, and so not used: {', '.join(strays)} (a wheel of yours? wheelhouse_action=import)"
        )
    aside = list((folder / "aside").glob("*.json"))
    if aside:
        remarks.append(f"set aside: {len(aside)} (why: {folder / 'aside'}/*.json)")
    locks = sorted((folder / "locks").glob("*.json"))
    if locks:
        remarks.append(f"locked: {', '.join(path.stem for path in locks)} (wheelhouse_action=unlock says by whom)")
    return remarks


def _cells(row: dict[str, Any]) -> list[str]:
    seconds, size = row.get("seconds"), row.get("size")
    return [
        str(row.get("component")),
        str(row.get("version")),
        str(row.get("key"))[:12],
        _megabytes(size) if isinstance(size, int) else "-",
        _added(row).replace("T", " ").replace("Z", ""),
        duration(seconds) if isinstance(seconds, (int, float)) else "-",
        str(row.get("origin")),
    ]


def _added(row: dict[str, Any]) -> str:
    return str(row.get("added") or "")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"


def _name(row: dict[str, Any]) -> str:
    return f"{row.get('component')} {row.get('version')} of {row['class_id']} ({str(row['key'])[:12]})"


def _say(text: str) -> None:
    display.display(f"  controller: {text}")
