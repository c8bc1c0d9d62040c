"""The controller's half of debian_packages: asks first, sends only what is needed, waits, cleans up."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ansible_collections.jetson.mamba.plugins.action import debian_packages
from ansible_collections.jetson.mamba.plugins.module_utils import deb_install, debs
from ansible_collections.jetson.mamba.plugins.modules import debian_packages as module
from ansible_collections.jetson.mamba.plugins.plugin_utils import deb_resolver, fetch, transfer

ROOT = Path(__file__).resolve().parents[3]


class Device(debian_packages.ActionModule):
    """The action with a device that answers from a table and notes what it is asked."""

    def __init__(self, arguments: dict[str, Any], check: bool = False) -> None:
        self._task = SimpleNamespace(
            args=arguments, check_mode=check, async_val=0, action="debian_packages", diff=False
        )
        self._connection = SimpleNamespace(_shell=SimpleNamespace(tmpdir=None), has_native_async=False)
        self._templar = SimpleNamespace(template=lambda value: value)
        self.asked: list[dict[str, Any]] = []
        self.installed: list[str] = []
        self.unfinished: list[list[str]] = []
        self.holders: list[str | None] = [None]
        self.delivered: list[list[str]] = []
        self.lines: list[str] = []
        self.answers: dict[str, dict[str, Any]] = {
            "describe": {"description": deb_install.pack({"architecture": "arm64"})},
            "choose": {"packages": []},
            "install": {"packages": [{"name": "g++", "version": "12", "arch": "arm64", "old": ""}]},
            "simulate": {"packages": [{"name": "g++", "version": "12", "arch": "arm64", "old": ""}]},
        }

    def _execute_module(self, *_positional: Any, **options: Any) -> dict[str, Any]:
        arguments = options["module_args"]
        self.asked.append(arguments)
        mode = arguments["mode"]
        if mode == "query":
            missing = [{"name": name, "installed": ""} for name in arguments["names"] if name not in self.installed]
            unfinished = self.unfinished.pop(0) if self.unfinished else []
            common = {"architecture": "arm64", "architectures": ["arm64"], "tmp": "/tmp"}
            return {"missing": missing, "unfinished": unfinished, **common}
        if mode == "wait":
            return {"holder": self.holders.pop(0)}
        return self.answers[mode]

    def _courier(self, arguments: dict[str, Any]) -> Any:
        @contextlib.contextmanager
        def delivered(parcels: Sequence[transfer.Parcel]) -> Iterator[str]:
            for parcel in parcels:
                assert hashlib.sha256(Path(parcel.path).read_bytes()).hexdigest() == parcel.sha256
            self.delivered.append([parcel.name for parcel in parcels])
            yield "/tmp/delivery"

        return SimpleNamespace(delivered=delivered)

    def _say(self, text: str) -> None:
        self.lines.append(text)

    @property
    def modes(self) -> list[str]:
        return [arguments["mode"] for arguments in self.asked]

    def result(self, **variables: Any) -> dict[str, Any]:
        return self.run(task_vars={"inventory_hostname": "orin", **variables})


@pytest.fixture
def resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Have the resolver answer at once with two files; return what it was asked."""
    calls: list[dict[str, Any]] = []
    rows, paths = [], []
    for name, old in (("gcc", "11"), ("g++", "")):
        path = tmp_path / f"{name}.deb"
        path.write_text(name)
        digest = hashlib.sha256(name.encode()).hexdigest()
        row = {"name": name, "version": "12", "arch": "arm64", "old": old, "filename": f"{name}_12_arm64.deb"}
        rows.append({**row, "sha256": digest, "size": 3, "url": f"http://a/{name}.deb"})
        paths.append(path)
    resolution = deb_resolver.Resolution(rows, tmp_path / "lock")

    def ensure(_self: Any, description: Any, wishes: Any, repositories: Any) -> Any:
        calls.append({"names": [wish.text for wish in wishes], "repositories": repositories, "fetch": True})
        return resolution, paths

    def resolve(_self: Any, description: Any, wishes: Any, repositories: Any, fresh: bool = False) -> Any:
        calls.append({"names": [wish.text for wish in wishes], "repositories": repositories, "fetch": False})
        return resolution

    monkeypatch.setattr(deb_resolver.Resolver, "ensure", ensure)
    monkeypatch.setattr(deb_resolver.Resolver, "resolve", resolve)
    return calls


