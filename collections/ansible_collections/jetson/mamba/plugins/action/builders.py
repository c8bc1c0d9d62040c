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
_JOB = ("version", "key", "source", "source_sha256", "build_flags", "max_jobs", "minutes", "disk_mb")
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
        hosts: dict[str, Data] = {host: {"builds": [], "waits": {}, "components": {}} for host in order}
        problems: dict[str, str] = {}
        broken = dict(self._broken(hostvars, task_vars.get("ansible_play_hosts_all", order)))
        again = False
        for job in election.find_jobs(plans, [host for host in order if host in devices], scope).values():
            name = job.id[2]
            try:
                found = self._look(job, plans[job.hosts[0]])
                if found.path is not None or found.promised:
                    source = found.promised or str((found.row or {})["origin"])
                else:
                    builder = self._builder(job, plans, order, list(groups.get("builders", [])), broken, found)
                    hosts[builder]["builds"].append(_build(job, plans, found))
                    source, again = f"built on {builder}", True
            except Problem as problem:
                problems.update({host: problem.render() for host in job.hosts if host not in problems})
                continue
            for host in job.hosts:
                hosts[host]["waits"][name] = source
                hosts[host]["components"][name] = {"served": found.served}
        return {
            "changed": False,
            "hosts": hosts,
            "problems": problems,
            # check mode builds nothing, so looking again would find nothing new
            "again": again and not self._task.check_mode,
        }

    def _look(self, job: election.Job, plan: Mapping[str, Any]) -> supply.Supply:
        options = supply.complete(plan["wheelhouse"])
        return supply.find(
            Wheelhouse(options["path"]),
            supply.Wish.of_plan(plan, job.id[2]),
            options,
            plan["artefacts"]["cache"],
            lambda text: display.display(f"  controller: {text}"),
            dry=bool(self._task.check_mode),
        )

    @staticmethod
    def _builder(
        job: election.Job,
        plans: Mapping[str, Any],
        order: list[str],
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
        if not plan["wheelhouse"]["build"]:
            raise supply.nowhere(supply.Wish.of_plan(plan, name), Wheelhouse(plan["wheelhouse"]["path"]), found)
        choice = election.choose(job, plans, order, builders)
        if choice.builder is None:
            reasons = [
                f"{host}: {item['found']}, expected {item['expected']}; {item['next']}"
                for host, items in choice.obstacles.items()
                for item in items
            ]
            raise Problem(
                f"no host of class {job.id[1]} in this run can build {label}:\n    " + "\n    ".join(reasons),
                "one host of the class that can build; the others need not",
                "cure it on one of them, add a larger device of the class to the group builders, or name a source of "
                "ready wheels: wheelhouse_sources",
            )
        return choice.builder

    @staticmethod
    def _broken(hostvars: Mapping[str, Any], hosts: list[str]) -> Iterator[tuple[str, tuple[str, str]]]:
        """Yield (build key, (host, message)) of the builds that failed in this run, on hosts that are gone too."""
        for host in hosts:
            registered = hostvars[host].get(BUILT) or {}
            for item in registered.get("results", []):
                if item.get("failed") and item.get("build_failed"):
                    yield str(item["key"]), (str(host), str(item.get("msg", "")))


def _build(job: election.Job, plans: Mapping[str, Any], found: supply.Supply) -> Data:
    """Return what the builder is asked for, as plain data."""
    plan = plans[job.hosts[0]]
    wanted = {name: job.component[name] for name in _JOB}
    return dict(
        wanted,
        component=job.id[2],
        class_id=job.id[1],
        companions=dict(plan["versions"]),
        hosts=list(job.hosts),
        reasons=list(found.reasons),
    )
