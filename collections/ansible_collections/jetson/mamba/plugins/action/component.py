"""Action of jetson.mamba.component: ask, build if need be, install, remember."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.modules.component import argument_spec
from ansible_collections.jetson.mamba.plugins.plugin_utils import building

_INTERNAL = ("mode", "key", "wheel", "record")
_PATHS = ("python", "site_packages", "state", "build", "cuda_home")


class ActionModule(ActionBase):
    """Bring one component to what is wanted."""

    TRANSFERS_FILES = True
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run the task; returns its result."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        spec = {name: option for name, option in argument_spec().items() if name not in _INTERNAL}
        _validated, options = self.validate_argument_spec(argument_spec=spec)
        try:
            return {**result, **self._bring(options, task_vars or {})}
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

        def step(mode: str, **more: Any) -> dict[str, Any]:
            answer = run("jetson.mamba.component", {**options, "key": order.key, "mode": mode, **more})
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
        if self._task.check_mode:
            minutes = order.row.minutes_for(str(options["sm"]))
            return {**answer, "msg": f"would build and install {name} {version} (about {minutes} min): {reason}"}
        device = building.Device(
            host=str(task_vars.get("inventory_hostname", "localhost")),
            run=run,
            send=self._transfer_file,
            receive=self._connection.fetch_file,
            say=display.display,
            lost=(AnsibleConnectionFailure,),
        )
        built, compiled = building.follow(device, order, options["logs"])
        record = {
            "key": order.key,
            "version": version,
            "class_id": options["class_id"],
            "sm": str(options["sm"]),
            "build_flags": options["build_flags"],
            "source_sha256": order.source.sha256,
            "origin": order.source.origin,
            "wheel": built["wheel"],
            "wheel_sha256": built["sha256"],
            "built_at": built["built_at"],
            "seconds": built["seconds"],
        }
        installed = step("install", wheel=built["wheel"], record=record)
        return {**answer, "built": compiled, "record": installed["record"]}


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
