"""The controller's half of wheel_set: asks first, sends only what is missing, cleans up."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.action import fetch_artefacts, wheel_set
from ansible_collections.jetson.mamba.plugins.module_utils import receive, wheels
from ansible_collections.jetson.mamba.plugins.plugin_utils import fetch, transfer

from tests.unit.plugins.fake_device import Receiving

TARGET = {"machine": "aarch64", "python": "3.10", "glibc": "2.35"}
X86 = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\x3e\x00"


def make_wheel(folder: Path, name: str, tag: str = "py3-none-any", files: dict[str, bytes] | None = None) -> Path:
    """Write a wheel of version 1.0."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0-{tag}.whl"
    content = {f"{name}.py": b"x = 1\n", **(files or {})}
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in content.items():
            archive.writestr(member, data)
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", f"{name}.py,,\n")
    return path


class Device(Receiving, wheel_set.ActionModule):
    """The action with a device that is a folder: its half runs here, and installing is unpacking."""

    def __init__(self, arguments: dict[str, Any], check: bool = False) -> None:
        self._task = SimpleNamespace(args=arguments, check_mode=check, async_val=0, action="wheel_set", diff=False)
        self.begin()
        self.calls: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.told: list[dict[str, Any]] = []
        self.install_fails = False

    def _execute_module(self, *_positional: Any, **options: Any) -> dict[str, Any]:
        arguments = options["module_args"]
        if options["module_name"] == transfer.MODULE:
            return self.receive(arguments)
        self.calls.append(arguments["mode"])
        self.told.append(arguments)
        missing = wheels.query(arguments["site_packages"], arguments["wheels"])
        if arguments["mode"] == "query":
            return {"changed": False, "missing": missing, "free_mb": 1000}
        self.rows = arguments["wheels"]
        if self.install_fails:
            return {"failed": True, "msg": "pip failed"}
        for wheel in wheels.locate(arguments["wheels"], arguments["source_dir"]):
            with zipfile.ZipFile(wheel["path"]) as archive:
                archive.extractall(arguments["site_packages"])
        return {"changed": True, "installed": [row["name"] for row in missing], "conflicts": []}

    def sent(self) -> int:
        """Return how many files were put."""
        return len(self.put)


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    """Return arguments with a lock of two wheels that are in the cache, and one extra wheel."""
    cache = fetch.Cache(tmp_path / "cache")
    lock = ""
    for name in ("one", "two"):
        path = make_wheel(tmp_path / "made", name)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        cache.take(path, digest, path.name)
        lock += f"# {path.name} {100}\n{name}==1.0 --hash=sha256:{digest}\n"
    (tmp_path / "lock.txt").write_text(lock)
    extra = make_wheel(tmp_path / "own", "torch", "cp310-cp310-linux_aarch64")
    (tmp_path / "site").mkdir()
    return {
        "python": "/usr/bin/python3",
        "site_packages": str(tmp_path / "site"),
        "lock": str(tmp_path / "lock.txt"),
        "target": TARGET,
        "extra": [{"name": "torch", "version": "1.0", "path": str(extra)}],
        "tmp": str(tmp_path / "device tmp"),
        "cache": str(cache.root),
    }


def run(device: wheel_set.ActionModule) -> dict[str, Any]:
    """Run an action for a host."""
    return device.run(None, {"inventory_hostname": "orin"})


def test_installs_what_is_missing_and_leaves_nothing_behind(arguments: dict[str, Any]) -> None:
    device = Device(arguments)
    result = run(device)
    assert result["changed"] and result["installed"] == ["one", "two", "torch"]
    assert device.calls == ["query", "install"]
    assert device.sent() == 1 and device.steps == ["open", "finish", "close"]
    assert [row["keep_origin"] for row in device.rows] == [False, False, True]
    assert all(len(row["sha256"]) == 64 for row in device.rows)
    assert list(Path(arguments["tmp"]).iterdir()) == []
    again = Device(arguments)
    result = run(again)
    assert not result["changed"] and again.calls == ["query"] and "diff" not in result