def test_a_device_that_has_everything_is_asked_once() -> None:
    device = Device({"names": ["g++", "gcc"]})
    device.installed = ["g++", "gcc"]
    result = device.result()
    assert (result["changed"], result["missing"], device.modes) == (False, [], ["query"])


def test_no_names_ask_nobody() -> None:
    device = Device({"names": []})
    assert device.result()["changed"] is False
    assert device.asked == []


def test_what_is_missing_is_worked_out_sent_and_installed(resolved: list[dict[str, Any]]) -> None:
    device = Device({"names": ["g++", "patch"]})
    device.installed = ["patch"]
    result = device.result()
    assert result["changed"] is True
    assert device.modes == ["query", "describe", "wait", "install"]
    assert device.delivered == [["gcc_12_arm64.deb", "g++_12_arm64.deb"]]
    assert device.asked[-1]["names"] == ["g++"]
    assert device.asked[-1]["source_dir"] == "/tmp/delivery"
    assert [row["filename"] for row in device.asked[-1]["files"]] == ["gcc_12_arm64.deb", "g++_12_arm64.deb"]
    assert resolved == [{"names": ["g++"], "repositories": [], "fetch": True}]
    assert result["diff"]["before"] == "gcc 11\n"
    assert result["diff"]["after"] == "g++ 12\ngcc 12\n"
    assert result["packages"][0]["url"] == "http://a/gcc.deb"


def test_check_mode_names_versions_and_fetches_no_package(resolved: list[dict[str, Any]]) -> None:
    device = Device({"names": ["g++"]}, check=True)
    result = device.result()
    assert result["changed"] is True
    assert result["diff"]["after"] == "g++ 12\ngcc 12\n"
    assert device.modes == ["query", "describe"]
    assert resolved[0]["fetch"] is False


def test_state_query_and_fetched_leave_the_device_as_it_is(resolved: list[dict[str, Any]]) -> None:
    device = Device({"names": ["g++"], "state": "query"})
    assert device.result()["missing"] == [{"name": "g++", "installed": ""}]
    assert device.modes == ["query"]
    device = Device({"names": ["g++"], "state": "fetched"})
    result = device.result()
    assert (result["changed"], device.modes, device.delivered) == (False, ["query", "describe"], [])
    assert resolved[0]["fetch"] is True


def test_the_hosts_variables_hold_where_the_task_says_nothing(resolved: list[dict[str, Any]]) -> None:
    device = Device({"names": ["g++"]})
    device.result(debian_packages_repositories=["device", "deb http://a/ /"])
    assert resolved[0]["repositories"] == ["device", "deb http://a/ /"]
    device = Device({"names": ["g++"], "source": "device"})
    device.result(debian_packages_source="none")
    assert device.modes == ["query", "wait", "install"]


def test_none_lists_what_is_missing() -> None:
    device = Device({"names": ["g++", "patch"]})
    device.installed = ["patch"]
    result = device.result(debian_packages_source="none")
    assert result["failed"]
    assert result["problem"]["found"] == "the device lacks g++"
    assert "sudo apt-get install g++" in result["problem"]["next"]


def test_a_part_of_l4t_is_not_installed_on_demand_either() -> None:
    device = Device({"names": ["nvidia-l4t-multimedia"]})
    assert "nvidia-l4t-multimedia" in device.result()["problem"]["found"]
    assert device.modes == ["query"]


def test_a_held_lock_is_announced_at_once_and_waited_for(resolved: list[dict[str, Any]]) -> None:
    device = Device({"names": ["g++"], "lock_minutes": 3})
    device.holders = ["unattended-upgr (pid 812)", "unattended-upgr (pid 812)", None]
    assert device.result()["changed"] is True
    waits = [arguments["lock_minutes"] for arguments in device.asked if arguments["mode"] == "wait"]
    assert waits == [0, 3, 3]
    assert len(device.lines) == 2
    assert "unattended-upgr (pid 812)" in device.lines[0]
    assert "180 s" in device.lines[0]


def test_what_another_run_is_about_is_waited_for(resolved: list[dict[str, Any]]) -> None:
    device = Device({"names": ["g++"]})
    device.unfinished = [["gcc is unpacked"], []]
    device.holders = ["apt-get (pid 9)", None, None]
    assert device.result()["changed"] is True
    assert device.modes == ["query", "wait", "wait", "query", "describe", "wait", "install"]


