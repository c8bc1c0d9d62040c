"""The controller's half of installing a component: ask, have the wheel, send it, install, remember."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.action import component
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.modules.component import ON_DEVICE, PATHS_ON_DEVICE
from ansible_collections.jetson.mamba.plugins.plugin_utils import building, components, sources
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheelhouse import Wheelhouse

from tests.unit.plugins.fake_device import Receiving
from tests.unit.plugins.supply_kit import ORIN, SOURCE, damage, real_wheel, sha256, stock, stock_imported, wish
from tests.unit.plugins.wheel_kit import make_elf, make_wheel

WANTED = wish()


class Device(Receiving, component.ActionModule):
    """The action with a device that is a folder; what is installed there is a name and a record."""

    def __init__(self, arguments: dict[str, Any], check: bool = False, builds: Path | None = None) -> None:
        self._task = SimpleNamespace(args=arguments, check_mode=check, async_val=0, action="component", diff=False)
        self.begin()
        self._connection.fetch_file = self.fetch
        self.calls: list[str] = []
        self.installed: dict[str, Any] = {"reason": "causal_conv1d is not installed", "installed": None, "record": None}
        self.lacks: list[str] = []
        self.builds = builds
        self.arrived: dict[str, str] = {}
        self.told: list[dict[str, Any]] = []

    def _make_tmp_path(self, _remote_user: Any = None) -> str:
        self._connection._shell.tmpdir = "/ansible-tmp"
        return "/ansible-tmp"

    def _remove_tmp_path(self, tmp_path: str | None, force: bool = False) -> None:
        self._connection._shell.tmpdir = None

    def fetch(self, remote: str, local: str) -> None:
        if not remote.endswith(".whl"):
            raise FileNotFoundError(remote)
        assert self.builds is not None
        shutil.copy(self.builds, local)

    def _execute_module(self, *positional: Any, **options: Any) -> dict[str, Any]:
        name, arguments = options["module_name"].rpartition(".")[2], options["module_args"]
        if name == "receive_files":
            return super()._execute_module(*positional, **options)
        self.calls.append(name if name == "shared_libraries" else f"{name} {arguments['mode']}")
        answer: Callable[[dict[str, Any]], dict[str, Any]] = getattr(self, f"answer_{name}")
        return answer(arguments)

    def answer_component(self, arguments: dict[str, Any]) -> dict[str, Any]:
        assert arguments["key"] == WANTED.key
        self.told.append(arguments)
        if arguments["mode"] == "query":
            return {"changed": False, **self.installed}
        wheel = Path(arguments["wheel"])
        self.arrived[wheel.name] = sha256(wheel)
        self.installed = {"reason": None, "installed": arguments["version"], "record": arguments["record"]}
        return {"changed": True, "record": arguments["record"]}

    def answer_shared_libraries(self, arguments: dict[str, Any]) -> dict[str, Any]:
        missing = [name for name in arguments["libraries"] if name in self.lacks]
        return {"failed": True, "msg": f"missing: {missing}"} if missing else {"changed": False}

    def answer_build_wheel(self, arguments: dict[str, Any]) -> dict[str, Any]:
        assert self.builds is not None, "it compiled"
        made = {"wheel": f"/b/{self.builds.name}", "sha256": sha256(self.builds), "seconds": 80.0, "size_mb": 0.1}
        answers: dict[str, dict[str, Any]] = {
            "start": {"state": "running", "started": True, "resumed": False},
            "poll": {"state": "done"},
            "result": made,
            "discard": {},
        }
        return answers[arguments["mode"]]


@pytest.fixture
def house(tmp_path: Path) -> Wheelhouse:
    return Wheelhouse(tmp_path / "wheelhouse")


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the task's arguments; the source needs no fetching."""

    def make_order(_options: Any, _say: Any = None) -> building.Order:
        source = sources.SourceArchive(tmp_path / "s.tar", SOURCE, "causal_conv1d-1.6.0.tar.gz", "1.6.0")
        row = components.component("causal_conv1d", "1.6.0")
        return building.Order(row, source, WANTED.key, {"build_root": "/b", "sm": "87", "build_flags": []})

    monkeypatch.setattr(building, "make_order", make_order)
    monkeypatch.chdir(tmp_path)
    device = tmp_path / "device"
    return {
        "component": "causal_conv1d",
        "version": "1.6.0",
        "paths": {
            "python": "/p",
            "site_packages": "/s",
            "state": "/t",
            "build": "/b",
            "cuda_home": "",
            "tmp": str(device / "tmp"),
        },
        "class_id": ORIN,
        "sm": "87",
        "cache": str(tmp_path / "cache"),
        "wheelhouse": {"path": str(tmp_path / "wheelhouse"), "patience_minutes": 0.01},
        "transfer": {"rate_limit_kbit": 0, "relay": ""},
        "l4t": "36.4.7",
    }


