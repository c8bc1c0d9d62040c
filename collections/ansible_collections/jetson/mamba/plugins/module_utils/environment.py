"""Environments on a device: make, mend and activate a venv, or prepare the user site; keep pip from undoing it."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
from typing import Any, Mapping, NamedTuple, Sequence

from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.files import FileSpec, ensure_files, read_text, sync_folder
from ansible_collections.jetson.mamba.plugins.module_utils.versions import (
    canonical_name,
    matching_torchvision,
    pip_spelling,
)

CONSTRAINTS = "constraints.txt"
PIP_CONF = "pip.conf"
LAUNCHER = os.path.join("bin", "mamba-python")
CURRENT = "current"
SYSTEM_FOLDER = "system-packages"
SYSTEM_PTH = "jetson-mamba-system-packages.pth"
# what nothing installed later may replace: compiled extensions are tied to it
PINNED = ("torch", "torchvision", "numpy", "triton")
# whose next major version mamba_ssm cannot import
BOUNDED = ("transformers",)
_ERROR_TAIL = 600
_CONSTRAINT_KEY = re.compile(r"constraint\s*[=:]\s*(?P<value>.*)$")

# Run by the interpreter itself, which alone knows its folders. Printed last, after whatever a sitecustomize prints.
_FACTS_CODE = """
import json, os, site, sys, sysconfig
print(json.dumps({
    "version": "%d.%d" % sys.version_info[:2], "prefix": sys.prefix, "base_prefix": sys.base_prefix,
    "site_packages": sysconfig.get_path("purelib"), "user_base": site.getuserbase(),
    "user_site": site.getusersitepackages(), "user_site_enabled": bool(site.ENABLE_USER_SITE),
    "externally_managed": os.path.exists(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")),
}))
"""
_SYSTEM_CODE = """
import importlib.machinery, importlib.metadata, json, os, sys
wanted, found = json.loads(sys.argv[1]), {}
path = [entry for entry in sys.path if entry]
def canonical(name):
    return name.lower().replace("_", "-").replace(".", "-")
def module(name):
    spec = importlib.machinery.PathFinder.find_spec(name, path)
    if spec is None:
        return {}
    where = list(spec.submodule_search_locations or []) or [spec.origin]
    return {os.path.basename(where[0]): where[0]}
for name in wanted:
    links = module(name)
    for dist in importlib.metadata.distributions(path=path):
        tops = (dist.read_text("top_level.txt") or "").split()
        if not tops:
            tops = sorted({str(f).split("/")[0] for f in dist.files or () if f.suffix == ".py" and ".." not in str(f)})
            tops = [top[:-3] if top.endswith(".py") else top for top in tops]
        if canonical(dist.metadata["Name"] or "") == canonical(name):
            for top in tops:
                links.update(module(top))
        elif name not in tops:
            continue
        info = str(getattr(dist, "_path", ""))
        if os.path.exists(info):
            links[os.path.basename(info)] = info
    found[name] = links
print(json.dumps(found))
"""


class Wish(NamedTuple):
    """The environment that is wanted.

    Args:
        scope: "venv" or "user".
        base_python: the interpreter that the environment is made from; in scope user the one that is used.
        root: the project's folder on the device; it must exist.
        env: the venv's final folder; "" in scope user.
        state: folder for records, made where absent; in scope user it holds the constraints.
        constraints: lines that pip shall obey in every later installation; None leaves those that are there.
        system_packages: import or distribution names of the system's Python that shall be visible in the venv; None
            leaves them as they are.
        activate: whether the launcher shall start this environment; in scope user it always does.
    """

    scope: str
    base_python: str
    root: str
    env: str = ""
    state: str = ""
    constraints: Sequence[str] | None = None
    system_packages: Sequence[str] | None = None
    activate: bool = False


class Outcome:
    """What was done, or would be: changed, diff (Ansible's entries) and actions (in words)."""

    def __init__(self) -> None:
        self.diff: list[dict[str, str]] = []
        self.actions: list[str] = []

    @property
    def changed(self) -> bool:
        """Whether anything differs from what is wanted."""
        return bool(self.actions)

    def add(self, action: str, header: str, before: str, after: str) -> None:
        """Note one change."""
        self.actions.append(action)
        self.diff.append({"before": before, "after": after, "before_header": header, "after_header": header})

    def files(self, wanted: Mapping[str, FileSpec | None], check: bool) -> None:
        """Bring files to what is wanted and note which differed."""
        _changed, diffs = ensure_files(wanted, check)
        self.diff += diffs
        self.actions += ["write {}".format(diff["after_header"]) for diff in diffs]


def constraint_lines(
    wheels: Sequence[Mapping[str, Any]], torchvision_version: str | None, extra: Sequence[str] = ()
) -> list[str]:
    """Return the lines of a constraints file that keeps what was installed.

    Args:
        wheels: {name, version} of everything installed; those of PINNED are pinned.
        torchvision_version: what belongs to this torch. Where no torchvision is installed, any other is forbidden;
            None: taken from torch's version.
        extra: further lines, the user's own.
    """
    versions = {canonical_name(str(wheel["name"])): str(wheel["version"]) for wheel in wheels}
    lines = [f"{name}=={pip_spelling(versions[name])}" for name in PINNED if name in versions]
    if "torchvision" not in versions and "torch" in versions:
        belongs = torchvision_version or matching_torchvision(versions["torch"])
        if belongs:
            lines.append("torchvision==" + belongs)
    for name in BOUNDED:
        major = re.match(r"\d+", versions.get(name, ""))
        if major:
            lines.append(f"{name}<{int(major.group()) + 1}")
    return lines + [line for line in extra if line not in lines]


def constraints_text(lines: Sequence[str]) -> str:
    """Return the content of a constraints file."""
    head = "# Managed by Ansible (torch_jetpack): whatever is installed later keeps to these, or pip refuses it.\n"
    return head + "".join(line + "\n" for line in lines)


def pip_conf_text(constraints_path: str) -> str:
    """Return the content of a venv's pip.conf."""
    return (
        "# Managed by Ansible (torch_jetpack).\n"
        f"[global]\nconstraint = {constraints_path}\ndisable-pip-version-check = true\n"
    )


def config_files(env: str, constraints: Sequence[str]) -> dict[str, str]:
    """Return {name: content} of the configuration files of a venv (names are relative to it)."""
    return {
        CONSTRAINTS: constraints_text(constraints),
        PIP_CONF: pip_conf_text(os.path.join(env, CONSTRAINTS)),
    }


def launcher_text(root: str, user_python: str = "") -> str:
    """Return the launcher: it resolves `current` once and executes the real path.

    An interpreter that was started through the link would import from another environment once the link is switched.
    user_python: in scope user, the interpreter to execute instead.
    """
    head = "#!/bin/sh\n# Managed by Ansible (torch_jetpack). "
    if user_python:
        return head + f'Starts the Python whose user site is managed.\nexec {shlex.quote(user_python)} "$@"\n'
    return (
        head
        + "Starts the active environment's Python by its real path, so that a\n"
        + "# process keeps its environment when another one is activated.\n"
        + f"current={shlex.quote(os.path.join(root, CURRENT))}\n"
        + 'env=$(readlink -f -- "$current") && [ -x "$env/bin/python" ] || {\n'
        + '    echo "found:    no environment behind $current" >&2\n'
        + '    echo "expected: a link to an environment that was verified" >&2\n'
        + '    echo "next:     run ansible-playbook site.yml for this host" >&2\n'
        + "    exit 127\n"
        + "}\n"
        + 'exec "$env/bin/python" "$@"\n'
    )


def merge_constraint(text: str, path: str, inherited: str = "") -> str:
    """Return pip's configuration with one more constraints file in [global], everything else as it was.

    Args:
        text: the file's content.
        path: the constraints file to add.
        inherited: the value that another configuration file gives, which ours would otherwise hide.
    """
    lines = text.splitlines()
    section, place = "", -1
    for number, line in enumerate(lines):
        if line.startswith("["):
            section = line.strip()
            place = number if section == "[global]" else place
        match = _CONSTRAINT_KEY.match(line) if section == "[global]" else None
        if match:
            end = number + 1
            values = match.group("value").split()
            while end < len(lines) and lines[end][:1].isspace() and lines[end].strip():
                values += lines[end].split()
                end += 1
            if path in values:
                return text
            return "\n".join([*lines[:number], "constraint = " + " ".join([*values, path]), *lines[end:]]) + "\n"
    entry = "constraint = " + " ".join([*inherited.split(), path])
    lines = [*lines[: place + 1], entry, *lines[place + 1 :]] if place >= 0 else [*lines, "[global]", entry]
    return "\n".join(lines) + "\n"


def user_pip_conf() -> tuple[str, str]:
    """Return the user's pip.conf and the constraints that the legacy ~/.pip/pip.conf gives ("" for none)."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    parser = configparser.RawConfigParser()
    legacy = read_text(os.path.join(os.path.expanduser("~"), ".pip", PIP_CONF))
    try:
        parser.read_string(legacy or "")
        inherited = parser.get("global", "constraint", fallback="")
    except configparser.Error:
        inherited = ""
    return os.path.join(base, "pip", PIP_CONF), inherited


# ---------------------------------------------------------------- asking interpreters


def clean_environ() -> dict[str, str]:
    """Return the process environment for commands whose output is read: C locale, no settings of Python or pip."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "LC_"))}
    if "PYTHONUSERBASE" in os.environ:
        kept["PYTHONUSERBASE"] = os.environ["PYTHONUSERBASE"]
    return dict(kept, LANG="C.UTF-8", LC_ALL="C.UTF-8", PYTHONDONTWRITEBYTECODE="1")


def ask(python: str, code: str, *arguments: str) -> Any:
    """Return the JSON that a program prints last, or None where the interpreter does not run.

    Args:
        python: the interpreter.
        code: the program.
        arguments: its sys.argv[1:].
    """
    try:
        done = subprocess.run(
            [python, "-c", code, *arguments],
            capture_output=True,
            cwd="/",
            env=clean_environ(),
            timeout=120,
        )
        return json.loads(done.stdout.decode("utf-8", "replace").strip().splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None


def interpreter_facts(python: str) -> dict[str, Any] | None:
    """Return version, folders and restrictions of an interpreter, or None where it does not run."""
    facts = ask(python, _FACTS_CODE)
    return facts if isinstance(facts, dict) else None


def venv_damage(env: str, version: str) -> str | None:
    """Return why a folder is no working venv of this Python version, or None. A killed creation is found here."""
    if not os.path.isdir(env):
        return "absent"
    if not os.path.isfile(os.path.join(env, "pyvenv.cfg")):
        return "half made: no pyvenv.cfg"
    facts = interpreter_facts(os.path.join(env, "bin", "python"))
    if facts is None:
        return "its interpreter does not run"
    if os.path.realpath(facts["prefix"]) != os.path.realpath(env):
        return "its interpreter takes {} for its home".format(facts["prefix"])
    if facts["version"] != version:
        return "its Python is {}, not {}".format(facts["version"], version)
    return None


# ---------------------------------------------------------------- the outcome


def ensure(wish: Wish, check: bool) -> dict[str, Any]:
    """Bring the environment to what is wanted.

    Args:
        wish: what is wanted.
        check: True to change nothing and to say what would change.

    Returns:
        changed, diff, actions, env, python, site_packages, constraints_file, launcher, active (what `current` names,
        or None) and previous (what it named before).

    Raises:
        Problem: anything that keeps the environment from being made.
    """
    facts = _base_facts(wish)
    outcome = Outcome()
    if not os.path.isdir(wish.root) and not check:
        raise Problem(
            f"no folder {wish.root}",
            "the project's folder, owned by the connecting user",
            "make it through the role torch_jetpack, or by hand: "
            f'sudo install -d -o "$USER" {shlex.quote(wish.root)}',
        )
    if any(character.isspace() for character in wish.root + wish.env + wish.state):
        raise Problem(
            f"white space in {wish.root}, {wish.env} or {wish.state}",
            "folders without: pip separates constraints files by white space",
            "set jetson_platform_root to another folder",
        )
    try:
        result = _ensure_user(wish, facts, outcome, check) if wish.scope == "user" else _ensure_venv(
            wish, facts, outcome, check
        )
        previous = _activate(wish, outcome, check)
    except OSError as error:
        raise Problem(
            f"{error.filename or wish.root}: {error.strerror}",
            "folders that the connecting user may write, with room on the device",
            f"look at: ls -ld {error.filename or wish.root}; df -h {wish.root}",
        ) from error
    return dict(
        result,
        changed=outcome.changed,
        diff=outcome.diff,
        actions=outcome.actions,
        launcher=os.path.join(wish.root, LAUNCHER),
        active=os.path.relpath(wish.env, wish.root) if wish.activate and wish.env else previous,
        previous=previous,
    )


def _base_facts(wish: Wish) -> dict[str, Any]:
    facts = interpreter_facts(wish.base_python)
    if facts is None:
        raise Problem(
            f"{wish.base_python} does not run",
            "the Python that the environment is made from",
            "install it (apt-get install python3), or correct base_python",
        )
    if wish.scope != "user":
        return facts
    if facts["externally_managed"]:
        raise Problem(
            f"an EXTERNALLY-MANAGED marker in {wish.base_python}",
            "a Python whose user site pip may write to (jetson_platform_scope is user)",
            "use the default jetson_platform_scope: venv",
        )
    if not facts["user_site_enabled"]:
        raise Problem(
            f"{wish.base_python} does not look into its user site",
            "a Python that imports from {} (jetson_platform_scope is user)".format(facts["user_site"]),
            "connect as an ordinary user and unset PYTHONNOUSERSITE, or use jetson_platform_scope: venv",
        )
    return facts


def _make_folder(path: str, outcome: Outcome, check: bool) -> None:
    if path and not os.path.isdir(path):
        outcome.add(f"make {path}", path, "absent\n", "folder\n")
        if not check:
            os.makedirs(path, mode=0o755, exist_ok=True)


def _ensure_venv(wish: Wish, facts: Mapping[str, Any], outcome: Outcome, check: bool) -> dict[str, str]:
    damage = venv_damage(wish.env, facts["version"])
    site = os.path.join(wish.env, "lib", "python{}".format(facts["version"]), "site-packages")
    if damage:
        outcome.add(
            f"create {wish.env} ({damage})",
            wish.env,
            damage + "\n",
            "venv of {} ({})\n".format(wish.base_python, facts["version"]),
        )
        if not check:
            _create_venv(wish.base_python, wish.env, facts["version"])
    _make_folder(wish.state, outcome, check)
    if wish.constraints is not None:
        files = config_files(wish.env, wish.constraints)
        outcome.files({os.path.join(wish.env, name): FileSpec(text) for name, text in files.items()}, check)
    _ensure_system_packages(wish, site, outcome, check)
    return {
        "env": wish.env,
        "python": os.path.join(wish.env, "bin", "python"),
        "site_packages": site,
        "constraints_file": os.path.join(wish.env, CONSTRAINTS),
    }


def _create_venv(base_python: str, env: str, version: str) -> None:
    """Make or mend a venv where it stays; what is installed in it remains."""
    os.makedirs(os.path.dirname(env), mode=0o755, exist_ok=True)
    binaries = os.path.join(env, "bin")
    # venv keeps links that are there already, dangling ones too
    names = os.listdir(binaries) if os.path.isdir(binaries) else []
    for name in [*names, os.path.join(os.pardir, "pyvenv.cfg")]:
        path = os.path.join(binaries, name)
        if (name.startswith("python") and os.path.islink(path)) or (name not in names and os.path.isfile(path)):
            os.unlink(path)
    # pip comes from the lock, as everything else does: so neither ensurepip nor the package python3-venv is needed
    done = subprocess.run(
        [base_python, "-m", "venv", "--without-pip", "--symlinks", env],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=clean_environ(),
    )
    damage = venv_damage(env, version)
    if done.returncode or damage:
        raise Problem(
            "{} -m venv {}: exit status {}{}\n{}".format(
                base_python,
                env,
                done.returncode,
                f", {damage}" if damage else "",
                done.stdout.decode("utf-8", "replace")[-_ERROR_TAIL:].strip(),
            ),
            "a working environment",
            f"look at the message above; is the file system full or read-only? (df -h {os.path.dirname(env)})",
        )
    sync_folder(env)


def _ensure_user(wish: Wish, facts: Mapping[str, Any], outcome: Outcome, check: bool) -> dict[str, str]:
    _make_folder(facts["user_site"], outcome, check)
    _make_folder(wish.state, outcome, check)
    constraints = os.path.join(wish.state or os.path.join(wish.root, "state", "user"), CONSTRAINTS)
    if wish.constraints is not None:
        path, inherited = user_pip_conf()
        text = merge_constraint(read_text(path) or "", constraints, inherited)
        mode = os.stat(path).st_mode & 0o7777 if os.path.exists(path) else 0o644
        files = {constraints: FileSpec(constraints_text(wish.constraints)), path: FileSpec(text, mode)}
        outcome.files(files, check)
    return {
        "env": facts["user_base"],
        "python": wish.base_python,
        "site_packages": facts["user_site"],
        "constraints_file": constraints,
    }


def find_system_packages(base_python: str, names: Sequence[str]) -> dict[str, str]:
    """Return {entry name: its path} of the modules and metadata of chosen packages of the system's Python.

    Raises:
        Problem: the system's Python has no such package.
    """
    if not names:
        return {}
    found = ask(base_python, _SYSTEM_CODE, json.dumps(list(names))) or {}
    missing = [name for name in names if not found.get(name)]
    if missing:
        raise Problem(
            "{} has no {}".format(base_python, ", ".join(missing)),
            "the packages of torch_jetpack_system_packages in the system's Python",
            "install them (tensorrt: apt-get install python3-libnvinfer; cv2: apt-get install libopencv-python), "
            "or take them off the list",
        )
    return {entry: path for name in names for entry, path in sorted(found[name].items())}


def _ensure_system_packages(wish: Wish, site: str, outcome: Outcome, check: bool) -> None:
    """Show chosen system packages to the venv: links in a folder of their own, and a .pth that names the folder."""
    if wish.system_packages is None:
        return
    folder = os.path.join(wish.env, SYSTEM_FOLDER)
    wanted = find_system_packages(wish.base_python, wish.system_packages)
    found = {name: os.readlink(os.path.join(folder, name)) for name in _links(folder)}
    if wanted != found:
        render = "".join
        outcome.add(
            f"link system packages in {folder}",
            folder,
            render(f"{name} -> {path}\n" for name, path in sorted(found.items())),
            render(f"{name} -> {path}\n" for name, path in sorted(wanted.items())),
        )
        if not check:
            for name in set(found) - set(wanted):
                os.unlink(os.path.join(folder, name))
            for name, path in wanted.items():
                if found.get(name) != path:
                    replace_link(os.path.join(folder, name), path)
            if not wanted:
                shutil.rmtree(folder, ignore_errors=True)
    outcome.files({os.path.join(site, SYSTEM_PTH): FileSpec(folder + "\n") if wanted else None}, check)


def _links(folder: str) -> list[str]:
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [name for name in names if os.path.islink(os.path.join(folder, name))]


def replace_link(path: str, target: str) -> None:
    """Make a symbolic link, or switch one atomically: at no moment is it absent."""
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o755, exist_ok=True)
    temporary = os.path.join(folder, f".{os.path.basename(path)}.{os.getpid()}.tmp")
    if os.path.lexists(temporary):
        os.unlink(temporary)
    os.symlink(target, temporary)
    try:
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
    sync_folder(folder)


def _activate(wish: Wish, outcome: Outcome, check: bool) -> str | None:
    """Write the launcher, and switch `current` where wanted; returns what `current` named before."""
    current = os.path.join(wish.root, CURRENT)
    previous = os.readlink(current) if os.path.islink(current) else None
    launcher = os.path.join(wish.root, LAUNCHER)
    # A venv that is only prepared must not change what users and services start. The user site is not prepared beside
    # another: what is installed there is in use, and a launcher that a venv left would start that venv.
    if wish.activate or wish.scope == "user" or not os.path.exists(launcher):
        text = launcher_text(wish.root, wish.base_python if wish.scope == "user" else "")
        outcome.files({launcher: FileSpec(text, 0o755)}, check)
    if wish.activate and wish.scope == "venv":
        target = os.path.relpath(wish.env, wish.root)
        if previous is None and os.path.lexists(current):
            raise Problem(
                f"{current} is not a link",
                "a link to the active environment",
                f"move it away: mv {current} {current}.old",
            )
        if previous != target:
            outcome.add(f"activate {target}", current, f"{previous or 'absent'}\n", f"{target}\n")
            if not check:
                replace_link(current, target)
    return previous