def test_unfinished_work_of_nobody_is_to_be_repaired_first(resolved: list[dict[str, Any]]) -> None:
    device = Device({"names": ["g++"]})
    device.unfinished = [["gcc is unpacked"], ["gcc is unpacked"]]
    result = device.result()
    assert "gcc is unpacked" in result["problem"]["found"]
    assert "sudo dpkg --configure -a" in result["problem"]["next"]
    assert device.modes == ["query", "wait", "query"]
    device = Device({"names": ["g++"]})
    device.unfinished, device.installed = [["gcc is unpacked"]], ["g++"]
    assert device.result()["changed"] is False, "it is in the way only of further packages"
    device = Device({"names": ["g++"], "state": "fetched"})
    device.unfinished = [["gcc is unpacked"]]
    assert device.result()["changed"] is False
    assert device.modes == ["query"]


def test_patience_ends(resolved: list[dict[str, Any]]) -> None:
    device = Device({"names": ["g++"], "lock_minutes": 0})
    device.holders = ["apt-get (pid 7)"]
    result = device.result()
    assert "apt-get (pid 7)" in result["problem"]["found"]
    assert "ps -fp 7;" in result["problem"]["next"]
    assert "install" not in device.modes


def test_a_failure_of_the_device_is_the_result(resolved: list[dict[str, Any]]) -> None:
    device = Device({"names": ["g++"]})
    device.answers["install"] = {"failed": True, "msg": "found: dpkg", "problem": {"found": "dpkg"}}
    result = device.result()
    assert result["failed"]
    assert result["problem"] == {"found": "dpkg"}


def make_folder(folder: Path) -> Path:
    folder.mkdir()
    for name in ("g++_4%3a12_arm64.deb", "g++_4%3a12_amd64.deb", "big_1_all.deb"):
        control = name.encode()
        member = f"{'control.tar.xz':<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(control):<10}`\n".encode()
        data = b"!<arch>\n" + member + control + b"\n" * (len(control) % 2) + bytes(5000)
        (folder / name).write_bytes(data)
    return folder


def test_of_a_folder_the_device_chooses_and_only_that_is_sent(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "debs")
    digest = hashlib.sha256((folder / "g++_4%3a12_arm64.deb").read_bytes()).hexdigest()
    big = hashlib.sha256((folder / "big_1_all.deb").read_bytes()).hexdigest()
    device = Device({"names": ["g++"], "source": "folder", "folder": str(folder), "cache": str(tmp_path / "cache")})
    chosen = {"name": "g++", "version": "4:12", "arch": "arm64", "old": "", "sha256": digest}
    device.answers["choose"] = {"packages": [{**chosen, "filename": "g++_4%3a12_arm64.deb"}]}
    result = device.result()
    assert device.modes == ["query", "choose", "wait", "install"]
    assert sorted(device.delivered[0]) == sorted([f"{digest}.deb", f"{big}.deb"]), "another architecture's is not asked"
    assert device.delivered[1] == ["g++_4%3a12_arm64.deb"]
    assert result["packages"][0]["sha256"] == digest


def test_check_mode_compares_names_in_a_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "debs")
    arguments = {"names": ["g++"], "source": "folder", "folder": str(folder), "cache": str(tmp_path / "cache")}
    device = Device(arguments, check=True)
    assert device.result()["diff"]["after"] == "g++ 4:12\n"
    assert (device.modes, device.delivered) == (["query"], [])


def test_check_mode_with_the_devices_own_apt_simulates() -> None:
    device = Device({"names": ["g++"], "source": "device"}, check=True)
    assert device.result()["diff"]["after"] == "g++ 12\n"
    assert device.modes == ["query", "simulate"]
    device = Device({"names": ["g++"], "source": "device"}, check=True)
    device.answers["simulate"] = {"failed": True, "msg": "no lists"}
    assert device.result()["diff"]["after"] == "g++\n"


def test_a_name_asked_for_twice_is_one(resolved: list[dict[str, Any]]) -> None:
    device = Device({"names": ["g++", "gcc", "g++"]})
    assert device.result()["changed"] is True
    assert resolved[0]["names"] == ["g++", "gcc"]


