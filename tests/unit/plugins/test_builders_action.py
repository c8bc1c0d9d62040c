"""The choice of builders for a whole play: real wheelhouse, real small wheels, made-up hosts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.errors import AnsibleError
from ansible_collections.jetson.mamba.plugins.action import builders
from ansible_collections.jetson.mamba.plugins.plugin_utils import wheelhouse
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheelhouse import Wheelhouse

from tests.unit.plugins.supply_kit import CPU, ORIN, damage, plan_of, real_wheel, stock, stock_imported, wish

ONE = {"components": ["mamba_ssm"], "outcomes": ["mamba_ssm"]}


class Choice(builders.ActionModule):
    """The action without a host: it may contact none."""

    def __init__(self, check: bool = False, **arguments: Any) -> None:
        self._task = SimpleNamespace(args=arguments, check_mode=check, async_val=0, action="builders", diff=False)
        self._connection = SimpleNamespace(_shell=SimpleNamespace(tmpdir=None), has_native_async=False)

    def _execute_module(self, *_positional: Any, **_options: Any) -> dict[str, Any]:
        raise AssertionError("a host was contacted")


class Run:
    """A run of a play: what a host answered before stays readable, as Ansible keeps it."""

    def __init__(self, house: Path, **hosts: dict[str, Any]) -> None:
        self.hosts: dict[str, dict[str, Any]] = {
            name: {"jetson_platform_plan": plan_of(house, **{**ONE, **changes})} for name, changes in hosts.items()
        }
        self.groups: dict[str, list[str]] = {"jetsons": [*hosts], "builders": []}
        self.lost: list[str] = []

    def choose(
        self, check: bool = False, reachable: Sequence[str] | None = None, registered: Any = None, **arguments: Any
    ) -> dict[str, Any]:
        here = [host for host in (reachable or self.hosts) if host not in self.lost]
        return Choice(check, **arguments).run(
            None,
            {
                "hostvars": self.hosts,
                "groups": self.groups,
                "ansible_play_hosts": here,
                "ansible_play_hosts_all": [*self.hosts],
                **({"__wheelhouse_choice": registered} if registered else {}),
            },
        )

    def failed(self, host: str, component: str = "mamba_ssm", message: str = "ptxas died", built: bool = True) -> None:
        """Say that a build failed, as the role registers it; the host is out of the play."""
        key = self.hosts[host]["jetson_platform_plan"]["components"][component]["key"]
        self.hosts[host]["__wheelhouse_built"] = {
            "failed": True,
            "results": [
                {"failed": False, "changed": True, "key": "0" * 64, "item": {"component": "causal_conv1d"}},
                {"failed": True, "build_failed": built, "key": key, "msg": message, "item": {"component": component}},
            ],
        }
        self.lost.append(host)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    return tmp_path / "wheelhouse"


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(builders, "display", SimpleNamespace(display=lines.append))
    return lines


def building(answer: dict[str, Any]) -> dict[str, list[str]]:
    """Return {host: components that it builds}."""
    assert not answer.get("failed"), answer
    found = {host: [item["component"] for item in one["builds"]] for host, one in answer["hosts"].items()}
    return {host: names for host, names in found.items() if names}


# --- one build ---


def test_a_fleet_gets_one_builder_and_everybody_waits_for_it(house: Path) -> None:
    both = {"components": ["causal_conv1d", "mamba_ssm"], "outcomes": ["causal_conv1d", "mamba_ssm"]}
    run = Run(house, **{f"orin{number}": both for number in range(10)})
    answer = run.choose()
    assert building(answer) == {"orin0": ["causal_conv1d", "mamba_ssm"]}
    assert answer["again"] is True and answer["changed"] is False and answer["problems"] == {}
    for one in answer["hosts"].values():
        assert one["waits"] == dict.fromkeys(both["components"], "built on orin0")
        assert one["components"] == {name: {"served": None} for name in both["components"]}
    (job, _other) = answer["hosts"]["orin0"]["builds"]
    assert job["hosts"] == [*run.hosts] and job["class_id"] == ORIN and job["reasons"] == []
    assert job["companions"] == {"causal_conv1d": "1.6.0", "mamba_ssm": "2.2.4"}
    assert set(builders._JOB) <= set(job)


def test_ten_hosts_of_two_classes_get_two_builders(house: Path) -> None:
    run = Run(house, **{f"h{number}": {"class_id": (ORIN, CPU)[number % 2]} for number in range(10)})
    assert building(run.choose()) == {"h0": ["mamba_ssm"], "h1": ["mamba_ssm"]}


def test_a_served_fleet_builds_nothing(house: Path, tmp_path: Path) -> None:
    row = stock(Wheelhouse(house), wish("mamba_ssm"), real_wheel(tmp_path, "mamba_ssm"))
    answer = Run(house, a={}, b={}).choose()
    assert building(answer) == {} and answer["again"] is False
    for one in answer["hosts"].values():
        assert one["waits"] == {"mamba_ssm": "built on orin-z"}
        assert one["components"]["mamba_ssm"]["served"]["sha256"] == row["sha256"]


def test_an_eleventh_host_and_another_release_of_l4t_build_nothing(house: Path, tmp_path: Path) -> None:
    stock(Wheelhouse(house), wish("mamba_ssm"), real_wheel(tmp_path, "mamba_ssm"))
    run = Run(house, old={"outcomes": []}, new={})
    run.hosts["new"]["jetson_platform_plan"]["l4t"] = "36.4.4"
    answer = run.choose()
    assert building(answer) == {} and answer["hosts"]["new"]["components"]["mamba_ssm"]["served"]


def test_hosts_outside_the_limit_are_not_chosen(house: Path) -> None:
    run = Run(house, a={}, b={}, c={})
    run.groups["builders"] = ["a"]
    assert building(run.choose(reachable=["b", "c"])) == {"b": ["mamba_ssm"]}


def test_a_dedicated_builder_builds_and_wants_nothing_itself(house: Path) -> None:
    run = Run(house, a={}, b={}, big={})
    run.groups = {"jetsons": ["a", "b"], "builders": ["big"]}
    answer = run.choose(scope="all")
    assert building(answer) == {"big": ["mamba_ssm"]}
    assert answer["hosts"]["big"]["builds"][0]["hosts"] == ["a", "b"]
    assert answer["hosts"]["big"]["waits"] == {} and answer["hosts"]["big"]["components"] == {}
    run.lost = ["a", "b"]
    assert building(run.choose(scope="all")) == {}, "a builder alone has nobody to build for"


def test_a_builder_gets_the_inputs_of_those_who_want_the_wheel(house: Path) -> None:
    run = Run(house, a={"source": "6" * 64}, big={})
    run.groups = {"jetsons": ["a"], "builders": ["big"]}
    (job,) = run.choose()["hosts"]["big"]["builds"]
    assert job["source_sha256"] == "6" * 64
    assert job["key"] == run.hosts["a"]["jetson_platform_plan"]["components"]["mamba_ssm"]["key"]


def test_the_scope_all_wants_what_is_installed_too(house: Path) -> None:
    run = Run(house, a={"outcomes": []})
    assert building(run.choose()) == {} and run.choose()["again"] is False
    assert building(run.choose(scope="all")) == {"a": ["mamba_ssm"]}


# --- when builders fail ---


def test_a_builder_that_was_lost_before_it_began_is_replaced(house: Path) -> None:
    run = Run(house, a={}, b={}, c={})
    assert building(run.choose()) == {"a": ["mamba_ssm"]}
    run.lost = ["a"]
    answer = run.choose()
    assert building(answer) == {"b": ["mamba_ssm"]}
    assert answer["hosts"]["b"]["builds"][0]["hosts"] == ["b", "c"] and "a" not in answer["hosts"]


def test_a_builder_that_was_cut_off_while_it_built_is_replaced(house: Path) -> None:
    run = Run(house, a={}, b={})
    run.hosts["a"]["__wheelhouse_built"] = {"unreachable": True, "results": [{"unreachable": True, "msg": "no route"}]}
    run.lost = ["a"]
    assert building(run.choose()) == {"b": ["mamba_ssm"]}


def test_a_failed_build_is_not_tried_elsewhere_and_all_who_wait_are_told_why(house: Path) -> None:
    run = Run(house, a={}, b={}, c={}, other={"class_id": CPU})
    run.failed("a", message="ptxas died of signal 9\nlog: logs/a/mamba_ssm.log")
    answer = run.choose()
    assert building(answer) == {"other": ["mamba_ssm"]}, "another class has its own build"
    assert sorted(answer["problems"]) == ["b", "c"]
    for text in answer["problems"].values():
        assert "failed on a" in text and "ptxas died of signal 9" in text and "logs/a/mamba_ssm.log" in text
        assert "mamba_ssm 2.2.4" in text and ORIN in text


def test_a_failed_build_of_other_inputs_forbids_nothing(house: Path) -> None:
    run = Run(house, a={}, b={"source": "6" * 64})
    run.failed("a")
    assert building(run.choose()) == {"b": ["mamba_ssm"]}


def test_a_builder_that_could_not_begin_is_replaced(house: Path) -> None:
    """No room, no memory: that is the host's own lack."""
    run = Run(house, a={}, b={})
    run.failed("a", built=False, message="10 MB free")
    assert building(run.choose()) == {"b": ["mamba_ssm"]}


