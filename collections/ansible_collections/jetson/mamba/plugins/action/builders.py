"""Action of jetson.mamba.builders: look for wheels, choose builders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.jetson.mamba.plugins.module_utils import election
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.plugin_utils import supply
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheelhouse import Wheelhouse

display = Display()
FACT = "jetson_platform_plan"
# registered by the role wheelhouse; a failed host's stays readable
BUILT = "__wheelhouse_built"
# the group whose hosts are provisioned; others in the play only build
DEVICES = "jetsons"
_JOB = ("version", "key", "source", "source_sha256", "build_flags", "minutes", "disk_mb")
Data = dict[str, Any]


class ActionModule(ActionBase):
    """Runs on the controller alone, once for all hosts of the play."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return {hosts: {host: {builds, waits, components}}, problems: {host: text}, again}."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        spec = {"scope": {"type": "str", "choices": ["work", "all"], "default": "work"}}
        _validated, options = self.validate_argument_spec(argument_spec=spec)
        try:
            result.update(self._choose(options["scope"], task_vars or {}))
        except Problem as problem:
            result.update(failed=True, msg=problem.render(), problem=problem.as_dict())
        return result

    def _choose(self, scope: str, task_vars: dict[str, Any]) -> Data:
        hostvars, groups = task_vars["hostvars"], task_vars.get("groups", {})
        order = [str(host) for host in task_vars["ansible_play_hosts"] if FACT in hostvars[host]]
        if not order:
            raise Problem("no host has a plan", f"the fact {FACT}", "run the role jetson_platform before this one")
        plans = {host: hostvars[host][FACT] for host in order}
        devices = groups.get(DEVICES, order)
        jobs = election.find_jobs(plans, [host for host in order if host in devices], scope)
        broken = dict(self._broken(hostvars, task_vars.get("ansible_play_hosts_all", order)))
        builders = [str(host) for host in groups.get("builders", [])]
        found: dict[election.JobId, supply.Supply | Problem] = {}
        for job in jobs.values():
            try:
                found[job.id] = self._look(job, plans)
            except Problem as problem:
                found[job.id] = problem
        # a host that cannot be served leaves the run, so it builds nothing for others either
        problems: dict[str, str] = {}
        while True:
            able = {host: plan for host, plan in plans.items() if host not in problems}
            hosts, refused, again = _assign(jobs, found, plans, able, builders, broken)
            if not set(refused) - set(problems):
                break
            problems.update(refused)
        return {
            "changed": False,
            "hosts": hosts,
            "problems": problems,
            # check mode builds nothing, so looking again would find nothing new
            "again": again and not self._task.check_mode,
        }

    def _look(self, job: election.Job, plans: Mapping[str, Any]) -> supply.Supply:
        """Ask the wheelhouse, and the other sources of every host that wants the wheel."""
        asked: list[Data] = []
        found = supply.Supply()
        for host in job.hosts:
            plan = plans[host]
            options = supply.complete(plan["wheelhouse"])
            if options in asked:
                continue
            asked.append(options)
            found = supply.find(
                Wheelhouse(options["path"]),
                supply.Wish.of_plan(plan, job.id[2]),
                options,
                plan["artefacts"]["cache"],
                lambda text: display.display(f"  controller: {text}"),
                dry=bool(self._task.check_mode),
            )
            if found.path is not None or found.promised:
                break
        return found

    @staticmethod
    def _broken(hostvars: Mapping[str, Any], hosts: list[str]) -> Iterator[tuple[str, tuple[str, str]]]:
        """Yield (build key, (host, message)) of the builds that failed in this run, also on hosts that are gone.

        Asked only for what is lacking, so a build that succeeded and left nothing counts too: it would again.
        """
        for host in hosts:
            registered = hostvars[host].get(BUILT) or {}
            for item in registered.get("results", []):
                if item.get("failed") and item.get("build_failed"):
                    yield str(item["key"]), (str(host), str(item.get("msg", "")))
                elif item.get("wheel"):
                    message = "it succeeded, but its wheel is not in the wheelhouse; does somebody else change that?"
                    yield str(item["key"]), (str(host), message)


def _assign(
    jobs: Mapping[election.JobId, election.Job],
    found: Mapping[election.JobId, supply.Supply | Problem],
    plans: Mapping[str, Any],
    able: Mapping[str, Any],
    builders: list[str],
    broken: Mapping[str, tuple[str, str]],
) -> tuple[dict[str, Data], dict[str, str], bool]:
    """Return what each host builds and waits for, why hosts cannot be served, and whether anything is to be built."""
    hosts: dict[str, Data] = {host: {"builds": [], "waits": {}, "components": {}} for host in plans}
    problems: dict[str, str] = {}
    again = False
    for job in jobs.values():
        name, known = job.id[2], found[job.id]
        try:
            if isinstance(known, Problem):
                raise known
            served = known.served
            if served is not None or known.promised:
                source = known.promised or str((known.row or {})["origin"])
            else:
                builder = _builder(job, plans, able, builders, broken, known)
                hosts[builder]["builds"].append(_build(job, plans, builder, known))
                source, again = f"built on {builder}", True
        except Problem as problem:
            problems.update({host: problem.render() for host in job.hosts if host not in problems})
            continue
        for host in job.hosts:
            hosts[host]["waits"][name] = source
            hosts[host]["components"][name] = {"served": served}
    return hosts, problems, again


def _builder(
    job: election.Job,
    plans: Mapping[str, Any],
    able: Mapping[str, Any],
    builders: list[str],
    broken: Mapping[str, tuple[str, str]],
    found: supply.Supply,
) -> str:
    """Return who builds a job.

    Raises:
        Problem: nobody does.
    """
    name, plan = job.id[2], plans[job.hosts[0]]
    label = f"{name} {job.component['version']}"
    if job.id[3] in broken:
        host, message = broken[job.id[3]]
        raise Problem(
            f"the build of {label} failed on {host}, and this host is of the same class ({job.id[1]})\n{message}",
            f"a wheel of {label}",
            "cure what the build's log names, then run again; nothing was changed on this host",
        )
    if not any(plans[host]["wheelhouse"]["build"] for host in job.hosts):
        raise supply.nowhere(supply.Wish.of_plan(plan, name), Wheelhouse(plan["wheelhouse"]["path"]), found)
    choice = election.choose(job, able, list(able), builders)
    if choice.builder is None:
        reasons = [
            f"{host}: {item['found']}, expected {item['expected']}; {item['next']}"
            for host, items in choice.obstacles.items()
            for item in items
        ]
        raise Problem(
            f"no host of class {job.id[1]} in this run can build {label}:\n    "
            + "\n    ".join(reasons),
            "one host of the class that can build; the others need not",
            "cure it on one of them, add a larger device of the class to the group builders, or name a source of "
            "ready wheels: wheelhouse_sources",
        )
    return choice.builder


def _build(job: election.Job, plans: Mapping[str, Any], builder: str, found: supply.Supply) -> Data:
    """Return what the builder is asked for, as plain data."""
    plan = plans[job.hosts[0]]
    wanted = {name: job.component[name] for name in _JOB}
    return dict(
        wanted,
        component=job.id[2],
        class_id=job.id[1],
        companions=dict(plan["versions"]),
        # how many compilers fit is a matter of the machine that they run on
        max_jobs=plans[builder]["components"].get(job.id[2], {}).get("max_jobs", 0),
        hosts=list(job.hosts),
        reasons=list(found.reasons),
    )
