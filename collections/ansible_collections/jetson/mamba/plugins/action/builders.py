"""Action of jetson.mamba.builders: look for wheels, choose builders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.jetson.mamba.plugins.module_utils import election
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.plugin_utils import fetch, supply
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheelhouse import Wheelhouse

display = Display()
FACT = "jetson_platform_plan"
# registered by the role wheelhouse; a failed host's stays readable
BUILT = "__wheelhouse_built"
CHOICE = "__wheelhouse_choice"
# the group whose hosts are provisioned; others in the play only build
DEVICES = "jetsons"
_JOB = ("version", "key", "source", "source_sha256", "build_flags", "minutes", "disk_mb")
Data = dict[str, Any]


class ActionModule(ActionBase):
    """Runs on the controller alone: once for all hosts of the play, then for each host, for its part of the answer."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return {hosts: {host: {builds, waits, components}}, problems: {host: text}, again, verified}.

        With the option `choice`: {builds, waits, components, again} of this host.
        """
        result: dict[str, Any] = super().run(tmp, task_vars)
        spec = {
            "scope": {"type": "str", "choices": ["work", "all"], "default": "work"},
            "choice": {"type": "str", "default": ""},
        }
        _validated, options = self.validate_argument_spec(argument_spec=spec)
        try:
            if options["choice"]:
                return {**result, **_own_part(options["choice"], task_vars or {})}
            result.update(self._choose(options["scope"], task_vars or {}))
        except Problem as problem:
            result.update(failed=True, msg=problem.render(), problem=problem.as_dict())
        return result

    def _choose(self, scope: str, task_vars: dict[str, Any]) -> Data:
        hostvars, groups = task_vars["hostvars"], task_vars.get("groups", {})
        here = [str(host) for host in task_vars["ansible_play_hosts"]]
        # all variables of a host are put together anew each time that it is asked for
        known = {}
        for host in task_vars.get("ansible_play_hosts_all", here):
            own = hostvars[host]
            known[str(host)] = {name: own[name] for name in (FACT, BUILT) if name in own}
            # the plan names indexes without passwords
            fetch.use_logins_of(own, lambda value: value)
        plans = {host: known[host][FACT] for host in here if FACT in known[host]}
        if not plans:
            raise Problem("no host has a plan", f"the fact {FACT}", "run the role jetson_platform before this one")
        members = set(groups.get(DEVICES, plans))
        devices = [host for host in plans if host in members]
        jobs = election.find_jobs(plans, devices, scope)
        broken = dict(self._broken(known))
        builders = [str(host) for host in groups.get("builders", [])]
        before = task_vars.get(CHOICE) or {}
        verified = set(before.get("verified") or [])
        found: dict[election.JobId, supply.Supply | Problem] = {}
        for job in jobs.values():
            try:
                found[job.id] = self._look(job, plans, str(job.id) not in verified)
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
        warnings = [] if before else _idle(builders, plans, devices)
        return {
            **({"warnings": warnings} if warnings else {}),
            "changed": False,
            "hosts": hosts,
            "problems": problems,
            # of this run: these were read whole
            "verified": sorted(str(job.id) for job in jobs.values() if _is_there(found[job.id])),
            # check mode builds nothing, so looking again would find nothing new
            "again": again and not self._task.check_mode,
        }

    def _look(self, job: election.Job, plans: Mapping[str, Any], rehash: bool) -> supply.Supply:
        """Ask the wheelhouse, and the other sources of every host that wants the wheel."""
        asked: list[Data] = []
        found = supply.Supply()
        # one wheel serves all of them, so what one host cannot take is not for the others either
        special = next((text for host in job.hosts if (text := plans[host]["components"][job.id[2]]["special"])), None)
        for host in job.hosts:
            plan = plans[host]
            options = supply.complete(plan["wheelhouse"])
            if options in asked:
                continue
            asked.append(options)
            found = supply.find(
                Wheelhouse(options["path"]),
                replace(supply.Wish.of_plan(plan, job.id[2]), special=special),
                options,
                plan["artefacts"]["cache"],
                lambda text: display.display(f"  controller: {text}"),
                dry=bool(self._task.check_mode),
                rehash=rehash,
            )
            rehash = rehash and found.path is None
            if found.path is not None or found.promised:
                break
        return found

    @staticmethod
    def _broken(known: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, tuple[str, str]]]:
        """Yield (build key, (host, message)) of the builds that failed in this run, also on hosts that are gone.

        Asked only for what is lacking, so a build that succeeded and left nothing counts too: it would again.
        """
        for host, own in known.items():
            registered = own.get(BUILT) or {}
            for item in registered.get("results", []):
                if item.get("failed") and item.get("build_failed"):
                    yield str(item["key"]), (str(host), str(item.get("msg", "")))
                elif item.get("wheel"):
                    message = "it succeeded, but its wheel is not in the wheelhouse; does somebody else change that?"
                    yield str(item["key"]), (str(host), message)


def _own_part(name: str, task_vars: Mapping[str, Any]) -> Data:
    """Return what was chosen for this host.

    Args:
        name: of the variable that the choice is registered in. Read here as it lies: a template would copy the whole of
            it, which is as large as the fleet, for each host of the fleet.
        task_vars: of the host.

    Raises:
        Problem: nothing was chosen.
    """
    choice, host = task_vars.get(name), str(task_vars["inventory_hostname"])
    if not isinstance(choice, Mapping) or "hosts" not in choice:
        raise Problem(
            f"{name} holds no choice of builders",
            "the name of the variable that this action was registered in, with run_once",
            "correct the option choice of the task",
        )
    if host in choice["problems"]:
        return {"failed": True, "msg": choice["problems"][host]}
    own = choice["hosts"].get(host) or _nothing()
    return {"changed": False, "again": bool(choice["again"]), **own}


def _nothing() -> Data:
    return {"builds": [], "waits": {}, "components": {}}


def _is_there(found: supply.Supply | Problem) -> bool:
    return isinstance(found, supply.Supply) and found.path is not None


def _idle(builders: Iterable[str], plans: Mapping[str, Any], devices: Iterable[str]) -> list[str]:
    """Return a warning for each host of the group builders that no device of this run could take a wheel from."""
    wanted = sorted({plans[host]["class_id"] for host in devices})
    return [
        f"{host} of the group builders builds nothing: it is of class {plans[host]['class_id']}, and the devices of "
        f"this run want {', '.join(wanted) or 'nothing'}"
        for host in builders
        if host in plans and plans[host]["class_id"] not in wanted
    ]


def _assign(
    jobs: Mapping[election.JobId, election.Job],
    found: Mapping[election.JobId, supply.Supply | Problem],
    plans: Mapping[str, Any],
    able: Mapping[str, Any],
    builders: list[str],
    broken: Mapping[str, tuple[str, str]],
) -> tuple[dict[str, Data], dict[str, str], bool]:
    """Return what each host builds and waits for, why hosts cannot be served, and whether anything is to be built."""
    hosts: dict[str, Data] = {host: _nothing() for host in plans}
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
