"""Read a patch series on the controller and hand it to the module of the same name."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.plugin_utils.patch_series import load_series


class ActionModule(ActionBase):
    """Fill in the module's series from patch_root, package, version and companions."""

    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the module's result, or the problem that the series has."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        args = dict(self._task.args)
        patch_root = args.pop("patch_root", None)
        companions = args.pop("companions", None) or {}
        try:
            if args.get("series") is None:
                args["series"] = self._load(args, patch_root, companions)
        except Problem as problem:
            return {**result, "failed": True, "msg": problem.render(), "problem": problem.as_dict()}
        result.update(
            self._execute_module(module_name="jetson.mamba.source_patches", module_args=args, task_vars=task_vars)
        )
        return result

    @staticmethod
    def _load(args: dict[str, Any], patch_root: object, companions: object) -> list[dict[str, Any]]:
        """Return the series that the task asks for."""
        if not patch_root or not isinstance(companions, dict):
            raise Problem(
                f"patch_root is {patch_root!r} and companions is {companions!r}",
                "a folder on the controller and a mapping of package to version",
                "give both to the task",
            )
        return load_series(
            str(patch_root),
            str(args.get("package", "")),
            str(args.get("version", "")),
            companions,
            str(args.get("applies_to", "python")),
        )
