"""The controller's half of wheel_set: ask the device what is missing, send that, and have it installed."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.jetson.mamba.plugins.module_utils import wheels
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.versions import Target
from ansible_collections.jetson.mamba.plugins.plugin_utils import fetch, locks, settings, stock, transfer

display = Display()
MODULE = "jetson.mamba.wheel_set"
# passed on to the device's half
_COMMON = ("python", "site_packages", "scope", "verify_hashes", "tmp")


class ActionModule(ActionBase):
    """Sends only what the device lacks."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Query, fetch, send, install."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(wheels.ARGUMENTS)
        variables = task_vars or {}
        host = str(variables.get("inventory_hostname", "host"))
        arguments["cache"] = settings.in_project(arguments["cache"], variables)
        fetch.use_logins_of(variables, lambda value: self._templar.template(value))
        try:
            result.update(self._ensure(arguments, variables, host))
        except Problem as problem:
            result.update(failed=True, msg=problem.render(), problem=problem.as_dict())
        return result

    def _ensure(self, arguments: dict[str, Any], task_vars: dict[str, Any], host: str) -> dict[str, Any]:
        cache = fetch.Cache(arguments["cache"])
        target = _target(arguments)
        entries = locks.read_lock(arguments["lock"], target) if arguments["lock"] else []
        if target is not None:
            fetch.check_lock_fits(entries, target, str(arguments["lock"]))
        wanted = [{"name": entry.name, "version": entry.version} for entry in entries]
        wanted += [_extra_row(wheel, target, cache) for wheel in arguments["extra"]]

        common = {name: arguments[name] for name in _COMMON}
        answer = self._device(dict(common, mode="query", wheels=wanted), task_vars)
        if answer.get("failed"):
            return answer
        missing = answer["missing"]
        result: dict[str, Any] = {"changed": bool(missing), "missing": missing, "installed": [], "conflicts": []}
        if missing:
            result["diff"] = _diff(missing, arguments["site_packages"])
        if not missing or self._task.check_mode:
            return result

        names = {row["name"] for row in missing}
        chosen = self._files(arguments, names, entries, target, cache)
        parcels = [transfer.Parcel(wheel.path, wheel.sha256, wheel.filename, wheel.address) for wheel, _keep in chosen]
        rows = [_row(wheel, keep) for wheel, keep in chosen]
        courier = transfer.Courier(self, task_vars, arguments["tmp"], None, _say, display.warning)
        with (
            courier.delivered(parcels) as folder,
            transfer.StillWorking(_say, f"{host}: installing {len(rows)} wheels"),
        ):
            done = self._device(dict(common, mode="install", wheels=rows, source_dir=folder), task_vars)
        if done.get("failed"):
            return done
        for line in done["conflicts"]:
            display.warning(f"{host}: pip check: {line}")
        return dict(result, installed=done["installed"], conflicts=done["conflicts"])

    def _device(self, arguments: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
        """Run the device's half and return its answer."""
        answer: dict[str, Any] = self._execute_module(module_name=MODULE, module_args=arguments, task_vars=task_vars)
        return answer

    def _files(
        self,
        arguments: dict[str, Any],
        names: set[str],
        entries: list[locks.Locked],
        target: Target | None,
        cache: fetch.Cache,
    ) -> list[tuple[fetch.Wheel, bool]]:
        """Return the missing wheels, verified, and of each whether its sha256 is to be noted on the device."""
        tick, trust = fetch.Ticker(_say), arguments["trust_on_first_use"]
        chosen: list[tuple[fetch.Wheel, bool]] = []
        if target is not None:
            chosen += [(wheel, False) for wheel in stock.locked_files(entries, target, cache, tick, names)]
        for wheel in arguments["extra"]:
            if wheel["name"] in names:
                chosen.append((stock.extra_file(wheel, target, cache, trust, tick), True))
        return chosen


def _say(text: str) -> None:
    display.display(f"  {text}")


def _target(arguments: dict[str, Any]) -> Target | None:
    if not arguments["target"]:
        if arguments["lock"]:
            raise Problem("lock without target", "target: {machine, python, glibc}", "correct the task")
        return None
    try:
        return Target.from_dict(arguments["target"])
    except ValueError as error:
        raise Problem(str(error), "target: {machine, python, glibc}", "correct the task") from error


def _extra_row(wheel: dict[str, Any], target: Target | None, cache: fetch.Cache) -> dict[str, Any]:
    """Return one extra wheel as the device is asked for it, its name checked against the target."""
    places = [key for key in ("url", "path") if wheel.get(key)]
    if len(places) != 1:
        raise Problem(
            f"{wheel['name']} has {' and '.join(places) or 'no place'}",
            "one of url and path",
            "correct where the wheel is named",
        )
    if target is not None:
        wheels.check_name(fetch.wheel_filename(wheel), target)
    digest = fetch.known_sha256(wheel["url"], wheel.get("sha256"), cache) if wheel.get("url") else wheel.get("sha256")
    return {"name": wheel["name"], "version": wheel["version"], "sha256": digest}


def _row(wheel: fetch.Wheel, keep_origin: bool) -> dict[str, Any]:
    """Return a wheel as the device is told of it."""
    return {
        "name": wheel.name,
        "version": wheel.version,
        "sha256": wheel.sha256,
        "filename": wheel.filename,
        "url": wheel.url or None,
        "keep_origin": keep_origin,
    }


def _diff(missing: list[dict[str, str]], site_packages: str) -> dict[str, str]:
    return {
        "before_header": site_packages,
        "after_header": site_packages,
        "before": "".join(f"{row['name']}: {row['reason']}\n" for row in missing),
        "after": "".join(f"{row['name']}: {row['version']}\n" for row in missing),
    }
