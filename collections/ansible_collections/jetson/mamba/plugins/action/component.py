"""Action of jetson.mamba.component: ask, have the wheel, send it, install, remember."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.modules.component import ON_DEVICE, PATHS_ON_DEVICE, argument_spec
from ansible_collections.jetson.mamba.plugins.plugin_utils import building, fetch, settings, supply, wheel_libs
from ansible_collections.jetson.mamba.plugins.plugin_utils.transfer import Courier, Line, Parcel
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheelhouse import Wheelhouse

_INTERNAL = ("mode", "key", "wheel", "record")
_PATHS = ("python", "site_packages", "state", "build", "cuda_home", "tmp")


class ActionModule(ActionBase):
    """Bring one component to what is wanted."""

    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run the task; returns its result."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        spec = {name: option for name, option in argument_spec().items() if name not in _INTERNAL}
        _validated, options = self.validate_argument_spec(argument_spec=spec)
        variables = task_vars or {}
        options.update({name: settings.in_project(options[name], variables) for name in ("cache", "logs")})
        fetch.use_logins_of(variables, lambda value: self._templar.template(value))
        try:
            return {**result, **self._bring(options, variables)}
        except Problem as problem:
            return {**result, "failed": True, "msg": problem.render(), "problem": problem.as_dict()}
        except building.StepFailed as failure:
            return {**result, **failure.result, "failed": True}
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)

    def _bring(self, options: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
        """Do what is missing; returns the task's result."""
        paths = _checked_paths(options["paths"])
        display = Display()

        def run(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
            answer: dict[str, Any] = self._execute_module(module_name=name, module_args=arguments, task_vars=task_vars)
            return answer

        told = {name: options[name] for name in ON_DEVICE if name in options}
        told["paths"] = {name: paths[name] for name in PATHS_ON_DEVICE}

        def step(mode: str, **more: Any) -> dict[str, Any]:
            answer = run("jetson.mamba.component", {**told, "key": order.key, "mode": mode, **more})
            if answer.get("failed"):
                raise building.StepFailed(answer)
            return answer

        order = building.make_order(
            {**options, "build_root": paths["build"], "python": paths["python"], "cuda_home": paths["cuda_home"]},
            display.display,
        )
        name, version = order.row.name, order.row.version
        found = step("query")
        reason = found["reason"] or (f"{name}_reinstall is set" if options["reinstall"] else None)
        answer = {"key": order.key, "reason": reason, "record": found["record"], "changed": bool(reason)}
        if not reason:
            return answer
        answer["diff"] = {
            "before_header": f"{name} in {paths['site_packages']}",
            "after_header": f"{name} in {paths['site_packages']}",
            "before": _describe(name, found["installed"], (found["record"] or {}).get("key")),
            "after": _describe(name, version, order.key),
        }
        wheelhouse = supply.complete(options["wheelhouse"])
        house, wish = Wheelhouse(wheelhouse["path"]), order.wish(options["class_id"])
        check = bool(self._task.check_mode)
        found_wheel = supply.find(house, wish, wheelhouse, options["cache"], display.display, dry=check)
        if check:
            served = found_wheel.row["origin"] if found_wheel.row else found_wheel.promised
            minutes = order.row.minutes_for(str(options["sm"]))
            how = f"from {house.root} ({served})" if served else f"after a build of about {minutes} min"
            return {**answer, "msg": f"would install {name} {version} {how}: {reason}"}
        compiled = False
        if found_wheel.path is None:
            found_wheel, compiled = self._build(order, wish, house, wheelhouse, options, run, task_vars, found_wheel)
        wheel = found_wheel.served
        assert wheel is not None
        self._require_libraries(wheel, run)
        record = {
            "key": order.key,
            "version": version,
            "class_id": options["class_id"],
            "sm": str(options["sm"]),
            "build_flags": options["build_flags"],
            "source_sha256": order.source.sha256 if found_wheel.row and found_wheel.row["source_sha256"] else None,
            "origin": wheel["origin"],
            "wheel": wheel["filename"],
            "wheel_sha256": wheel["sha256"],
        }
        courier = Courier(self, task_vars, paths["tmp"], options["transfer"], display.display)
        with courier.delivered([Parcel(wheel["path"], wheel["sha256"], wheel["filename"])]) as folder:
            installed = step("install", wheel=f"{folder}/{wheel['filename']}", record=record)
        return {**answer, "built": compiled, "record": installed["record"]}

    def _build(
        self,
        order: building.Order,
        wish: supply.Wish,
        house: Wheelhouse,
        wheelhouse: dict[str, Any],
        options: dict[str, Any],
        run: Callable[[str, dict[str, Any]], dict[str, Any]],
        task_vars: dict[str, Any],
        known: supply.Supply,
    ) -> tuple[supply.Supply, bool]:
        """Build on this very device what is nowhere."""
        display = Display()
        if not wheelhouse["build"]:
            raise supply.nowhere(wish, house, known)
        line = Line(self, task_vars, options["transfer"])
        device = building.Device(
            host=str(task_vars.get("inventory_hostname", "localhost")),
            run=run,
            send=line.send,
            receive=line.receive,
            say=display.display,
            lost=(AnsibleConnectionFailure,),
            errors=(OSError, AnsibleError),
        )
        patience = 60.0 * wheelhouse["patience_minutes"]
        return building.build(device, order, wish, house, patience, options["logs"], options["l4t"])

    @staticmethod
    def _require_libraries(wheel: dict[str, Any], run: Callable[[str, dict[str, Any]], dict[str, Any]]) -> None:
        """Ask the device's linker for what the wheel is linked with and nobody here brings."""
        if not wheel["needed"]:
            return
        wanted = {soname: wheel_libs.PACKAGES.get(soname, "") for soname in wheel["needed"]}
        answer = run("jetson.mamba.shared_libraries", {"libraries": wanted})
        if answer.get("failed"):
            raise building.StepFailed(answer)


def _describe(name: str, version: str | None, key: str | None) -> str:
    """Return one line of a diff."""
    return f"{name} {version} (key {key[:12] if key else 'unknown'})\n" if version else ""


def _checked_paths(paths: dict[str, Any]) -> dict[str, Any]:
    """Return the paths of the plan, checked.

    Raises:
        Problem: one is missing.
    """
    missing = [name for name in _PATHS if name not in paths]
    if missing:
        raise Problem(
            f"paths has no {', '.join(missing)}",
            "jetson_platform_plan.paths",
            "run the role jetson_platform before this one",
        )
    return paths