def run(device: Device) -> dict[str, Any]:
    return device.run(None, {"inventory_hostname": "orin"})


def left_behind(arguments: dict[str, Any]) -> list[Path]:
    folder = Path(arguments["paths"]["tmp"])
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


def test_a_served_component_is_sent_installed_and_remembered(
    arguments: dict[str, Any], house: Wheelhouse, tmp_path: Path
) -> None:
    wheel = real_wheel(tmp_path / "made")
    stock(house, WANTED, wheel)
    device = Device(arguments)
    result = run(device)
    assert result["changed"] and result["built"] is False and not result.get("failed")
    assert device.calls == ["component query", "component install"]
    assert device.arrived == {wheel.name: sha256(wheel)} and left_behind(arguments) == []
    assert result["record"] == {
        "key": WANTED.key,
        "version": "1.6.0",
        "class_id": ORIN,
        "sm": "87",
        "build_flags": [],
        "source_sha256": SOURCE,
        "origin": "built on orin-z",
        "wheel": wheel.name,
        "wheel_sha256": sha256(wheel),
    }
    for told in device.told:
        assert set(told) <= set(ON_DEVICE) and set(told["paths"]) == set(PATHS_ON_DEVICE)
    assert result["reason"] == "causal_conv1d is not installed"
    assert result["diff"]["before"] == "" and WANTED.key[:12] in result["diff"]["after"]


def test_a_second_run_changes_and_sends_nothing(arguments: dict[str, Any], house: Wheelhouse, tmp_path: Path) -> None:
    stock(house, WANTED, real_wheel(tmp_path / "made"))
    device = Device(arguments)
    run(device)
    put, device.calls = list(device.put), []
    result = run(device)
    assert result["changed"] is False and result["reason"] is None and "diff" not in result
    assert device.calls == ["component query"] and device.put == put


def test_what_is_installed_needs_no_wheelhouse(arguments: dict[str, Any], house: Wheelhouse) -> None:
    device = Device(arguments)
    device.installed = {"reason": None, "installed": "1.6.0", "record": {"key": WANTED.key}}
    assert run(device)["changed"] is False and not house.root.exists()


def test_reinstalling_takes_the_same_wheel(arguments: dict[str, Any], house: Wheelhouse, tmp_path: Path) -> None:
    stock(house, WANTED, real_wheel(tmp_path / "made"))
    device = Device({**arguments, "reinstall": True})
    device.installed = {"reason": None, "installed": "1.6.0", "record": {"key": WANTED.key}}
    result = run(device)
    assert result["changed"] and result["reason"] == "causal_conv1d_reinstall is set" and result["built"] is False


def test_an_imported_wheel_claims_no_source(arguments: dict[str, Any], house: Wheelhouse, tmp_path: Path) -> None:
    stock_imported(house, WANTED, real_wheel(tmp_path / "made"))
    device = Device(arguments)
    record = run(device)["record"]
    assert record["source_sha256"] is None and record["origin"] == "folder /archive"
    assert record["key"] == WANTED.key, "or the second run would install it again"


def test_a_wheel_that_is_nowhere_is_built_on_this_device(
    arguments: dict[str, Any], house: Wheelhouse, tmp_path: Path
) -> None:
    wheel = real_wheel(tmp_path / "made")
    device = Device(arguments, builds=wheel)
    result = run(device)
    assert result["built"] is True and device.arrived == {wheel.name: sha256(wheel)}
    assert device.calls == [
        "component query",
        *(f"build_wheel {mode}" for mode in ("start", "poll", "result", "discard")),
        "component install",
    ]
    assert house.manifest(ORIN)[WANTED.key]["builder"] == "orin", "the next host has it"
    assert house.manifest(ORIN)[WANTED.key]["l4t"] == "36.4.7"


def test_where_nothing_may_be_built_it_fails_before_it_changes_anything(
    arguments: dict[str, Any], house: Wheelhouse, tmp_path: Path
) -> None:
    row = stock(house, WANTED, real_wheel(tmp_path / "made"))
    damage(house, row)
    arguments["wheelhouse"]["build"] = False
    device = Device(arguments, builds=real_wheel(tmp_path / "new"))
    result = run(device)
    assert result["failed"] and device.calls == ["component query"] and device.put == []
    assert "wheelhouse_build" in result["msg"] and row["sha256"] in result["msg"]


def test_a_faulty_wheel_is_never_sent(arguments: dict[str, Any], house: Wheelhouse, tmp_path: Path) -> None:
    row = stock(house, WANTED, real_wheel(tmp_path / "old", text="old"))
    bad = sha256(damage(house, row))
    device = Device(arguments, builds=real_wheel(tmp_path / "new", text="new"))
    assert run(device)["built"] is True
    assert bad not in device.arrived.values() and len([*(house.folder(ORIN) / "aside").glob("*.whl")]) == 1


