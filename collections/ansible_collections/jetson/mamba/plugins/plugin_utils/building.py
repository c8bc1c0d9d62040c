"""Follow a build on a device from the controller: send the source, start it, tell how far it is, fetch what it left."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ansible_collections.jetson.mamba.plugins.module_utils.build import build_key, job_folder
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.files import sha256_file
from ansible_collections.jetson.mamba.plugins.module_utils.passwords import without_passwords
from ansible_collections.jetson.mamba.plugins.plugin_utils import (
    components,
    fetch,
    report,
    sources,
    supply,
    transfer,
)
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheelhouse import Wheelhouse
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheelhouse_lock import duration as duration

# the device answers at once when a build ends; until then it stays this long before it says how far it is
POLL_SECONDS = 10
# a reboot, a Wi-Fi that comes back: the build doesn't need the connection, so neither does giving up
PATIENCE_SECONDS = 600
RETRY_SECONDS = 10


class StepFailed(Exception):
    """A module on the device failed; result is what Ansible shall show.

    Args:
        result: of the module.
        built: whether the build itself failed, so that another host would fail at it too.
    """

    def __init__(self, result: dict[str, Any], built: bool = False) -> None:
        super().__init__(str(result.get("msg", "")))
        self.result = result
        self.built = built


class WrongWheel(Problem):
    """A build succeeded, and what came of it is not what was to be built."""


@dataclass(frozen=True)
class Device:
    """How to reach a device.

    Args:
        host: its name in messages.
        run: runs a module there: (name, arguments) -> its result.
        send: copies a file there: (local, remote).
        receive: copies a file from there: (remote, local).
        say: shows one line to the user.
        lost: exceptions that mean that the connection was lost.
        errors: exceptions by which receive says that a file could not be fetched.
    """

    host: str
    run: Callable[[str, dict[str, Any]], dict[str, Any]]
    send: Callable[[str, str], Any]
    receive: Callable[[str, str], Any]
    say: Callable[[str], Any]
    lost: tuple[type[Exception], ...] = ()
    errors: tuple[type[Exception], ...] = (OSError,)


@dataclass(frozen=True)
class Order:
    """A build that is wanted, with its source at hand.

    Args:
        row: the component's row.
        source: its packed source on the controller.
        key: digest of everything that the wheel is made from.
        arguments: of the module jetson.mamba.build_wheel, all but mode.
        special: why upstream's ordinary build will not do (see supply.find_special), or None.
    """

    row: components.Component
    source: sources.SourceArchive
    key: str
    arguments: dict[str, Any] = field(default_factory=dict)
    special: str | None = None

    def wish(self, class_id: str) -> supply.Wish:
        """Return what the wheel of this order must be, for hosts of a class."""
        return supply.Wish(
            component=self.row.name,
            project=self.row.project,
            version=self.row.version,
            key=self.key,
            class_id=class_id,
            source_sha256=self.source.sha256,
            flags=tuple(self.arguments["build_flags"]),
            special=self.special,
        )

    @property
    def folder(self) -> str:
        """The job's folder on the device."""
        return job_folder(self.arguments["build_root"], self.row.name, self.key)


def cache_folder(setting: str | None) -> Path:
    """Return the controller's cache folder for a setting that may be empty."""
    return fetch.Cache(setting).root


def make_order(options: Mapping[str, Any], say: Callable[[str], Any] | None = None) -> Order:
    """Prepare the source and compute the key.

    Args:
        options: component, version, source, patch_root, companions, cache, class_id, sm, build_flags, max_jobs,
            build_root, python, scope, cuda_home.
        say: shows one line to the user.

    Raises:
        Problem: the source is not to be had or not what it must be, or a patch of it does not apply.
    """
    row = components.component(options["component"], options["version"])
    cache = cache_folder(options.get("cache"))
    source = sources.prepare(
        row.name,
        row.version,
        options.get("source") or None,
        cache,
        say,
        patch_root=options.get("patch_root") or None,
        companions=options.get("companions") or {},
    )
    flags = list(options.get("build_flags") or [])
    key = build_key(row.name, row.version, source.sha256, options["class_id"], str(options["sm"]), flags)
    arguments = {
        "component": row.name,
        "version": row.version,
        "build_root": options["build_root"],
        "python": options["python"],
        "scope": options.get("scope") or "venv",
        "cuda_home": options["cuda_home"] or "/usr/local/cuda",
        "sm": str(options["sm"]),
        "max_jobs": int(options.get("max_jobs") or 0),
        "build_flags": flags,
        "key": key,
        "source_sha256": source.sha256,
        "force_build": row.force_build,
        "modules": list(row.provides_modules),
        "job_memory_mb": row.memory_for(str(options["sm"])),
        "disk_mb": row.disk_mb,
    }
    special = supply.find_special(
        row.name, row.version, flags, options.get("patch_root"), options.get("companions") or {}
    )
    return Order(row, source, key, arguments, special)


def progress_line(host: str, component: str, status: Mapping[str, Any]) -> str:
    """Return one line that says how far a build is."""
    done, total = status["objects_done"], status["objects_total"]
    objects = f"{done}/{total} objects, " if total else f"{done} objects, " if done else ""
    return f"{host} | {component}: {objects}{duration(status['elapsed'])} elapsed"


