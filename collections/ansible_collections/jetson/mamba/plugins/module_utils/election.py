"""Choose, among the hosts of a run, who builds what the wheelhouse lacks: one builder per platform class."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

Plan = Mapping[str, Any]
# wheelhouse folder, class, component, build key: two hosts with the same four want the same file
JobId = Tuple[str, str, str, str]


class Job(NamedTuple):
    """A wheel that some host wants and that is nowhere yet.

    Args:
        id: what tells it from others.
        component: the component's part of the plan of the first host that wants it.
        hosts: who wants it, in the order of the run.
    """

    id: JobId
    component: Mapping[str, Any]
    hosts: List[str]


class Choice(NamedTuple):
    """Who builds a job, or why nobody can.

    Args:
        builder: the chosen host, or None.
        obstacles: {host: [problem]} of the hosts of the class that cannot build it.
    """

    builder: Optional[str]
    obstacles: Dict[str, List[Dict[str, str]]]


def job_id(plan: Plan, name: str) -> JobId:
    """Return what tells the wheel of a component that a plan wants from others."""
    return (plan["wheelhouse"]["path"], plan["class_id"], name, plan["components"][name]["key"])


def wanted(plan: Plan, scope: str) -> List[str]:
    """Return the components of a plan whose wheel this run needs.

    Args:
        plan: of one host.
        scope: "work" for those that are to be installed, "all" for every one.
    """
    return [
        name
        for name in plan["components"]
        if scope == "all" or name in plan["outcomes"]
    ]


def find_jobs(plans: Mapping[str, Plan], order: Sequence[str], scope: str) -> Dict[JobId, Job]:
    """Return the wheels that hosts want, whether they are there or not, each once.

    Args:
        plans: {host: plan} of the hosts of this run.
        order: those of them that wheels are installed on, in the order of the run.
        scope: see wanted().
    """
    jobs: Dict[JobId, Job] = {}
    for host in order:
        plan = plans[host]
        for name in wanted(plan, scope):
            identity = job_id(plan, name)
            jobs.setdefault(identity, Job(identity, plan["components"][name], [])).hosts.append(host)
    return jobs


def choose(job: Job, plans: Mapping[str, Plan], order: Sequence[str], builders: Sequence[str]) -> Choice:
    """Return who builds a job: the first fit host of its class, those of the group `builders` before all others.

    Args:
        job: what is to be built.
        plans: {host: plan} of the hosts that can still be reached.
        order: these hosts, in the order of the run.
        builders: the user's group of builders; may name hosts that are not in this run.
    """
    path, class_id, name, _key = job.id
    candidates = [
        host for host in order if plans[host]["class_id"] == class_id and plans[host]["wheelhouse"]["path"] == path
    ]
    candidates.sort(key=lambda host: host not in builders)
    obstacles: Dict[str, List[Dict[str, str]]] = {}
    for host in candidates:
        problems = plans[host]["components"].get(name, {}).get("unfit", [])
        if not problems:
            return Choice(host, obstacles)
        obstacles[host] = list(problems)
    return Choice(None, obstacles)