def test_a_wheel_that_is_there_is_taken_although_a_build_failed(house: Path, tmp_path: Path) -> None:
    run = Run(house, a={}, b={})
    run.failed("a")
    stock(Wheelhouse(house), wish("mamba_ssm"), real_wheel(tmp_path, "mamba_ssm"))
    answer = run.choose()
    assert answer["problems"] == {} and answer["hosts"]["b"]["components"]["mamba_ssm"]["served"]


def test_a_host_that_cannot_be_served_builds_nothing(house: Path) -> None:
    both = {"components": ["causal_conv1d", "mamba_ssm"], "outcomes": ["causal_conv1d", "mamba_ssm"]}
    run = Run(house, a=both, b=both)
    run.failed("a", "causal_conv1d")
    answer = run.choose()
    assert building(answer) == {}, "b leaves the run at the next task, so it must not be counted on"
    assert list(answer["problems"]) == ["b"] and "causal_conv1d" in answer["problems"]["b"]


def test_where_nobody_can_build_all_obstacles_are_told_to_all(house: Path) -> None:
    run = Run(house, a={"unfit": ["512 MB of memory"]}, b={"unfit": ["no nvcc"]}, far={"class_id": CPU})
    answer = run.choose()
    assert sorted(answer["problems"]) == ["a", "b"] and building(answer) == {"far": ["mamba_ssm"]}
    for text in answer["problems"].values():
        assert "a: 512 MB of memory" in text and "b: no nvcc" in text and "get it" in text
        assert "wheelhouse_sources" in text and "builders" in text


