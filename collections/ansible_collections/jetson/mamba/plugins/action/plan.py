"""Check the settings, survey the device, and decide what forbids the run and what there is to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.jetson.mamba.plugins.module_utils import cuda_env, environment, plan, shim
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.passwords import without_userinfo
from ansible_collections.jetson.mamba.plugins.plugin_utils import components, fetch, wheel_libs, wheel_sources
from ansible_collections.jetson.mamba.plugins.plugin_utils import settings as checks
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheelhouse import PLAYBOOK_VARIABLES, open_store
from ansible_collections.jetson.mamba.plugins.plugin_utils.wishes import COMPONENTS, Wishes, read_platforms

display = Display()
# names with a role's prefix that are no role's option: facts and registers of our own roles
INTERNAL = (
    "jetson_platform_plan",
    "jetson_platform_relay_store",
    "jetson_mamba_serial",
    # of playbooks/wheelhouse.yml
    *PLAYBOOK_VARIABLES,
)


def render(problems: list[dict[str, str]]) -> str:
    """Return all problems as people read them."""
    lines = [f"{len(problems)} problem(s) forbid this run; nothing was changed on this host."]
    for number, item in enumerate(problems, start=1):
        lines += [
            f"{number}. {item['outcome']}",
            f"   found:    {item['found']}",
            f"   expected: {item['expected']}",
            f"   next:     {item['next']}",
        ]
    return "\n".join(lines)


class ActionModule(ActionBase):
    """Controller side of jetson.mamba.plan; the device is asked once, by jetson.mamba.device_state."""

    _requires_connection = True

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return {jetson_mamba_plan}, or fail with every problem found."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        roles = Path(self._task.args["roles"])
        purpose = self._task.args.get("purpose", "provision")
        try:
            settings, problems = self._settings(roles, task_vars)
            rows = settings["jetson_platform_rows"]
            if not problems:
                problems = checks.check_rows(rows, "jetson_platform_rows") + checks.check_values(settings)
                try:
                    wheel_sources.check_sources(settings["wheelhouse_sources"], settings["wheelhouse_sha256"])
                except Problem as refusal:
                    problems.append(dict(refusal.as_dict(), outcome="wheelhouse"))
            if problems:
                return self._refuse(result, problems)
            survey = self._survey(settings, rows, roles, task_vars)
            if survey.get("failed") or survey.get("unreachable"):
                result.update(survey)
                return result
            groups = task_vars.get("groups", {})
            builder_only = "jetsons" in groups and task_vars["inventory_hostname"] not in groups["jetsons"]
            settings["jetson_platform_cache"] = checks.in_project(settings["jetson_platform_cache"], task_vars)
            made, problems = self._plan(settings, survey["state"], rows, roles, purpose, builder_only)
        except Problem as refusal:
            return self._refuse(result, [dict(refusal.as_dict(), outcome="jetson_platform")])
        if made is None or (problems and purpose == "provision"):
            return self._refuse(result, problems)
        made["problems"] = problems
        # it is shown with -v, kept as a fact, and written into the reports
        result.update(changed=False, jetson_mamba_plan=without_userinfo(made), purpose=purpose)
        return result

    @staticmethod
    def _refuse(result: dict[str, Any], problems: list[dict[str, str]]) -> dict[str, Any]:
        result.update(failed=True, msg=render(problems), problems=problems)
        return result

    def _settings(self, roles: Path, task_vars: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, str]]]:
        """Return the effective variables of all roles, and every problem of theirs."""
        specs = checks.read_role_specs(roles)
        problems = checks.find_unknown_variables(task_vars, specs, INTERNAL)
        settings: dict[str, Any] = {}
        for role, options in specs.items():
            values = yaml.safe_load((roles / role / "defaults" / "main.yml").read_text(encoding="utf-8")) or {}
            if role == "source_patches":
                # the one default that is a template, of a role_path that is not ours here
                values["source_patches_root"] = str(roles.parent / "files" / "patches")
            values.update({name: self._templar.template(task_vars[name]) for name in options if name in task_vars})
            checked = ArgumentSpecValidator(options).validate(values)
            for message in checked.error_messages:
                problems.append(
                    checks.problem(
                        f"role {role}: {message}",
                        f"a value as roles/{role}/meta/argument_specs.yml describes it",
                        "correct it where it is set (inventory, group_vars or -e)",
                        role,
                    )
                )
            settings.update(checked.validated_parameters)
        return settings, problems

    def _survey(
        self, settings: dict[str, Any], rows: list[Any], roles: Path, task_vars: dict[str, Any]
    ) -> dict[str, Any]:
        root = settings["jetson_platform_root"]
        pythons = {row["python"] for row in [*rows, *read_platforms()] if "python" in row}
        system_shims = [
            path
            for python in sorted(pythons)
            for path in shim.wanted_files(shim.system_site_packages(f"/usr/lib/python{python}/site-packages"))
        ]
        arguments = {
            "root": root,
            "build_root": settings["jetson_platform_build_root"] or os.path.join(root, "build"),
            "tmp_root": settings["jetson_platform_tmp_root"] or os.path.join(root, "tmp"),
            "scope": settings["jetson_platform_scope"],
            "hash_packages": ["causal-conv1d", "mamba-ssm"],
            "inspect": [
                {"package": name, "modules": components.find(name, settings[f"{name}_version"])["provides_modules"]}
                for name in COMPONENTS
            ],
            "site_files": self._site_files(roles),
            "config_files": [*cuda_env.ALL_PATHS, *system_shims, os.path.join(root, environment.LAUNCHER)],
            "toolkits": [settings["cuda_env_home"]] if settings["cuda_env_home"] else [],
            "libraries": sorted(wheel_libs.PACKAGES),
        }
        answer: dict[str, Any] = self._execute_module(
            module_name="jetson.mamba.device_state", module_args=arguments, task_vars=task_vars
        )
        return answer

    @staticmethod
    def _site_files(roles: Path) -> list[str]:
        """Return every path below a site folder that some series patches or that the shim puts there."""
        names = set(shim.wanted_files(""))
        for series in (roles.parent / "files" / "patches").glob("*/*/series.yml"):
            data = yaml.safe_load(series.read_text(encoding="utf-8")) or {}
            names.update(patch["target"] for patch in data.get("patches", []) if "target" in patch)
        return sorted(names)

    def _plan(
        self,
        settings: dict[str, Any],
        state: dict[str, Any],
        rows: list[Any],
        roles: Path,
        purpose: str,
        builder_only: bool,
    ) -> tuple[dict[str, Any] | None, list[dict[str, str]]]:
        match = plan.match_platform(state, [*rows, *read_platforms()])
        if match.row is None:
            return None, [match.problem] if match.problem else []
        row = match.row
        cache = Path(settings["jetson_platform_cache"] or fetch.DEFAULT_CACHE).expanduser()
        wishes = Wishes(row, state, settings, Path(settings["source_patches_root"]), cache, display.display)
        scope = wishes.scope
        paths = plan.make_paths(row, state, settings, wishes.env_id)
        wanted = wishes.wanted(paths)
        work = plan.find_work(state, paths, scope, wanted)
        if builder_only:
            work = [item for item in work if item["outcome"] in plan.FOR_BUILDING]
        site = plan.surveyed_site(state, paths, scope)
        needs = self._needs(wishes, work, site)
        problems = wishes.problems + wishes.missing_packages()["run"]
        problems += plan.find_problems(row, state, settings, needs, work)
        problems += plan.find_patch_problems(site, wanted) + plan.find_foreign_problems(site, work, row["machine"])
        outcomes = list(dict.fromkeys(item["outcome"] for item in work))
        current = state["environments"]["current"]
        launcher_differs = any(state["files"].get(path) != digest for path, digest in wanted["launcher"].items())
        switched = current == os.path.join("envs", wishes.env_id) and not launcher_differs
        if scope == "venv" and not switched and not builder_only:
            outcomes.append("activation")
        if purpose == "verify" and scope == "venv" and site is None:
            paths = plan.active_paths(paths, state["environments"])
        made = {
            "schema": plan.SCHEMA,
            "platform": row,
            "class_id": wishes.class_id,
            "scope": scope,
            "user": state["user"],
            "paths": paths,
            # with CUDA's, which conditions of patch series may name
            "versions": {
                **wishes.companions(),
                **{name: data["version"] for name, data in wishes.components.items()},
            },
            "components": self._components(wishes, needs),
            "packages": wishes.packages()["run"],
            "build_packages": wishes.packages()["build"],
            "wheels": wanted["wheels"],
            "constraints": wishes.constraints(),
            "artefacts": {
                "lock": str(wishes.lock),
                "target": wishes.target._asdict(),
                "extra": wishes.extra,
                "cache": str(wishes.cache),
                "patch_root": settings["source_patches_root"],
                "install_libraries": wishes.installs_packages,
                "trust_on_first_use": settings["torch_jetpack_trust_on_first_use"],
            },
            "wheelhouse": {
                "path": str(open_store(settings["wheelhouse_path"], roles.parent).root),
                "sources": settings["wheelhouse_sources"],
                "sha256": settings["wheelhouse_sha256"],
                "trust_on_first_use": settings["wheelhouse_trust_on_first_use"],
                "build": settings["wheelhouse_build"],
                "patience_minutes": settings["wheelhouse_patience_minutes"],
            },
            "transfer": {
                "rate_limit_kbit": settings["jetson_platform_rate_limit_kbit"],
                "relay": settings["jetson_platform_relay"],
                "downloads": settings["jetson_platform_downloads"],
            },
            "cuda_login": settings["cuda_env_login"]
            and settings["cuda_env_state"] == "present"
            and row["cuda"] != "none",
            "l4t": state["l4t"]["release"],
            "builder_only": builder_only,
            "work": work,
            "outcomes": outcomes,
            "problems": [],
        }
        return made, problems

    @staticmethod
    def _components(wishes: Wishes, needs: dict[str, Any]) -> dict[str, Any]:
        """Return what is known of each component: what it is made from, and what keeps this host from building it."""
        found = {}
        # a builder needs the environment to build in, whether this host's own wish has work for it or not
        room = needs["disk_mb"]
        for name, data in wishes.components.items():
            unfit = wishes.missing_packages()["build"] + plan.builder_problems(
                wishes.row,
                wishes.state,
                dict(wishes.settings),
                {"disk_mb": dict(room, build=data["disk_mb"]), "memory_mb": data["memory_mb"]},
                name,
            )
            found[name] = dict(data, unfit=unfit, served=None)
        return found

    @staticmethod
    def _needs(wishes: Wishes, work: list[dict[str, Any]], site: dict[str, Any] | None) -> dict[str, Any]:
        outcomes = {item["outcome"] for item in work}
        packed = wishes.packed_mb() if "torch_jetpack" in outcomes else 0
        # an environment that has its torch lacks little
        mended = bool(site and "torch" in site["packages"])
        installed = 0 if "torch_jetpack" not in outcomes else 1000 if mended else wishes.installed_mb()
        return {
            "disk_mb": {
                "root": 200 + (0 if wishes.scope == "user" else installed),
                "user": installed if wishes.scope == "user" else 0,
                "tmp": (100 if mended else packed) + 100,
            },
        }
