"""Bring what the plan needs into the controller's cache."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.jetson.mamba.plugins.module_utils import wheels
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.versions import Target
from ansible_collections.jetson.mamba.plugins.plugin_utils import fetch, locks, settings, wheel_libs

display = Display()
ARGUMENTS: dict[str, Any] = {
    "lock": {"type": "str"},
    "target": {"type": "dict", "required": True},
    "extra": {"type": "list", "elements": "dict", "default": []},
    "index_files": {"type": "list", "elements": "dict", "default": []},
    "trust_on_first_use": {"type": "bool", "default": False},
    "cache": {"type": "str"},
}


class ActionModule(ActionBase):
    """Runs on the controller alone: the host is not contacted."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Fetch, or in check mode say what is not in the cache."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(ARGUMENTS)
        variables = task_vars or {}
        arguments["cache"] = settings.in_project(arguments["cache"], variables)
        fetch.use_logins_of(variables, lambda value: self._templar.template(value))
        try:
            result.update(self._fetch(arguments, bool(self._task.check_mode)))
        except Problem as problem:
            result.update(failed=True, msg=problem.render(), problem=problem.as_dict())
        return result

    def _fetch(self, arguments: dict[str, Any], check: bool) -> dict[str, Any]:
        cache = fetch.Cache(arguments["cache"])
        try:
            target = Target.from_dict(arguments["target"])
        except ValueError as error:
            raise Problem(str(error), "target: {machine, python, glibc}", "correct the task") from error
        entries = locks.read_lock(arguments["lock"], target) if arguments["lock"] else []
        fetch.check_lock_fits(entries, target, str(arguments["lock"]))
        for wheel in arguments["extra"]:
            wheels.check_name(fetch.wheel_filename(wheel), target)
            fetch.check_digest_known(wheel, cache, trust=arguments["trust_on_first_use"])
        absent = [f"{entry.name}=={entry.version}" for entry in entries if fetch.find_locked(entry, cache) is None]
        absent += [
            f"{wheel['name']}=={wheel['version']}"
            for wheel in arguments["extra"]
            if fetch.find_wheel(wheel, cache) is None
        ]
        absent += [
            item["filename"]
            for item in arguments["index_files"]
            if cache.find(item["sha256"], item["filename"]) is None
        ]
        if not check:
            self._fetch_absent(arguments, entries, target, cache)
        # The cache is the controller's own affair, and nothing on a host: a download is no change of the host.
        return {
            "changed": False,
            "fetched": [] if check else absent,
            "absent": absent if check else [],
            "libraries": wheel_libs.needed(arguments["extra"], cache, [entry.name for entry in entries]),
        }

    @staticmethod
    def _fetch_absent(
        arguments: dict[str, Any], entries: list[locks.Locked], target: Target, cache: fetch.Cache
    ) -> None:
        tick = fetch.Ticker(lambda text: display.display(f"  controller: {text}"))
        for wheel in arguments["extra"]:
            found = fetch.ensure_wheel(wheel, cache, trust=arguments["trust_on_first_use"], progress=tick)
            wheels.check_archive(found.path, target)
        for number, entry in enumerate(entries, start=1):
            tick(f"fetching wheel {number} of {len(entries)}: {entry.name} {entry.version}")
            fetch.ensure_locked(entry, target, cache, tick)
        for item in arguments["index_files"]:
            fetch.ensure_index_file(item["project"], item["filename"], item["sha256"], cache, tick)
