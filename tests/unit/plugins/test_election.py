"""Who builds what for whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import election

from tests.unit.plugins.supply_kit import CPU, ORIN, plan_of

HOUSE = Path("/srv/wheelhouse")
ONE = {"components": ["mamba_ssm"], "outcomes": ["mamba_ssm"]}


def plan(class_id: str = ORIN, house: Path = HOUSE, **changes: Any) -> dict[str, Any]:
    return plan_of(house, class_id, **{**ONE, **changes})


def jobs(plans: dict[str, Any], order: list[str] | None = None, scope: str = "work") -> list[election.Job]:
    return list(election.find_jobs(plans, order or list(plans), scope).values())


def builder(plans: dict[str, Any], builders: list[str] | None = None, order: list[str] | None = None) -> str | None:
    (job,) = jobs(plans, order)
    return election.choose(job, plans, order or list(plans), builders or []).builder


def test_a_fleet_of_one_class_has_one_job_for_each_component() -> None:
    both = ["causal_conv1d", "mamba_ssm"]
    found = jobs({f"orin-{number}": plan(components=both, outcomes=both) for number in range(10)})
    assert [job.id[2] for job in found] == both
    assert all(job.hosts == [f"orin-{number}" for number in range(10)] for job in found)


def test_the_first_host_of_the_run_builds() -> None:
    plans = {name: plan() for name in "abc"}
    assert builder(plans) == "a"
    assert builder(plans, order=["c", "a", "b"]) == "c"
    assert builder({name: plans[name] for name in "bc"}) == "b", "a is outside the limit, or gone"


def test_the_users_builders_come_first_in_the_order_of_the_run() -> None:
    plans = {name: plan() for name in "abcd"}
    assert builder(plans, ["d", "c"]) == "c"
    assert builder(plans, ["outside", "d"]) == "d", "a builder outside the run is left out"
    assert builder(plans, ["outside"]) == "a"


def test_a_builder_of_another_class_builds_nothing_for_this_one() -> None:
    plans = {"big": plan(CPU), "a": plan()}
    by_class = {job.id[1]: election.choose(job, plans, ["big", "a"], ["big"]) for job in jobs(plans)}
    assert {class_id: choice.builder for class_id, choice in by_class.items()} == {CPU: "big", ORIN: "a"}
    only = {"big": plan(CPU, outcomes=[]), "a": plan(unfit=["512 MB"])}
    (job,) = jobs(only)
    assert election.choose(job, only, [*only], ["big"]) == election.Choice(
        None, {"a": only["a"]["components"]["mamba_ssm"]["unfit"]}
    )


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("aarch64", "x86_64"),
        ("glibc2.35", "glibc2.39"),
        ("cu12.6", "cu12.8"),
        ("cp310", "cp312"),
        ("torch2.5.0a0+872d972e41.nv24.8", "torch2.5.0"),
        ("cxx11", "cxx98"),
        ("sm87", "sm72"),
    ],
)
def test_classes_that_differ_in_one_part_share_nothing(part: str, other: str) -> None:
    plans = {"a": plan(), "b": plan(ORIN.replace(part, other))}
    assert [job.hosts for job in jobs(plans)] == [["a"], ["b"]]
    for job in jobs(plans):
        assert election.choose(job, plans, ["a", "b"], ["a", "b"]).builder == job.hosts[0]


def test_hosts_of_one_class_that_want_other_inputs_have_a_build_each_and_may_share_a_builder() -> None:
    plans = {"a": plan(), "b": plan(source="6" * 64), "c": plan()}
    found = jobs(plans)
    assert [job.hosts for job in found] == [["a", "c"], ["b"]]
    assert len({job.id[3] for job in found}) == 2
    assert [election.choose(job, plans, [*plans], ["b"]).builder for job in found] == ["b", "b"]
    assert found[1].component["source_sha256"] == "6" * 64, "b builds for a from a's source, not from its own"


def test_two_wheelhouses_are_two_jobs_and_nobody_builds_into_anothers() -> None:
    plans = {"a": plan(unfit=["slow"]), "b": plan(house=Path("/srv/other"))}
    first, second = jobs(plans)
    assert first.id[0] != second.id[0] and first.id[1:] == second.id[1:]
    assert election.choose(first, plans, ["a", "b"], ["b"]).builder is None
    assert election.choose(second, plans, ["a", "b"], []).builder == "b"


def test_an_unfit_host_is_passed_over_and_remembered() -> None:
    plans = {"a": plan(unfit=["512 MB of memory"]), "b": plan(), "c": plan()}
    (job,) = jobs(plans)
    choice = election.choose(job, plans, [*plans], [])
    assert choice.builder == "b"
    assert [problem["found"] for problem in choice.obstacles["a"]] == ["512 MB of memory"]
    assert election.choose(job, plans, [*plans], ["a"]).builder == "b", "an unfit one of the user's builders too"


def test_where_nobody_is_fit_every_obstacle_of_every_host_is_told() -> None:
    plans = {"a": plan(unfit=["memory", "disk"]), "b": plan(unfit=["nvcc"]), "c": plan(CPU)}
    choice = election.choose(jobs(plans)[0], plans, [*plans], [])
    assert choice.builder is None
    assert {host: [item["found"] for item in found] for host, found in choice.obstacles.items()} == {
        "a": ["memory", "disk"],
        "b": ["nvcc"],
    }


def test_fitness_is_that_for_the_component() -> None:
    both = ["causal_conv1d", "mamba_ssm"]
    plans = {"a": plan(components=both, outcomes=both), "b": plan(components=both, outcomes=both)}
    plans["a"]["components"]["mamba_ssm"]["unfit"] = [{"found": "memory"}]
    assert [election.choose(job, plans, [*plans], []).builder for job in jobs(plans)] == ["a", "b"]


def test_a_host_builds_for_others_what_it_does_not_want_itself() -> None:
    plans = {"done": plan(outcomes=[]), "new": plan()}
    (job,) = jobs(plans)
    assert job.hosts == ["new"]
    assert election.choose(job, plans, [*plans], ["done"]).builder == "done"


def test_the_scope_says_whose_wheels_are_wanted() -> None:
    plans = {"done": plan(outcomes=["activation"]), "new": plan(components=["causal_conv1d", "mamba_ssm"])}
    assert [(job.id[2], job.hosts) for job in jobs(plans)] == [("mamba_ssm", ["new"])]
    assert {job.id[2]: job.hosts for job in jobs(plans, scope="all")} == {
        "mamba_ssm": ["done", "new"],
        "causal_conv1d": ["new"],
    }


def test_hosts_that_only_build_want_no_wheel() -> None:
    plans = {"builder": plan(), "a": plan()}
    for scope in ("work", "all"):
        (job,) = jobs(plans, ["a"], scope)
        assert job.hosts == ["a"]
        assert election.choose(job, plans, ["builder", "a"], ["builder"]).builder == "builder"


def test_an_empty_fleet_wants_nothing() -> None:
    assert jobs({}) == [] and jobs({"a": plan(outcomes=[])}) == []
