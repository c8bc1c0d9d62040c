"""The controller's half of wheel_set: ask the device what is missing, send that, and have it installed."""

from __future__ import annotations

import os
import shlex
import tempfile
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.jetson.mamba.plugins.module_utils import wheels
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.versions import Target
from ansible_collections.jetson.mamba.plugins.plugin_utils import fetch, locks, transfer

display = Display()
MODULE = "jetson.mamba.wheel_set"
# passed on to the device's half
_COMMON = ("python", "site_packages", "scope", "verify_hashes", "tmp")
_STALE_MINUTES = 720
# of the folders on the device; the folder that they are in may be shared, so nobody else's may begin like it
_FOLDER = "jetson-mamba-wheels."


class ActionModule(ActionBase):
    """Sends only what the device lacks."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Query, fetch, send, install."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(wheels.ARGUMENTS)
        host = str((task_vars or {}).get("inventory_hostname", "host"))
        try:
            result.update(self._ensure(arguments, task_vars or {}, host))
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
        local = [wheel for wheel in chosen if "remote" not in wheel]
        _check_room(sum(wheel["size"] for wheel in local) >> 20, int(answer["free_mb"]), arguments["tmp"])
        folder = self._make_folder(arguments["tmp"])
        try:
            self._send([wheel["local"] for wheel in local], folder, host)
            rows = [
                {
                    "name": wheel["name"],
                    "version": wheel["version"],
                    "sha256": wheel["sha256"],
                    "filename": wheel["filename"],
                    "path": wheel.get("remote"),
                    "url": wheel.get("url"),
                    "keep_origin": wheel["keep_origin"],
                }
                for wheel in chosen
            ]
            with transfer.StillWorking(_say, f"{host}: installing {len(rows)} wheels"):
                done = self._device(dict(common, mode="install", wheels=rows, source_dir=folder), task_vars)
        finally:
            self._low_level_execute_command(f"rm -rf {shlex.quote(folder)}", sudoable=False)
        if done.get("failed"):
            return done
        for line in done["conflicts"]:
            display.warning(f"{host}: pip check: {line}")
        return dict(result, installed=done["installed"], conflicts=done["conflicts"])

    def _device(self, arguments: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
        """Run the device's half and return its answer."""
        answer: dict[str, Any] = self._execute_module(
            module_name=MODULE, module_args=arguments, task_vars=task_vars
        )
        return answer

    def _files(
        self,
        arguments: dict[str, Any],
        names: set[str],
        entries: list[locks.Locked],
        target: Target | None,
        cache: fetch.Cache,
    ) -> list[dict[str, Any]]:
        """Return the missing wheels with their verified files."""
        tick = fetch.Ticker(_say)
        chosen: list[dict[str, Any]] = []
        for entry in entries:
            if entry.name in names and target is not None:
                chosen.append(_row(fetch.ensure_locked(entry, target, cache, tick), keep_origin=False))
        for wheel in arguments["extra"]:
            if wheel["name"] not in names:
                continue
            if wheel.get("remote_path"):
                path = wheel["remote_path"]
                chosen.append(
                    dict(wheel, remote=path, filename=os.path.basename(path), size=0, url=None, keep_origin=True)
                )
                continue
            found = fetch.ensure_wheel(wheel, cache, arguments["trust_on_first_use"], tick)
            if target is not None:
                wheels.check_archive(found.path, target)
            chosen.append(_row(found, keep_origin=True))
        return chosen

    def _make_folder(self, parent: str) -> str:
        """Make a folder of our own on the device; what killed runs of this user left half a day ago is removed."""
        quoted = shlex.quote(parent)
        command = (
            f"umask 77 && mkdir -p {quoted} && "
            f"find {quoted} -mindepth 1 -maxdepth 1 -type d -user \"$(id -u)\" -name '{_FOLDER}????????' "
            f"-mmin +{_STALE_MINUTES} -exec rm -rf {{}} + ; "
            f"mktemp -d {quoted}/{_FOLDER}XXXXXXXX"
        )
        done = self._low_level_execute_command(command, sudoable=False)
        lines = done["stdout"].strip().splitlines()
        if done["rc"] != 0 or not lines or f"/{_FOLDER}" not in lines[-1]:
            raise Problem(
                f"no folder could be made in {parent} on the device: {(done['stderr'] or done['stdout']).strip()}",
                "a folder for files in transfer that the connecting user may write",
                f"look at: ls -ld {parent}; or name another: -e jetson_platform_tmp_root=FOLDER",
            )
        return str(lines[-1].strip())

    def _send(self, paths: list[str], folder: str, host: str) -> None:
        """Send files to a folder on the device; nothing large goes through memory."""
        with tempfile.TemporaryDirectory(prefix="wheels-") as local:
            for path, name in transfer.pack(paths, local):
                size = os.path.getsize(path) >> 20
                with transfer.StillWorking(_say, f"{host}: sending {name} ({size} MB)"):
                    self._transfer_file(path, f"{folder}/{name}")


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
    places = [key for key in ("url", "path", "remote_path") if wheel.get(key)]
    if len(places) != 1:
        raise Problem(
            f"{wheel['name']} has {' and '.join(places) or 'no place'}",
            "one of url, path or remote_path",
            "correct where the wheel is named",
        )
    if target is not None:
        filename = os.path.basename(wheel["remote_path"]) if wheel.get("remote_path") else fetch.wheel_filename(wheel)
        wheels.check_name(filename, target)
    digest = fetch.known_sha256(wheel["url"], wheel.get("sha256"), cache) if wheel.get("url") else wheel.get("sha256")
    return {"name": wheel["name"], "version": wheel["version"], "sha256": digest}


def _row(wheel: fetch.Wheel, keep_origin: bool) -> dict[str, Any]:
    return {
        "name": wheel.name,
        "version": wheel.version,
        "sha256": wheel.sha256,
        "filename": wheel.filename,
        "size": wheel.size,
        "local": wheel.path,
        "url": wheel.url or None,
        "keep_origin": keep_origin,
    }


def _check_room(needed_mb: int, free_mb: int, folder: str) -> None:
    if needed_mb >= free_mb:
        raise Problem(
            f"{free_mb} MB free for {folder} on the device",
            f"{needed_mb} MB for the wheels in transfer",
            "free space there, or name a larger disk: -e jetson_platform_tmp_root=FOLDER",
        )


def _diff(missing: list[dict[str, str]], site_packages: str) -> dict[str, str]:
    return {
        "before_header": site_packages,
        "after_header": site_packages,
        "before": "".join(f"{row['name']}: {row['reason']}\n" for row in missing),
        "after": "".join(f"{row['name']}: {row['version']}\n" for row in missing),
    }