@pytest.mark.parametrize("where", ["wheelhouse", "source", "nowhere"])
def test_check_mode_asks_and_says_where_from(
    arguments: dict[str, Any], house: Wheelhouse, tmp_path: Path, where: str
) -> None:
    if where == "wheelhouse":
        stock(house, WANTED, real_wheel(tmp_path / "made"))
    elif where == "source":
        real_wheel(tmp_path / "archive")
        arguments["wheelhouse"]["sources"] = [{"folder": str(tmp_path / "archive")}]
    device = Device(arguments, check=True)
    result = run(device)
    assert result["changed"] and result["diff"]["after"] and not result.get("failed")
    words = {"wheelhouse": "built on orin-z", "source": f"folder {tmp_path / 'archive'}", "nowhere": "a build of about"}
    assert words[where] in result["msg"] and "causal_conv1d is not installed" in result["msg"]
    assert device.calls == ["component query"] and device.put == []
    assert house.root.exists() is (where == "wheelhouse")


def test_the_devices_linker_is_asked_before_anything_is_sent(
    arguments: dict[str, Any], house: Wheelhouse, tmp_path: Path
) -> None:
    wheel = real_wheel(tmp_path / "made", needed=("libcusparseLt.so.0", "libc10.so", "libc.so.6"))
    row = {**WANTED.row(sha256(wheel), "built on x", wheel.name, ["libcusparseLt.so.0"]), "key": WANTED.key}
    house.add(wheel, {**row, "source_sha256": SOURCE})
    device = Device(arguments)
    device.lacks = ["libcusparseLt.so.0"]
    result = run(device)
    assert result["failed"] and "libcusparseLt.so.0" in result["msg"]
    assert device.calls == ["component query", "shared_libraries"] and device.put == []
    device = Device(arguments)
    assert run(device)["changed"] and device.calls[1:] == ["shared_libraries", "component install"]


def test_a_failed_installation_is_a_failure_and_leaves_nothing(
    arguments: dict[str, Any], house: Wheelhouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock(house, WANTED, real_wheel(tmp_path / "made"))
    device = Device(arguments)
    answer = device.answer_component

    def failing(options: dict[str, Any]) -> dict[str, Any]:
        return answer(options) if options["mode"] == "query" else {"failed": True, "msg": "pip could not install"}

    monkeypatch.setattr(device, "answer_component", failing)
    result = run(device)
    assert result["failed"] and result["msg"] == "pip could not install" and left_behind(arguments) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [({"paths": {"python": "/p"}}, "paths has no site_packages"), ({"wheelhouse": {}}, "names no path")],
)
def test_a_task_without_a_plan_says_where_it_comes_from(
    arguments: dict[str, Any], change: dict[str, Any], found: str
) -> None:
    result = run(Device({**arguments, **change}))
    assert result["failed"] and found in result["msg"] and "jetson_platform" in result["msg"]
    assert set(result["problem"]) == set(Problem("a", "b", "c").as_dict())


def test_a_password_of_a_source_reaches_neither_device_nor_result(
    arguments: dict[str, Any], house: Wheelhouse, tmp_path: Path
) -> None:
    stock(house, WANTED, real_wheel(tmp_path / "made"))
    sources = [{"index": "https://alice:secret@wheels.invalid/simple"}]
    arguments["wheelhouse"]["sources"] = sources
    arguments["source"] = {"kind": "git", "url": "https://alice:secret@git.invalid/x", "commit": "a" * 40}
    device = Device(arguments)
    result = run(device)
    assert result["changed"] and "secret" not in json.dumps([device.told, result])


def test_a_trap_wheel_is_refused_with_its_reason_and_nothing_is_changed(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "archive" / "causal_conv1d-1.6.0-cp310-cp310-linux_aarch64.whl"
    trap.parent.mkdir()
    x86 = {"causal_conv1d_cuda.cpython-310-aarch64-linux-gnu.so": make_elf("x86_64")}
    made = make_wheel(tmp_path, "causal_conv1d", "1.6.0", "cp310-cp310-linux_aarch64", "cp310-cp310-linux_x86_64", x86)
    shutil.move(made, trap)
    said: list[str] = []
    monkeypatch.setattr(component.Display, "display", lambda _self, text, *_more, **_words: said.append(text))
    arguments["wheelhouse"].update(sources=[{"folder": str(trap.parent)}], build=False)
    device = Device(arguments)
    result = run(device)
    assert result["failed"] and device.calls == ["component query"] and device.steps == []
    (line,) = [line for line in said if "not from" in line]
    for text in (line, result["problem"]["found"]):
        assert f"folder {trap.parent}: {trap.name}" in text and "its WHEEL file says cp310-cp310-linux_x86_64" in text
        assert "is for x86_64" in text
    assert "wheelhouse_build is false" in result["problem"]["expected"] and result["problem"]["next"]
