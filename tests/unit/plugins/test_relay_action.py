"""The controller's half of a relay: what its peers will need, sent once; and what is said where there is no relay."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.action import relay as relay_action
from ansible_collections.jetson.mamba.plugins.module_utils import relay
from ansible_collections.jetson.mamba.plugins.plugin_utils import fetch, stock, transfer

from tests.unit.plugins.fake_device import Receiving
from tests.unit.plugins.wheel_kit import make_wheel

FACT = "jetson_platform_plan"


class Host(Receiving, relay_action.ActionModule):
    """The action on a host that is a folder; its server is not started."""

    def __init__(self, arguments: dict[str, Any], check: bool = False) -> None:
        self._task = SimpleNamespace(args=arguments, check_mode=check, async_val=0, action="relay", diff=False)
        self.begin()
        self.calls: list[dict[str, Any]] = []
        self.lacking: list[str] | None = None
        self.fails = False

    def _execute_module(self, *_positional: Any, **options: Any) -> dict[str, Any]:
        arguments = options["module_args"]
        if options["module_name"] == transfer.MODULE:
            return self.receive(arguments)
        self.calls.append(arguments)
        if self.fails:
            problem = {"found": "no such address", "expected": "one", "next": "set it"}
            return {"failed": True, "msg": "no such address", "problem": problem}
        if arguments["mode"] == "query":
            return relay.query(arguments["tmp"], arguments["wanted"]) | {"running": False}
        if arguments["mode"] == "start":
            delivered = arguments.get("delivered")
            files = sorted(path.name for path in Path(delivered).iterdir()) if delivered else []
            return {"changed": True, "url": "http://10.0.0.1:4/t", "files": files}
        return {"changed": True}


def served(folder: Path, name: str, data: bytes) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return {"path": str(folder / name), "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def plan(relay_host: str, outcomes: list[str], component: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    return {
        "transfer": {"relay": relay_host, "rate_limit_kbit": 0},
        "outcomes": outcomes,
        "components": {"mamba_ssm": {"served": component}},
        **more,
    }


def variables(plans: dict[str, dict[str, Any]], host: str, active: list[str] | None = None) -> dict[str, Any]:
    return {
        "inventory_hostname": host,
        "ansible_host": "10.0.0.1",
        "ansible_play_hosts": active or list(plans),
        "hostvars": {name: {FACT: value} for name, value in plans.items()},
    }


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(relay_action.display, "warning", said.append)
    return said


@pytest.fixture
def wheel(tmp_path: Path) -> dict[str, Any]:
    return served(tmp_path / "wheelhouse", "mamba_ssm-2.2.4.whl", b"mamba" * 1000)


def run(host: Host, task_vars: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = host.run(None, task_vars)
    return result


def test_what_two_clients_need_is_sent_once(tmp_path: Path, wheel: dict[str, Any], warnings: list[str]) -> None:
    plans = {
        "a": plan("", [], None),
        "b": plan("a", ["mamba_ssm", "activation"], wheel),
        "c": plan("a", ["mamba_ssm"], wheel),
        "d": plan("", ["mamba_ssm"], served(tmp_path / "w", "other", b"other")),
    }
    host = Host({"tmp": str(tmp_path / "tmp")})
    result = run(host, variables(plans, "a"))
    assert result["clients"] == ["b", "c"] and result["changed"]
    assert result["store"] == {"url": "http://10.0.0.1:4/t", "files": [wheel["sha256"]]}
    assert [call["mode"] for call in host.calls] == ["query", "start"]
    assert host.calls[1]["address"] == "10.0.0.1" and host.calls[1]["wanted"] == [
        {"sha256": wheel["sha256"], "size": 5000}
    ]
    assert host.put == [("00000.33554432.part", 5000)] and warnings == []
    # every step as the connecting user, also where the task becomes root
    assert host.as_root == [] and host._connection.become == "sudo"


def test_what_one_host_alone_needs_goes_to_it_directly(tmp_path: Path, wheel: dict[str, Any]) -> None:
    plans = {"a": plan("", [], None), "b": plan("a", ["mamba_ssm"], wheel), "c": plan("a", [], wheel)}
    host = Host({"tmp": str(tmp_path / "tmp")})
    result = run(host, variables(plans, "a"))
    assert (result["clients"], result["store"], host.calls, host.steps) == ([], {}, [], [])


def test_the_relay_itself_is_one_of_those_that_need(tmp_path: Path, wheel: dict[str, Any]) -> None:
    plans = {"a": plan("a", ["mamba_ssm"], wheel), "b": plan("a", ["mamba_ssm"], wheel)}
    result = run(Host({"tmp": str(tmp_path / "tmp")}), variables(plans, "a"))
    assert result["clients"] == ["b"] and result["store"]["files"] == [wheel["sha256"]]


def test_only_active_hosts_count(tmp_path: Path, wheel: dict[str, Any]) -> None:
    plans = {name: plan("a", ["mamba_ssm"], wheel) for name in "abc"}
    assert run(Host({"tmp": str(tmp_path)}), variables(plans, "a", ["a"]))["clients"] == []


def test_check_mode_contacts_nobody(tmp_path: Path, wheel: dict[str, Any]) -> None:
    plans = {name: plan("a", ["mamba_ssm"], wheel) for name in "abc"}
    host = Host({"tmp": str(tmp_path)}, check=True)
    result = run(host, variables(plans, "a"))
    assert (result["clients"], result["changed"], result["store"]) == (["b", "c"], False, {})
    assert host.calls == [] and host.steps == []


def test_planning_speaks_for_all_hosts_and_contacts_nobody(tmp_path: Path, wheel: dict[str, Any]) -> None:
    plans = {"a": plan("a", ["mamba_ssm"], wheel), "b": plan("a", ["mamba_ssm"], wheel), "c": plan("a", [], wheel)}
    plans["d"] = plan("", ["mamba_ssm"], wheel)
    host = Host({"tmp": str(tmp_path), "state": "planned"})
    assert run(host, variables(plans, "c"))["relays"] == {"a": ["b"]}
    assert host.calls == [] and host.steps == []


def test_what_the_store_holds_is_not_sent_again(tmp_path: Path, wheel: dict[str, Any]) -> None:
    plans = {name: plan("a", ["mamba_ssm"], wheel) for name in "abc"}
    files = Path(relay.store_folder(str(tmp_path)), "files")
    files.mkdir(parents=True)
    (files / wheel["sha256"]).write_bytes(Path(wheel["path"]).read_bytes())
    host = Host({"tmp": str(tmp_path)})
    run(host, variables(plans, "a"))
    assert host.put == [] and [call["mode"] for call in host.calls] == ["query", "start"]


def test_torch_and_its_lock(tmp_path: Path) -> None:
    cache = fetch.Cache(tmp_path / "cache")
    (tmp_path / "made").mkdir()
    made = make_wheel(tmp_path / "made", "one")
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    cache.take(made, digest, made.name, move=False)
    (tmp_path / "lock.txt").write_text(f"# {made.name} 100\none==1.0 --hash=sha256:{digest}\n")
    torch = make_wheel(tmp_path / "made", "torch", tag="cp310-cp310-linux_aarch64")
    artefacts = {
        "lock": str(tmp_path / "lock.txt"),
        "target": {"machine": "aarch64", "python": "3.10", "glibc": "2.35"},
        "extra": [{"name": "torch", "version": "1.0", "path": str(torch)}],
        "cache": str(cache.root),
        "trust_on_first_use": False,
    }
    found = stock.needed(plan("a", ["torch_jetpack"], None, artefacts=artefacts))
    assert [parcel.name for parcel in found] == [made.name, torch.name]
    assert found[0].sha256 == digest and Path(found[0].path).read_bytes() == made.read_bytes()
    assert stock.needed(plan("a", ["activation"], None, artefacts=artefacts)) == []


def test_what_was_built_in_this_run(tmp_path: Path, wheel: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def of_plan(_plan: Any, component: str) -> str:
        asked.append(component)
        return component

    monkeypatch.setattr(stock.supply.Wish, "of_plan", of_plan)
    monkeypatch.setattr(stock.supply, "at_hand", lambda _house, _wish: SimpleNamespace(served=wheel))
    house = {"path": str(tmp_path)}
    planned = plan("a", ["mamba_ssm"], None, wheelhouse=house)
    assert [parcel.sha256 for parcel in stock.needed(planned)] == [wheel["sha256"]]
    assert asked == ["mamba_ssm"]
    # no work: nobody asks
    stock.needed(dict(planned, outcomes=[]))
    assert asked == ["mamba_ssm"]


def test_a_relay_that_cannot_serve_is_a_warning(tmp_path: Path, wheel: dict[str, Any], warnings: list[str]) -> None:
    plans = {name: plan("a", ["mamba_ssm"], wheel) for name in "abc"}
    host = Host({"tmp": str(tmp_path)})
    host.fails = True
    result = run(host, variables(plans, "a"))
    assert not result.get("failed") and result["store"] == {}
    assert len(warnings) == 1 and "a is no relay in this run" in warnings[0] and "no such address" in warnings[0]


def test_a_relay_that_takes_no_part_is_said_once(tmp_path: Path, wheel: dict[str, Any], warnings: list[str]) -> None:
    plans = {name: plan("elsewhere", ["mamba_ssm"], wheel) for name in "abc"}
    assert run(Host({"tmp": str(tmp_path), "state": "planned"}), variables(plans, "a"))["relays"] == {}
    assert len(warnings) == 1 and "elsewhere" in warnings[0] and "a, b, c" in warnings[0]


def test_clearing(tmp_path: Path) -> None:
    host = Host({"tmp": str(tmp_path), "state": "absent"})
    assert run(host, variables({}, "a"))["changed"] and host.calls == [{"mode": "stop", "tmp": str(tmp_path)}]
    host.fails = True
    assert run(host, variables({}, "a"))["failed"]


def test_debian_packages_that_were_fetched_for_two_hosts_go_to_the_relay(tmp_path: Path) -> None:
    cache = fetch.Cache(tmp_path / "cache")
    (tmp_path / "x").write_bytes(b"deb")
    digest = hashlib.sha256(b"deb").hexdigest()
    cache.take(tmp_path / "x", digest, "gcc_1_arm64.deb")
    fetched = [{"filename": "gcc_1_arm64.deb", "sha256": digest}, {"filename": "gone_1_arm64.deb", "sha256": "0" * 64}]
    more = {"package_files": fetched, "artefacts": {"cache": str(cache.root)}}
    plans = {
        "a": plan("", ["debian_packages"], None, **more),
        "b": plan("a", ["debian_packages"], None, **more),
        "c": plan("a", [], None, **more),
    }
    result = run(Host({"tmp": str(tmp_path / "tmp")}), variables(plans, "a"))
    assert (result["clients"], result["store"]["files"]) == (["b"], [digest])
    assert stock.needed(plans["c"]) == []