def test_one_fit_host_is_enough_for_unfit_ones(house: Path) -> None:
    answer = Run(house, a={"unfit": ["512 MB"]}, b={}).choose()
    assert answer["problems"] == {} and building(answer) == {"b": ["mamba_ssm"]}
    assert answer["hosts"]["a"]["waits"] == {"mamba_ssm": "built on b"}


# --- other sources, and what may not be ---


def test_a_wheel_of_a_source_is_taken_instead_of_building(house: Path, tmp_path: Path, said: list[str]) -> None:
    real_wheel(tmp_path / "archive", "mamba_ssm")
    sources = [{"folder": str(tmp_path / "archive")}]
    answer = Run(house, a={"sources": sources}, b={"sources": sources}).choose()
    assert building(answer) == {} and answer["again"] is False
    served = answer["hosts"]["b"]["components"]["mamba_ssm"]["served"]
    assert Path(served["path"]).is_relative_to(house) and served["origin"].startswith("folder ")
    assert len([line for line in said if "taken from folder" in line]) == 1, "asked once for all hosts"


def test_what_sources_lack_is_built_and_the_plan_says_why(house: Path, tmp_path: Path) -> None:
    real_wheel(tmp_path / "trap", "mamba_ssm", machine="x86_64")
    answer = Run(house, a={"sources": [{"folder": str(tmp_path / "trap")}]}).choose()
    (job,) = answer["hosts"]["a"]["builds"]
    assert any("trap" in reason and "x86_64" in reason for reason in job["reasons"])


