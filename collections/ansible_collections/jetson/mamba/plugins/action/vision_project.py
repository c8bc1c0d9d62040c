"""The controller's half of vision_project: fetch a project's files, find what even kernels break, report or fix it."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.jetson.mamba.plugins.module_utils import files, vision_project
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.plugin_utils import even_kernels

SKIPPED = "skipped"
MODULE = "jetson.mamba.vision_project"
# passed on as the task has them: ~ is the device's
_DEVICE_OPTIONS = ("path", "files", "preset", "state_dir")
# the folder of the reports, as the callback fleet_report has it
_REPORTS_VARIABLE = "JETSON_MAMBA_REPORTS"


class ActionModule(ActionBase):
    """Reads on the device, thinks here, and writes on the device what is still as it was read."""

    _supports_check_mode = True
    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return what was found and done."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(vision_project.ARGUMENTS)
        variables = task_vars or {}
        try:
            if arguments["state"] == "absent":
                answer = self._device("restore", variables)
                if not answer.get("failed"):
                    answer["msg"] = f"{len(answer['written'])} files put back"
                result.update(answer)
            else:
                result.update(self._look(arguments, variables))
        except Problem as problem:
            result.update(failed=True, msg=problem.render(), problem=problem.as_dict())
        return result

    def _device(self, operation: str, task_vars: dict[str, Any], **more: Any) -> dict[str, Any]:
        given = {name: self._task.args[name] for name in _DEVICE_OPTIONS if name in self._task.args}
        answer: dict[str, Any] = self._execute_module(
            module_name=MODULE, module_args={**given, "operation": operation, **more}, task_vars=task_vars
        )
        return answer

    def _look(self, arguments: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
        vision_project.patterns_of(arguments["files"], arguments["preset"])  # a wrong setting needs no connection
        answer = self._device("fetch", task_vars)
        if answer.get("failed") or answer.get("unreachable"):
            return answer
        rows, edits, patches = [], [], []
        for fetched in answer["files"]:
            content = base64.b64decode(fetched["content"])
            row, found = examine(fetched["path"], content, arguments["classes"])
            rows.append(row)
            if found is not None and found.edits:
                edits.append(edit_of(fetched["path"], content, found))
                patches.append(even_kernels.unified_diff(fetched["path"], content, found.content))
                row["patch"] = patches[-1].decode(found.encoding, "replace")
        rows += [
            {"path": row["path"], "status": SKIPPED, "message": row["reason"], "findings": [], "patch": ""}
            for row in answer["skipped"]
        ]
        if not rows:
            raise Problem(
                f"no file of {self._task.args['path']} is named {' or '.join(answer['unmatched'])}",
                "the files that hold the project's SS2D-like classes",
                "correct files, or choose the preset of the project's layout",
            )
        name = arguments["name"] or os.path.basename(str(self._task.args["path"]).rstrip("/"))
        result: dict[str, Any] = {"changed": False, "files": rows, "patch_file": "", "notes": []}
        # a layout need not have all of its files
        result["notes"] = [
            f"{name}: no file is named {pattern}" for pattern in answer["unmatched"] if pattern in arguments["files"]
        ]
        if not any(row["findings"] for row in rows):
            result["notes"] += [f"{name}: {row['path']}: {row['message']}" for row in rows]
        if edits and arguments["mode"] == "fix":
            written = self._device("write", task_vars, edits=edits)
            if written.get("failed") or written.get("unreachable"):
                return written
            result.update(changed=written["changed"], diff=written["diff"])
            for row in rows:
                if row["path"] in written["written"] and not self._task.check_mode:
                    row["status"] = "fixed"
        elif edits and not self._task.check_mode:
            folder = arguments["patch_folder"] or default_patch_folder()
            host = str(task_vars.get("inventory_hostname", "host"))
            result["patch_file"] = write_patch(folder, f"{host}-{name}", b"".join(patches))
        result["msg"] = summary(name, rows, result["patch_file"])
        return result


def examine(path: str, content: bytes, classes: Sequence[str]) -> tuple[dict[str, Any], even_kernels.Result | None]:
    """Return what is said of a file, and the result behind it (None: it could not be read as Python)."""
    row: dict[str, Any] = {"path": path, "patch": ""}
    try:
        found = even_kernels.transform(content, classes)
    except Problem as problem:
        message = f"left alone: {problem.found}. Expected: {problem.expected}. Next: {problem.next_step}"
        return {**row, "status": even_kernels.UNRECOGNISED, "message": message, "findings": []}, None
    findings = [finding.as_dict() for finding in found.findings]
    return {**row, "status": found.status, "message": found.message, "findings": findings}, found


def edit_of(path: str, content: bytes, found: even_kernels.Result) -> dict[str, Any]:
    """Return what the device has to do to a file, and how it tells that the file is still this one."""
    return {
        "path": path,
        "sha256_before": hashlib.sha256(content).hexdigest(),
        "sha256_after": hashlib.sha256(found.content).hexdigest(),
        "splices": [
            {"start": edit.start, "end": edit.end, "text": base64.b64encode(edit.text).decode("ascii")}
            for edit in found.edits
        ],
    }


def default_patch_folder() -> str:
    """Return the folder of patch files beside the reports."""
    return str(Path(os.environ.get(_REPORTS_VARIABLE) or "reports").expanduser() / "patches")


def write_patch(folder: str, stem: str, patch: bytes) -> str:
    """Write a patch file on the controller and return its path.

    Raises:
        Problem: the folder cannot be written.
    """
    path = Path(folder).expanduser().resolve() / (re.sub(r"[^\w.-]+", "-", stem) + ".patch")
    try:
        files.write_atomic(str(path), patch, 0o644)
    except OSError as error:
        raise Problem(
            f"{path} cannot be written: {error.strerror}",
            "a folder on the controller for patch files",
            "correct patch_folder, or its rights",
        ) from error
    return str(path)


def summary(name: str, rows: Sequence[Mapping[str, Any]], patch_file: str) -> str:
    """Return what was found in a project, one line for each convolution that is not as it should be."""
    lines = []
    for row in rows:
        for finding in row["findings"]:
            if finding["becomes"] is not None:
                place = f"{name}/{row['path']}:{finding['line']}"
                change = f"padding={finding['padding']} -> padding={finding['becomes']}"
                lines.append(f"{row['status']}: {place}: {finding['where']}: {change} ({finding['why']})")
    if not lines:
        recognised = sum(len(row["findings"]) for row in rows)
        return f"{name}: nothing to fix; {recognised} convolutions recognised in {len(rows)} files"
    if patch_file:
        lines.append(f"the patch: {patch_file} (on the device: git apply, or set the project to fix)")
    return "\n".join(lines)