def test_only_what_is_missing_is_sent(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run(Device(arguments))
    (Path(arguments["site_packages"]) / "two.py").unlink()
    monkeypatch.setattr(transfer, "SMALL_BYTES", 0)
    device = Device(arguments)
    result = run(device)
    assert result["missing"] == [{"name": "two", "version": "1.0", "reason": "two.py is missing"}]
    assert device.sent() == 1 and device.put[0][1] == (
        Path(arguments["cache"]).joinpath("files", device.rows[0]["sha256"], "two-1.0-py3-none-any.whl").stat().st_size
    )


def test_check_mode_asks_and_does_no_more(arguments: dict[str, Any]) -> None:
    device = Device(arguments, check=True)
    result = run(device)
    assert result["changed"] and device.calls == ["query"] and device.sent() == 0
    assert result["diff"]["before"].splitlines()[0] == "one: not installed"
    assert result["diff"]["after"].splitlines()[2] == "torch: 1.0"
    assert not Path(arguments["tmp"]).exists()


def test_the_folder_on_the_device_goes_also_when_installing_fails(arguments: dict[str, Any]) -> None:
    device = Device(arguments)
    device.install_fails = True
    result = run(device)
    assert result["failed"] and result["msg"] == "pip failed"
    assert list(Path(arguments["tmp"]).iterdir()) == []


def test_too_little_room_is_said_before_anything_is_sent(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receive, "free_bytes", lambda _path: 10)
    device = Device(arguments)
    result = run(device)
    assert result["failed"] and "jetson_platform_tmp_root" in result["problem"]["next"]
    assert device.sent() == 0 and "install" not in device.calls


def test_a_tmp_that_cannot_be_made(arguments: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run(Device({**arguments, "tmp": str(tmp_path / "file/tmp")}))
    assert result["failed"] and "no folder could be made" in result["msg"]


@pytest.mark.parametrize(
    ("tag", "files", "words"),
    [
        ("cp311-cp311-linux_x86_64", {}, "cp311"),
        ("cp310-cp310-linux_aarch64", {"core.so": X86}, "core.so is for x86_64"),
    ],
)
def test_a_wheel_for_another_machine_is_refused(
    arguments: dict[str, Any], tmp_path: Path, tag: str, files: dict[str, bytes], words: str
) -> None:
    wrong = make_wheel(tmp_path / "wrong", "torch", tag, files)
    device = Device({**arguments, "extra": [{"name": "torch", "version": "1.0", "path": str(wrong)}]})
    result = run(device)
    assert result["failed"] and words in result["problem"]["found"]
    assert "aarch64" in result["problem"]["expected"]
    assert device.sent() == 0 and "install" not in device.calls


def test_the_device_is_told_of_nothing_that_is_the_controllers(arguments: dict[str, Any], tmp_path: Path) -> None:
    name = "torch-1.0-cp310-cp310-linux_aarch64.whl"
    digest = hashlib.sha256((tmp_path / "own" / name).read_bytes()).hexdigest()
    fetch.Cache(arguments["cache"]).take(tmp_path / "own" / name, digest, name)
    url = f"https://alice:secret@wheels.example/{name}"
    device = Device({**arguments, "extra": [{"name": "torch", "version": "1.0", "url": url, "sha256": digest}]})
    result = run(device)
    assert result["installed"] == ["one", "two", "torch"] and "secret" not in json.dumps([device.told, result])
    assert device.rows[2]["url"] == f"https://wheels.example/{name}", "which pip freeze will name"
    assert all(set(told) <= set(wheels.ON_DEVICE) for told in device.told)


def test_arguments_are_checked(arguments: dict[str, Any]) -> None:
    for change, words in (
        ({"target": None}, "lock without target"),
        ({"target": {"machine": "aarch64"}}, "target lacks"),
        ({"extra": [{"name": "torch", "version": "1.0"}]}, "no place"),
        ({"extra": [{"name": "torch", "version": "1.0", "path": "/a", "url": "b"}]}, "url and path"),
    ):
        result = run(Device({**arguments, **change}))
        assert result["failed"] and words in result["msg"]


# ---------------------------------------------------------------- fetch_artefacts


class Controller(fetch_artefacts.ActionModule):
    """The action fetch_artefacts without Ansible around it."""

    def __init__(self, arguments: dict[str, Any], check: bool = False) -> None:
        self._task = SimpleNamespace(args=arguments, check_mode=check, async_val=0, action="fetch", diff=False)
        self._connection = SimpleNamespace(_shell=SimpleNamespace(tmpdir=None), has_native_async=False)


def fetch_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return those arguments that fetch_artefacts has too."""
    return {name: arguments[name] for name in ("lock", "target", "extra", "cache")}


def test_fetch_artefacts_has_nothing_to_do_where_all_is_cached(arguments: dict[str, Any]) -> None:
    result = Controller(fetch_arguments(arguments)).run()
    assert (result["changed"], result["fetched"], result["libraries"]) == (False, [], {})


def test_fetch_artefacts_leaves_out_libraries_that_the_lock_brings(arguments: dict[str, Any], tmp_path: Path) -> None:
    cache = fetch.Cache(arguments["cache"])
    digest = hashlib.sha256(Path(arguments["extra"][0]["path"]).read_bytes()).hexdigest()
    note = cache.root / "needed" / f"{digest}.json"
    note.parent.mkdir()
    note.write_text(json.dumps({"schema": 1, "needed": ["libcudnn.so.9", "libopenblas.so.0"]}))
    asked = Controller(fetch_arguments(arguments), check=True).run()["libraries"]
    assert sorted(asked) == ["libcudnn.so.9", "libopenblas.so.0"]
    lock = Path(arguments["lock"])
    lock.write_text(lock.read_text() + f"nvidia-cudnn-cu12==9.10.2.21 --hash=sha256:{'a' * 64}\n")
    result = Controller(fetch_arguments(arguments), check=True).run()
    assert result["libraries"] == {"libopenblas.so.0": "libopenblas0"}


def test_fetch_artefacts_in_check_mode_names_what_is_absent(arguments: dict[str, Any], tmp_path: Path) -> None:
    wanted = {**fetch_arguments(arguments), "cache": str(tmp_path / "empty")}
    wanted["index_files"] = [{"project": "p", "filename": "p-1.tar.gz", "sha256": "a" * 64}]
    result = Controller(wanted, check=True).run()
    assert result["absent"] == ["one==1.0", "two==1.0", "p-1.tar.gz"]
    assert not (tmp_path / "empty" / "files").exists()


def test_fetch_artefacts_wants_a_checksum(arguments: dict[str, Any]) -> None:
    wanted = fetch_arguments(arguments)
    name = "torch-1.0-cp310-cp310-linux_aarch64.whl"
    wanted["extra"] = [{"name": "torch", "version": "1.0", "url": f"http://127.0.0.1:9/{name}", "sha256": None}]
    result = Controller(wanted).run()
    assert result["failed"] and "sha256sum" in result["problem"]["next"]


def test_fetch_artefacts_looks_into_extra_wheels(arguments: dict[str, Any], tmp_path: Path) -> None:
    trap = make_wheel(tmp_path / "trap", "torch", "cp310-cp310-linux_aarch64", {"a.so": X86})
    wanted = {**fetch_arguments(arguments), "extra": [{"name": "torch", "version": "1.0", "path": str(trap)}]}
    assert "x86_64" in Controller(wanted).run()["msg"]


def test_a_device_is_told_where_its_wheels_come_from(arguments: dict[str, Any]) -> None:
    cache = fetch.Cache(arguments["cache"])
    (one,) = cache.root.glob("files/*/one-*.whl")
    cache.note_origin(one.parent.name, "http://127.0.0.1:9/one.whl")
    for downloads, steps in (("controller", ["open", "finish", "close"]), ("device", ["pull", "open", "finish"])):
        told: list[dict[str, Any]] = []

        class Telling(Device):
            def receive(self, said: dict[str, Any], told: list[dict[str, Any]] = told) -> dict[str, Any]:
                told.append(said)
                return super().receive(said)

        device = Telling(arguments)
        plan = {"transfer": {"downloads": downloads}}
        result = device.run(None, {"inventory_hostname": "orin", "jetson_platform_plan": plan})
        assert result["changed"] and device.steps[:3] == steps
        urls = {row["url"] for call in told for row in call["wanted"] if "url" in row}
        assert urls == ({"http://127.0.0.1:9/one.whl"} if downloads == "device" else set())
        for path in Path(arguments["site_packages"]).glob("*.dist-info"):
            shutil.rmtree(path)