def test_a_faulty_wheel_is_the_reason_of_a_rebuild(house: Path, tmp_path: Path) -> None:
    store = Wheelhouse(house)
    row = stock(store, wish("mamba_ssm"), real_wheel(tmp_path, "mamba_ssm"))
    damage(store, row)
    answer = Run(house, a={}, b={}).choose()
    (job,) = answer["hosts"]["a"]["builds"]
    assert row["sha256"] in job["reasons"][0] and building(answer) == {"a": ["mamba_ssm"]}
    assert answer["hosts"]["a"]["components"]["mamba_ssm"] == {"served": None}
    assert store.look(ORIN, row["key"]).row == row, "it is set aside by the one who builds"


def test_a_wheel_is_read_whole_once_a_run(
    house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = stock(Wheelhouse(house), wish("mamba_ssm"), real_wheel(tmp_path, "mamba_ssm"))
    hashed: list[str] = []
    real = wheelhouse.sha256_file
    monkeypatch.setattr(wheelhouse, "sha256_file", lambda path: hashed.append(path) or real(path))
    run = Run(house, a={}, b={}, c={"trust_on_first_use": True})
    run.hosts["a"]["__wheelhouse_choice"] = run.choose()
    assert len(hashed) == 1 and len(run.hosts["a"]["__wheelhouse_choice"]["verified"]) == 1
    assert run.choose(registered=run.hosts["a"]["__wheelhouse_choice"])["hosts"]["a"]["builds"] == []
    assert len(hashed) == 1, "once in a run"
    path = Wheelhouse(house).path_of(row)
    before = path.stat()
    os.utime(damage(Wheelhouse(house), row), ns=(before.st_atime_ns, before.st_mtime_ns))
    answer = run.choose()
    assert building(answer) == {"a": ["mamba_ssm"]} and answer["verified"] == [], "the next run finds what rotted"


def test_what_one_host_cannot_take_is_built_for_all_that_want_the_same(house: Path, tmp_path: Path) -> None:
    stock_imported(Wheelhouse(house), wish("mamba_ssm"), real_wheel(tmp_path, "mamba_ssm"))
    assert building(Run(house, a={}, b={}).choose()) == {}
    answer = Run(house, a={}, b={"special": "mamba_ssm_build_flags is set"}).choose()
    (job,) = answer["hosts"]["a"]["builds"]
    assert job["hosts"] == ["a", "b"] and "is not used: mamba_ssm_build_flags is set" in job["reasons"][0]


# --- a host's own part ---


def test_a_host_takes_its_part_without_a_template(house: Path) -> None:
    run = Run(house, a={}, b={"class_id": CPU, "build": False})
    choice = run.choose()
    own = {"inventory_hostname": "a", "mine": choice}
    part = Choice(choice="mine").run(None, own)
    assert part["builds"] == choice["hosts"]["a"]["builds"] and part["waits"] == {"mamba_ssm": "built on a"}
    assert part["again"] is True and part["changed"] is False and "hosts" not in part
    refused = Choice(choice="mine").run(None, {**own, "inventory_hostname": "b"})
    assert refused["failed"] and refused["msg"] == choice["problems"]["b"] and "wheelhouse_build" in refused["msg"]
    late = Choice(choice="mine").run(None, {**own, "inventory_hostname": "late"})
    assert late["builds"] == [] and late["components"] == {} and not late.get("failed")
    for wrong in ({}, {"mine": {"failed": True}}, {"mine": "text"}):
        answer = Choice(choice="mine").run(None, {"inventory_hostname": "a", **wrong})
        assert answer["failed"] and "mine holds no choice" in answer["msg"]


def test_a_builder_of_a_class_that_nobody_has_is_named(house: Path) -> None:
    run = Run(house, a={}, spare={"class_id": CPU}, good={})
    run.groups = {"jetsons": ["a"], "builders": ["spare", "good"]}
    (warning,) = run.choose()["warnings"]
    assert "spare" in warning and CPU in warning and ORIN in warning and "good" not in warning
    assert "warnings" not in run.choose(registered=run.choose()), "once in a run"
    run.groups["jetsons"] = ["a", "spare"]
    assert "warnings" not in run.choose()


def test_changed_inputs_are_the_reason_of_a_rebuild(house: Path, tmp_path: Path) -> None:
    stock(Wheelhouse(house), wish("mamba_ssm"), real_wheel(tmp_path, "mamba_ssm"))
    (job,) = Run(house, a={"source": "6" * 64}).choose()["hosts"]["a"]["builds"]
    assert "its source changed" in job["reasons"][0]


def test_where_nothing_may_be_built_the_problem_says_what_is_wrong_with_what_is_there(
    house: Path, tmp_path: Path
) -> None:
    store = Wheelhouse(house)
    row = stock(store, wish("mamba_ssm"), real_wheel(tmp_path, "mamba_ssm"))
    damage(store, row)
    answer = Run(house, a={"build": False}, b={"build": False}, other={"class_id": CPU, "build": False}).choose()
    assert building(answer) == {} and answer["again"] is False and sorted(answer["problems"]) == ["a", "b", "other"]
    assert row["sha256"] in answer["problems"]["a"] and "wheelhouse_build" in answer["problems"]["a"]
    assert row["sha256"] not in answer["problems"]["other"]


def test_a_wheel_that_is_there_serves_where_nothing_may_be_built(house: Path, tmp_path: Path) -> None:
    stock(Wheelhouse(house), wish("mamba_ssm"), real_wheel(tmp_path, "mamba_ssm"))
    assert Run(house, a={"build": False}).choose()["problems"] == {}


def test_a_damaged_manifest_stops_its_class_alone(house: Path) -> None:
    (house / ORIN).mkdir(parents=True)
    (house / ORIN / "manifest.json").write_text("{")
    answer = Run(house, a={}, b={"class_id": CPU}).choose()
    assert building(answer) == {"b": ["mamba_ssm"]}
    assert list(answer["problems"]) == ["a"] and "manifest.json cannot be read" in answer["problems"]["a"]


# --- check mode ---


def test_check_mode_says_who_would_build_and_does_not_look_again(house: Path) -> None:
    answer = Run(house, a={}, b={}).choose(check=True)
    assert building(answer) == {"a": ["mamba_ssm"]} and answer["again"] is False
    assert not house.exists()


def test_check_mode_promises_the_wheel_of_a_source(house: Path, tmp_path: Path) -> None:
    real_wheel(tmp_path / "archive", "mamba_ssm")
    answer = Run(house, a={"sources": [{"folder": str(tmp_path / "archive")}]}).choose(check=True)
    assert building(answer) == {} and answer["hosts"]["a"]["waits"] == {"mamba_ssm": f"folder {tmp_path / 'archive'}"}
    assert answer["hosts"]["a"]["components"]["mamba_ssm"] == {"served": None}
    assert not house.exists()


# --- the task itself ---


def test_without_a_plan_it_says_which_role_makes_one(house: Path) -> None:
    run = Run(house, a={})
    run.hosts["a"] = {}
    answer = run.choose()
    assert answer["failed"] and "jetson_platform" in answer["msg"] and answer["problem"]["expected"]


def test_hosts_without_a_plan_are_left_out(house: Path) -> None:
    run = Run(house, a={}, b={})
    run.hosts["a"] = {}
    assert building(run.choose()) == {"b": ["mamba_ssm"]}


def test_what_is_registered_stays_small_and_plain(house: Path) -> None:
    """Each host keeps a copy of it; the plans with all their rows are not in it twice."""
    run = Run(house, **{f"h{number}": {} for number in range(50)})
    answer = run.choose()
    assert "unfit" not in repr(answer) and len(repr(answer)) < 20_000


def test_an_option_nobody_knows_is_refused(house: Path) -> None:
    with pytest.raises(AnsibleError):
        Run(house, a={}).choose(scope="everything")
