"""The controller's half of debian_packages: ask what is missing, work out and fetch the rest, send it, install it."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.jetson.mamba.plugins.module_utils import deb_install, debs
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.passwords import without_passwords
from ansible_collections.jetson.mamba.plugins.plugin_utils import deb_resolver, fetch, transfer

display = Display()
MODULE = "jetson.mamba.debian_packages"
Data = dict[str, Any]


class DeviceFailed(Exception):
    """The device's half failed; answer is what it said."""

    def __init__(self, answer: Data) -> None:
        super().__init__(answer.get("msg"))
        self.answer = answer


class ActionModule(ActionBase):
    """Nothing but the question is asked of a device that has everything."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Query, resolve, fetch, send, install."""
        result: Data = super().run(tmp, task_vars)
        self._vars = task_vars or {}
        self._host = str(self._vars.get("inventory_hostname", "host"))
        _validation, arguments = self.validate_argument_spec(debs.ARGUMENTS)
        try:
            result.update(self._ensure(self._complete(arguments)))
        except Problem as problem:
            result.update(failed=True, msg=problem.render(), problem=problem.as_dict())
        except DeviceFailed as failed:
            result.update(without_passwords(failed.answer))
        return result

    def _complete(self, arguments: Data) -> Data:
        """Return the arguments with what the host's variables say where the task does not."""
        for name, default in debs.SETTINGS.items():
            if arguments[name] is None:
                variable = debs.VARIABLE + name
                known = variable in self._vars
                arguments[name] = self._templar.template(self._vars[variable]) if known else default
        arguments["lock_minutes"] = int(arguments["lock_minutes"])
        arguments["names"] = list(dict.fromkeys(arguments["names"]))
        return arguments

    def _ensure(self, arguments: Data) -> Data:
        wishes = [debs.parse_wish(name) for name in arguments["names"]]
        if not wishes:
            return {"changed": False, "missing": [], "files": []}
        answer = self._device("query", arguments["names"], tmp=arguments["tmp"])
        if answer["missing"] and answer["unfinished"] and arguments["state"] == "present":
            # somebody may be at it right now, a run that lost its connection for one
            self._wait(arguments)
            answer = self._device("query", arguments["names"], tmp=arguments["tmp"])
            if answer["missing"] and answer["unfinished"]:
                raise debs.broken_problem(answer["unfinished"])
        arguments["tmp"] = answer["tmp"]
        lacking = {row["name"] for row in answer["missing"]}
        wishes = [wish for wish in wishes if wish.text in lacking]
        result: Data = {"changed": False, "missing": answer["missing"], "files": []}
        if not wishes or arguments["state"] == "query":
            return result
        if answer["unfinished"]:
            display.warning(f"{self._host}: {debs.broken_problem(answer['unfinished']).found}")
            return result
        names = [wish.text for wish in wishes]
        frozen = debs.frozen_wishes(wishes)
        if frozen:
            raise Problem(
                f"{', '.join(frozen)} among the packages to install",
                f"parts of L4T ({debs.FROZEN}) as NVIDIA's own upgrade installs them",
                "upgrade L4T yourself, or correct the list of names",
            )
        if arguments["source"] == "none":
            raise Problem(
                f"the device lacks {', '.join(names)}",
                "these packages on it (debian_packages_source is none)",
                f"let the run fetch them: -e debian_packages_source=controller; or {deb_resolver.alternatives(names)}",
            )
        steps = {"controller": self._from_controller, "folder": self._from_folder, "device": self._from_device}
        packages = steps[arguments["source"]](arguments, wishes, answer)
        result["packages"] = packages
        if arguments["source"] == "controller":
            result["files"] = [{key: row[key] for key in ("filename", "sha256")} for row in packages]
        if arguments["state"] == "present":
            result.update(changed=True, diff=_diff(packages))
        return result

    # ------------------------------------------------------------ the three sources

    def _from_controller(self, arguments: Data, wishes: list[debs.Wish], _answer: Data) -> list[Data]:
        described = self._device("describe", arguments["names"])["description"]
        description = deb_install.unpack(described)
        resolver = deb_resolver.Resolver(fetch.Cache(arguments["cache"]), self._say)
        if self._task.check_mode:
            resolution = resolver.resolve(description, wishes, arguments["repositories"])
            if arguments["state"] == "fetched":
                self._announce(resolution.packages, resolver.absent(resolution))
        else:
            resolution, paths = resolver.ensure(description, wishes, arguments["repositories"])
        for line in resolution.warnings:
            display.warning(f"{self._host}: apt: {without_passwords(line)}")
        if arguments["state"] == "present" and not self._task.check_mode:
            files = [{"filename": row["filename"], "sha256": row["sha256"]} for row in resolution.packages]
            self._install(arguments, wishes, list(zip(files, paths, strict=True)))
        return [{key: value for key, value in row.items() if key != "size"} for row in resolution.packages]

    def _announce(self, packages: list[Data], absent: list[Data]) -> None:
        """Say, in check mode, what would be fetched."""
        named = " ".join(f"{row['name']} {row['version']}," for row in packages).rstrip(",")
        size = sum(row["size"] for row in absent) / 1e6
        self._say(
            f"would fetch {len(absent)} of {len(packages)} Debian packages, {size:.1f} MB; the device needs {named}"
            if absent
            else f"all {len(packages)} Debian packages that the device needs are in the controller's cache: {named}"
        )

    def _from_folder(self, arguments: Data, wishes: list[debs.Wish], answer: Data) -> list[Data]:
        offers = deb_resolver.read_folder(arguments["folder"], fetch.Cache(arguments["cache"]))
        offers = [offer for offer in offers if offer.maybe_for(answer["architectures"])]
        if arguments["state"] == "fetched" or self._task.check_mode:
            named = [{"name": wish.text, "version": _version_of(wish, offers), "old": ""} for wish in wishes]
            absent = [row["name"] for row in named if not row["version"]]
            if self._task.check_mode and arguments["state"] == "fetched":
                found = [f"{row['name']} {row['version']}" for row in named if row["version"]]
                self._say(f"{arguments['folder']} has {', '.join(found) or 'none of what the device needs'}")
            if absent:
                display.warning(f"{self._host}: no file in {arguments['folder']} is named {', '.join(absent)}")
            return named
        by_digest = {offer.sha256: offer for offer in offers}
        courier = self._courier(arguments)
        with tempfile.TemporaryDirectory(prefix="debs-") as local:
            heads = []
            for digest, offer in by_digest.items():
                head = deb_resolver.head_of(offer.path)
                path = Path(local, digest + ".deb")
                path.write_bytes(head)
                heads.append(transfer.Parcel(str(path), hashlib.sha256(head).hexdigest(), path.name))
            with courier.delivered(heads) as folder:
                rows = [offer.row() for offer in by_digest.values()]
                names = [wish.text for wish in wishes]
                chosen: list[Data] = self._device("choose", names, files=rows, source_dir=folder)["packages"]
        files = [{"filename": row["filename"], "sha256": row["sha256"]} for row in chosen]
        self._install(arguments, wishes, [(row, by_digest[row["sha256"]].path) for row in files])
        return chosen

    def _from_device(self, arguments: Data, wishes: list[debs.Wish], _answer: Data) -> list[Data]:
        names = [wish.text for wish in wishes]
        if arguments["state"] == "fetched":
            if self._task.check_mode:
                self._say(f"the device's own apt would fetch {', '.join(names)}, with all that they need")
            return []
        if self._task.check_mode:
            try:
                simulated: list[Data] = self._device("simulate", names)["packages"]
            except DeviceFailed:  # its package lists may be old, and a check fetches none
                return [{"name": name, "version": "", "old": ""} for name in names]
            return simulated
        self._wait(arguments)
        with transfer.StillWorking(self._say, f"fetching and installing {' '.join(names)}"):
            installed: list[Data] = self._device("install", names)["packages"]
        return installed

    # ------------------------------------------------------------ the device

    def _install(self, arguments: Data, wishes: list[debs.Wish], files: list[tuple[Data, Path]]) -> None:
        self._wait(arguments)
        parcels = [transfer.Parcel(str(path), row["sha256"], row["filename"]) for row, path in files]
        with (
            self._courier(arguments).delivered(parcels) as folder,
            transfer.StillWorking(self._say, f"installing {len(parcels)} packages"),
        ):
            rows = [row for row, _path in files]
            self._device("install", [wish.text for wish in wishes], files=rows, source_dir=folder)

    def _wait(self, arguments: Data) -> None:
        """Wait until nobody holds apt's locks, and say so."""
        limit, patience = arguments["lock_minutes"] * 60, 0
        started = time.monotonic()
        while True:
            asked = {"source": arguments["source"], "lock_minutes": patience}
            holder = self._device("wait", arguments["names"], **asked)["holder"]
            waited = time.monotonic() - started
            if holder is None:
                return
            if waited >= limit:
                raise Problem(
                    f"apt's lock on the device is held by {holder}, still after {waited / 60:.0f} minutes",
                    "nobody else installing packages",
                    f"let it end, or see what it does: ps -fp {holder.split('pid ')[-1].rstrip(')')}; then run again, "
                    "or wait longer: -e debian_packages_lock_minutes=60",
                )
            self._say(f"waiting for apt's lock, which {holder} holds: {waited:.0f} s of at most {limit} s")
            patience = arguments["lock_minutes"]

    def _courier(self, arguments: Data) -> transfer.Courier:
        return transfer.Courier(self, self._vars, arguments["tmp"], arguments["transfer"], display.display)

    def _device(self, mode: str, names: list[str], **further: Any) -> Data:
        """Run the device's half and return its answer. Raises DeviceFailed."""
        answer: Data = self._execute_module(
            module_name=MODULE, module_args={"mode": mode, "names": names, **further}, task_vars=self._vars
        )
        if answer.get("failed") or answer.get("unreachable"):
            raise DeviceFailed(answer)
        return answer

    def _say(self, text: str) -> None:
        display.display(f"  {self._host}: {text}")


def _version_of(wish: debs.Wish, offers: list[deb_resolver.Offer]) -> str:
    """Return the version of a package in a folder by the name of its file, or ""."""
    for offer in offers:
        parts = os.path.basename(offer.filename).split("_")
        if parts[0] == wish.name and len(parts) == 3:
            return parts[1].replace("%3a", ":")
    return ""


def _diff(packages: list[Data]) -> dict[str, str]:
    rows = sorted(packages, key=lambda row: str(row["name"]))
    return {
        "before_header": "Debian packages",
        "after_header": "Debian packages",
        "before": "".join(f"{row['name']} {row['old']}\n" for row in rows if row["old"]),
        "after": "".join(f"{row['name']} {row['version']}\n".replace(" \n", "\n") for row in rows),
    }