def test_the_files_for_a_relay_are_told_after_the_fetch(resolved: list[dict[str, Any]], tmp_path: Path) -> None:
    device = Device({"names": ["g++"], "state": "fetched"})
    digests = [hashlib.sha256(name).hexdigest() for name in (b"gcc", b"g++")]
    assert device.result()["files"] == [
        {"filename": "gcc_12_arm64.deb", "sha256": digests[0]},
        {"filename": "g++_12_arm64.deb", "sha256": digests[1]},
    ]
    device = Device({"names": ["g++"], "state": "fetched", "source": "device"})
    assert device.result()["files"] == []
    device = Device({"names": ["g++"], "state": "fetched"})
    device.installed = ["g++"]
    assert device.result()["files"] == []


def test_a_check_of_the_fetch_says_what_would_be_fetched(resolved: list[dict[str, Any]], tmp_path: Path) -> None:
    arguments = {"names": ["g++"], "state": "fetched", "cache": str(tmp_path / "cache")}
    device = Device(arguments, check=True)
    assert device.result()["changed"] is False
    assert device.lines == ["would fetch 2 of 2 Debian packages, 0.0 MB; the device needs gcc 12, g++ 12"]
    assert resolved[0]["fetch"] is False
    cache = fetch.Cache(tmp_path / "cache")
    for name in ("gcc", "g++"):
        digest = hashlib.sha256(name.encode()).hexdigest()
        cache.take(tmp_path / f"{name}.deb", digest, f"{name}_12_arm64.deb", move=False)
    device = Device(arguments, check=True)
    device.result()
    assert "in the controller's cache: gcc 12, g++ 12" in device.lines[0]
    device = Device({**arguments, "source": "device"}, check=True)
    device.result()
    assert device.lines == ["the device's own apt would fetch g++, with all that they need"]
    assert device.modes == ["query"]
    folder = make_folder(tmp_path / "debs")
    device = Device({**arguments, "names": ["g++"], "source": "folder", "folder": str(folder)}, check=True)
    device.result()
    assert device.lines == [f"{folder} has g++ 4:12"]


def test_no_password_is_in_what_a_failure_of_the_device_says() -> None:
    device = Device({"names": ["g++"], "source": "device"})
    said = "Failed to fetch https://bob:pw99@repo/x  401"
    device.answers["install"] = {"failed": True, "msg": said, "problem": {"found": said}}
    result = device.result()
    assert result["failed"] and "pw99" not in repr(result) and "repo/x" in result["msg"]


@pytest.mark.parametrize("said", [None, {"rate_limit_kbit": 8, "relay": "other"}])
def test_files_travel_as_the_plan_says(
    resolved: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, said: dict[str, Any] | None
) -> None:
    """No task has to repeat it: a task that names no transfer has the plan's rate limit and relay."""
    couriers: list[transfer.Courier] = []

    def delivered(courier: transfer.Courier, _parcels: Any) -> Any:
        couriers.append(courier)
        return contextlib.nullcontext("/tmp/delivery")

    monkeypatch.setattr(transfer.Courier, "delivered", delivered)
    device = Device({"names": ["g++"], **({"transfer": said} if said else {})})
    monkeypatch.setattr(device, "_courier", lambda arguments: debian_packages.ActionModule._courier(device, arguments))
    plan = {"transfer": {"rate_limit_kbit": 64, "relay": "orin-relay"}}
    assert device.result(jetson_platform_plan=plan)["changed"] is True
    assert [(courier._relay, courier._rate_kbit) for courier in couriers] == (
        [("other", 8)] if said else [("orin-relay", 64)]
    )


def test_the_role_the_module_and_the_action_have_the_same_options() -> None:
    defaults = yaml.safe_load((ROOT / "roles/debian_packages/defaults/main.yml").read_text())
    assert defaults == {
        debs.VARIABLE + "names": [],
        **{debs.VARIABLE + key: value for key, value in debs.SETTINGS.items()},
    }
    documented = yaml.safe_load(module.DOCUMENTATION)["options"]
    assert set(documented) == set(debs.ARGUMENTS)
    for name, option in debs.ARGUMENTS.items():
        for key in ("type", "default", "choices", "elements", "required"):
            assert documented[name].get(key) == option.get(key), (name, key)
