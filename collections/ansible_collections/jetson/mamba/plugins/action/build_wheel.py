"""Action of jetson.mamba.build_wheel: the controller's side of a build."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.modules.build_wheel import argument_spec
from ansible_collections.jetson.mamba.plugins.plugin_utils import building, fetch, settings, supply, transfer
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheelhouse import Wheelhouse

_INTERNAL = ("mode", "source_sha256", "source_tar", "force_build", "modules", "job_memory_mb", "disk_mb")


class ActionModule(ActionBase):
    """Prepare, send, start, follow, and keep the wheel in the wheelhouse."""

    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run the task; returns its result."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        spec = {name: option for name, option in argument_spec().items() if name not in (*_INTERNAL, "wait_seconds")}
        _validated, options = self.validate_argument_spec(argument_spec=spec)
        variables = task_vars or {}
        options.update({name: settings.in_project(options[name], variables) for name in ("cache", "logs")})
        fetch.use_logins_of(variables, lambda value: self._templar.template(value))
        display = Display()

        def run(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
            answer: dict[str, Any] = self._execute_module(
                module_name=name, module_args=arguments, task_vars=variables
            )
            return answer

        line = transfer.Line(self, variables)
        device = building.Device(
            host=str(variables.get("inventory_hostname", "localhost")),
            run=run,
            send=line.send,
            receive=line.receive,
            say=display.display,
            lost=(AnsibleConnectionFailure,),
            errors=(OSError, AnsibleError),
        )
        order, hopeless = None, False
        try:
            order = building.make_order(options, display.display)
            if options["key"] not in (None, order.key):
                hopeless = True
                raise _changed(options, order)
            wheelhouse = supply.complete(options["wheelhouse"])
            wish, house = order.wish(options["class_id"]), Wheelhouse(wheelhouse["path"])
            if self._task.check_mode:
                answer = run("jetson.mamba.build_wheel", {**order.arguments, "mode": "start"})
                return {**result, **answer, "key": order.key}
            patience = 60.0 * wheelhouse["patience_minutes"]
            found, compiled = building.build(device, order, wish, house, patience, options["logs"], options["l4t"])
        except Problem as problem:
            refused = {"failed": True, "msg": problem.render(), "problem": problem.as_dict()}
            hopeless = hopeless or isinstance(problem, building.WrongWheel)
            return {**result, **refused, "build_failed": hopeless, "key": options["key"] or (order and order.key)}
        except building.StepFailed as failure:
            told = {"failed": True, "build_failed": failure.built, "key": order and order.key}
            return {**result, **failure.result, **told}
        except AnsibleConnectionFailure:
            raise
        except OSError as error:
            raise AnsibleError(str(error)) from error
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)
        return {**result, "wheel": found.served, "changed": compiled, "key": order.key}


def _changed(options: dict[str, Any], order: building.Order) -> Problem:
    return Problem(
        f"the source of {order.row.name} changed during this run (key {order.key[:12]}, planned {options['key'][:12]})",
        "the source that the plan was made for",
        "run again when nobody edits it any more",
    )