def follow(
    device: Device, order: Order, logs: str, sleep: Callable[[float], Any] = time.sleep
) -> tuple[dict[str, Any], bool]:
    """Make sure that the build runs, stay with it until it ends, and return its wheel.

    Args:
        device: where.
        order: what.
        logs: folder on the controller that the whole log is copied to if it fails.
        sleep: waits, between attempts to reach a lost device.

    Returns:
        What the module's mode "result" returned, and whether this run compiled anything.

    Raises:
        StepFailed: a step failed; the log was fetched where there is one.
    """
    module = "jetson.mamba.build_wheel"

    def step(mode: str, **more: Any) -> dict[str, Any]:
        return _checked(device.run(module, {**order.arguments, "mode": mode, **more}))

    name = f"{order.row.name} {order.row.version}"
    answer = step("start")
    if answer["state"] == "needs_source":
        device.send(str(order.source.path), answer["upload"])
        answer = step("start", source_tar=answer["upload"])
    started = bool(answer["started"])
    compiled = started or answer["state"] == "running"
    if compiled:
        minutes = order.row.minutes_for(str(order.arguments["sm"]))
        what = "goes on where it stopped" if answer["resumed"] else "started" if started else "is running already"
        about = f"about {minutes} min by estimate"
        device.say(f"{device.host} | {name}: build {what}, {about}; log on the device: {order.folder}/log")
    try:
        while True:
            status = _patiently(device, lambda: step("poll", wait_seconds=POLL_SECONDS), sleep)
            if status["state"] != "running":
                break
            device.say(progress_line(device.host, order.row.name, status))
        result = step("result")
    except StepFailed as failure:
        raise StepFailed(_with_log(device, order, failure.result, logs), built=True) from failure
    if compiled:
        took = duration(result.get("seconds") or 0)
        device.say(f"{device.host} | {name}: built in {took}, wheel of {result['size_mb']} MB")
    return result, compiled


def build(
    device: Device,
    order: Order,
    wish: supply.Wish,
    house: Wheelhouse,
    patience: float,
    logs: str,
    l4t: str | None,
    sleep: Callable[[float], Any] = time.sleep,
) -> tuple[supply.Supply, bool]:
    """Have a wheel in the wheelhouse that nobody has: build it on a device and fetch it.

    Args:
        device: the builder.
        order: what.
        wish: what it must be.
        house: where it is kept.
        patience: seconds to wait for another controller that builds the same.
        logs: see follow().
        l4t: the builder's release, recorded.
        sleep: see follow().

    Returns:
        the wheel, and whether this run compiled anything.

    Raises:
        StepFailed: a step on the device failed.
        WrongWheel: what was built is not what was to be built.
        Problem: another controller did not come to an end, or what arrived is not what was sent.
    """
    with house.locked(wish.class_id, wish.component, wish.key, device.say, patience):
        found = supply.at_hand(house, wish)
        if found.path is not None:
            return found, False
        if found.faulty:
            supply.discard(house, wish, found, device.say)
            found = supply.at_hand(house, wish)
            if found.path is not None:
                return found, False
        built, compiled = follow(device, order, logs, sleep)
        with TemporaryDirectory(prefix="built-") as scratch:
            wheel, log = Path(scratch, os.path.basename(built["wheel"])), Path(scratch, "log")
            with transfer.StillWorking(device.say, f"{device.host}: fetching {wheel.name} ({built['size_mb']} MB)"):
                device.receive(built["wheel"], str(wheel))
            _check_arrival(wheel, built["sha256"], device.host)
            with contextlib.suppress(*device.errors):
                device.receive(f"{order.folder}/log", str(log))
            facts = {
                "sha256": built["sha256"],
                "builder": device.host,
                "l4t": l4t,
                "seconds": built["seconds"],
                "source": without_passwords(order.source.origin),
            }
            try:
                inspected = supply.inspect(wish, wheel)
            except Problem as problem:
                raise WrongWheel(problem.found, problem.expected, problem.next_step) from problem
            kept = supply.keep(house, wish, wheel, facts, log if log.is_file() else None, inspected)
        left = device.run("jetson.mamba.build_wheel", {**order.arguments, "mode": "discard"})
        if left.get("failed"):
            device.say(f"{device.host} | the wheel is kept, but {order.folder} stays there: {left.get('msg')}")
    return kept, compiled


def _check_arrival(wheel: Path, sha256: str, host: str) -> None:
    found = sha256_file(str(wheel))
    if found != sha256:
        raise Problem(
            f"{wheel.name} arrived from {host} with sha256 {found}",
            f"sha256 {sha256}, as it has there",
            "run again; nothing is compiled anew",
        )


def _checked(result: dict[str, Any]) -> dict[str, Any]:
    if result.get("failed") or result.get("unreachable"):
        raise StepFailed(result)
    return result


def _patiently(
    device: Device, ask: Callable[[], dict[str, Any]], sleep: Callable[[float], Any]
) -> dict[str, Any]:
    """Ask until the device answers; the build goes on without us."""
    waited = 0
    while True:
        try:
            return ask()
        except device.lost as error:
            if waited >= PATIENCE_SECONDS:
                raise
            if not waited:
                why = str(error).strip()[:120]
                device.say(f"{device.host} | connection lost ({why}); the build goes on, trying again")
            sleep(RETRY_SECONDS)
            waited += RETRY_SECONDS


def _with_log(device: Device, order: Order, failure: dict[str, Any], logs: str) -> dict[str, Any]:
    """Return a failure with the place of the copied log in it."""
    local = Path(logs).expanduser() / report.file_stem(device.host) / f"{order.row.name}-{order.key[:12]}.log"
    with contextlib.suppress(OSError, *device.lost, *device.errors):
        local.parent.mkdir(parents=True, exist_ok=True)
        device.receive(f"{order.folder}/log", str(local))
        if local.is_file():
            copied = os.path.relpath(local) if local.is_relative_to(Path.cwd()) else str(local)
            message = f"{failure.get('msg', '')}\nlog:      {copied} (copy of it here)"
            failure = {**failure, "msg": message, "local_log": str(local)}
    return failure
