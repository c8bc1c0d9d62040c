"""Who may know whom: the directions that docs/architecture.md draws."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from jinja2 import Environment

ROOT = Path(__file__).resolve().parents[2]
COLLECTION = "ansible_collections.jetson.mamba.plugins"
PLUGINS = ROOT / "collections" / Path(*COLLECTION.split("."))

# room -> prefixes of what its files may import beside the standard library
ROOMS = {
    "module_utils": [f"{COLLECTION}.module_utils"],
    "plugin_utils": [
        f"{COLLECTION}.module_utils",
        f"{COLLECTION}.plugin_utils",
        *("elftools", "filelock", "jinja2", "jsonschema", "libcst", "packaging", "unearth", "yaml"),
    ],
    "modules": [f"{COLLECTION}.module_utils", "ansible"],
    "action": [*(f"{COLLECTION}.{room}" for room in ("module_utils", "plugin_utils", "modules")), "ansible", "yaml"],
    "callback": [f"{COLLECTION}.module_utils", f"{COLLECTION}.plugin_utils", "ansible"],
}
ON_DEVICE = ("module_utils", "modules")


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of everything that a source imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def offences(source: str, package: str, allowed: list[str]) -> list[str]:
    """Return one line per import that is neither in the standard library nor allowed."""
    return [
        f"line {line}: {name}"
        for line, name in imports(source, package)
        if name.partition(".")[0] not in sys.stdlib_module_names
        and not any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)
    ]


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_only_what_it_may(room: str) -> None:
    found = {
        str(path.relative_to(ROOT)): bad
        for path in python_files(PLUGINS / room)
        if (bad := offences(path.read_text(encoding="utf-8"), f"{COLLECTION}.{room}", ROOMS[room]))
    }
    assert not found


def test_every_room_is_guarded() -> None:
    there = {path.relative_to(PLUGINS).parts[0] for path in python_files(PLUGINS)}
    assert there <= set(ROOMS)
    assert {"module_utils", "modules"} <= there


def test_the_simulator_knows_nothing_of_the_product() -> None:
    found = {
        str(path.relative_to(ROOT)): names
        for path in python_files(ROOT / "simulator")
        if (
            names := [
                name
                for _, name in imports(path.read_text(encoding="utf-8"), "simulator")
                if name.startswith(("ansible_collections", "tests", "tools", "ansible."))
            ]
        )
    }
    assert not found


def test_no_product_file_knows_the_simulator() -> None:
    """Nor by name: a role that asked for it would not be tested by it."""
    product = [
        ROOT / "site.yml",
        *(path for room in ("roles", "playbooks", "files") for path in (ROOT / room).rglob("*")),
        *(path for path in (ROOT / "collections").rglob("*")),
    ]
    found = [
        str(path.relative_to(ROOT))
        for path in product
        if path.is_file()
        and path.suffix in {".py", ".yml", ".yaml", ".j2", ".sh"}
        and "__pycache__" not in path.parts
        and re.search(r"\bsimulat(or|ed fleet)\b|\bsim-l4t\b", path.read_text(encoding="utf-8"), re.IGNORECASE)
    ]
    assert not found


DEVICE_FILES = [path for room in ON_DEVICE for path in python_files(PLUGINS / room)]
NEWER_METHODS = {"removeprefix", "removesuffix", "is_relative_to", "hardlink_to"}


def evaluated_annotations(node: ast.AST, in_function: bool = False) -> Iterator[ast.expr]:
    """Yield every annotation below a node that is evaluated: all but those of a function's own variables."""
    for child in ast.iter_child_nodes(node):
        function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and child.returns:
            yield child.returns
        own = isinstance(child, ast.AnnAssign) and in_function
        if isinstance(child, (ast.arg, ast.AnnAssign)) and child.annotation and not own:
            yield child.annotation
        yield from evaluated_annotations(child, function or (in_function and not isinstance(child, ast.ClassDef)))


@pytest.mark.parametrize("path", DEVICE_FILES, ids=lambda p: p.name)
def test_device_code_is_python_3_8(path: Path) -> None:
    """The grammar of 3.8, and `X | None` or `list[str]` only where nothing evaluates it."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source, filename=str(path), feature_version=(3, 8))
    if not re.search(r"^from __future__ import annotations$", source, re.MULTILINE):
        inside = [part for annotation in evaluated_annotations(tree) for part in ast.walk(annotation)]
        assert not [part.lineno for part in inside if isinstance(part, (ast.BinOp, ast.Subscript))]
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert not [f"line {node.lineno}: .{node.attr}" for node in attributes if node.attr in NEWER_METHODS]


def task_files() -> list[Path]:
    return sorted(path for path in (ROOT / "roles").glob("*/*/*.yml") if path.parent.name in {"tasks", "handlers"})


def walk_tasks(tasks: list[dict[str, object]]) -> Iterator[dict[str, object]]:
    for task in tasks or []:
        yield task
        for section in ("block", "rescue", "always"):
            inner = task.get(section)
            if isinstance(inner, list):
                yield from walk_tasks(inner)


@pytest.mark.parametrize("path", task_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_role_uses_another_role(path: Path) -> None:
    """Roles take what they need from variables and the plan; only playbooks put roles in order."""
    tasks = list(walk_tasks(yaml.safe_load(path.read_text(encoding="utf-8"))))
    roles = {"ansible.builtin.include_role", "ansible.builtin.import_role"}
    assert not [task.get("name") for task in tasks if roles & set(task)]


PLAYBOOKS = sorted((ROOT / "playbooks").glob("*.yml"))


def plays_of(path: Path) -> list[dict[str, object]]:
    plays: list[dict[str, object]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return plays


def play_tasks(path: Path) -> Iterator[dict[str, object]]:
    """Yield the tasks of a playbook, or of a file of tasks that playbooks include."""
    for play in plays_of(path):
        if path.parent.name == "tasks":
            yield from walk_tasks([play])
        for section in ("pre_tasks", "tasks", "post_tasks"):
            tasks = play.get(section)
            yield from walk_tasks(tasks if isinstance(tasks, list) else [])


@pytest.mark.parametrize(
    "path", [*PLAYBOOKS, *sorted((ROOT / "playbooks" / "tasks").glob("*.yml"))], ids=lambda p: p.name
)
def test_playbooks_hold_roles_not_work(path: Path) -> None:
    """A play may choose and order roles; what is done stands in a role, a module or an action."""
    allowed = {
        *("ansible.builtin.include_role", "ansible.builtin.import_role", "ansible.builtin.set_fact"),
        *("ansible.builtin.assert", "ansible.builtin.fail", "ansible.builtin.meta", "ansible.builtin.debug"),
        *("ansible.builtin.include_tasks", "ansible.builtin.import_tasks", "block"),
    }
    for task in play_tasks(path):
        actions = set(task) & allowed or {key for key in task if key.startswith("jetson.mamba.")}
        assert actions, f"{path.name}: {task.get('name')}"


def entered_roles(tasks: list[dict[str, object]], seen: frozenset[Path] = frozenset()) -> Iterator[tuple[str, str]]:
    """Yield (role, entry point) of what tasks enter, files that they include too."""
    for task in walk_tasks(tasks):
        role, included = task.get("ansible.builtin.include_role"), task.get("ansible.builtin.include_tasks")
        if isinstance(role, dict):
            yield role["name"], role.get("tasks_from", "main.yml")
        if included:
            path = ROOT / "playbooks" / "tasks" / Path(str(included)).name
            if path not in seen:
                yield from entered_roles(yaml.safe_load(path.read_text(encoding="utf-8")), seen | {path})


def roles_of(play: dict[str, object]) -> set[tuple[str, str]]:
    tasks = play.get("tasks")
    return set(entered_roles(tasks if isinstance(tasks, list) else []))


def test_builders_are_chosen_for_all_hosts_at_once() -> None:
    """One build for each key whatever `serial` is: a batch, or hosts that run ahead, would choose for themselves."""
    plays = [play for path in PLAYBOOKS for play in plays_of(path)]
    choosing = [play for play in plays if "wheelhouse" in {role for role, _entry in roles_of(play)}]
    assert len(choosing) == 2, "one that plans and one that builds"
    for play in choosing:
        assert "serial" not in play and play["strategy"] == "linear", play["name"]
        pattern = Environment(autoescape=True).from_string(play["hosts"])
        assert pattern.render(groups={"jetsons": ["a"]}) == "jetsons", "builders is not there: no warning"
        assert pattern.render(groups={"jetsons": ["a"], "builders": ["b"]}) == "jetsons:builders", play["name"]


BEFORE = ["Survey and plan", "Fetch what the plan needs to the controller", "Build what the wheelhouse lacks"]
LOAD = """
import json, sys
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.playbook import Playbook
from ansible.plugins.loader import init_plugin_loader
from ansible.vars.manager import VariableManager

init_plugin_loader(["collections"])
loader = DataLoader()
manager = VariableManager(loader=loader, inventory=InventoryManager(loader=loader, sources=[]))
book = Playbook.load(sys.argv[1], variable_manager=manager, loader=loader)
print(json.dumps({str(play.get_name()): str(play.vars.get("wheelhouse_scope")) for play in book.get_plays()}))
"""


def loaded_scopes(name: str) -> dict[str, str]:
    """Return {name of a play: its wheelhouse_scope} of a playbook, as Ansible loads it with all that it imports.

    Apart, since loading replaces how a process imports collections.
    """
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(ROOT / name)],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("name", "scope"), [("site.yml", "work"), ("playbooks/build_wheels.yml", "all")])
def test_all_plays_of_a_playbook_want_the_same_wheels(name: str, scope: str) -> None:
    """The site comes through build_wheels.yml, whose own scope is another: its own must win in each play."""
    found = loaded_scopes(name)
    assert {play: found[play] for play in BEFORE} == dict.fromkeys(BEFORE, scope)


def test_wheels_are_built_before_any_host_is_changed() -> None:
    plays = [*loaded_scopes("site.yml")]
    assert plays[:3] == BEFORE
    assert plays.index("Install") < plays.index("Verify") < plays.index("Activate")


def test_planning_builds_and_installs_nothing() -> None:
    plays = [play for name in ("plan.yml", "fetch.yml") for play in plays_of(ROOT / "playbooks" / name)]
    entered = {role for play in plays for role in roles_of(play)}
    assert {("jetson_platform", "main.yml"), ("wheelhouse", "choose.yml")} <= entered
    assert {entry for role, entry in entered if role not in ("jetson_platform", "wheelhouse")} <= {"fetch.yml"}
    assert {entry for role, entry in entered if role == "wheelhouse"} == {"choose.yml"}


# The guards themselves: each must see what it is there for.


@pytest.mark.parametrize(
    ("source", "package", "room"),
    [
        ("import ansible.module_utils.basic", "module_utils", "module_utils"),
        ("def f():\n    import yaml", "module_utils", "module_utils"),
        (f"from {COLLECTION}.plugin_utils import settings", "modules", "modules"),
        (f"from {COLLECTION} import modules", "module_utils", "module_utils"),
        ("from ..plugin_utils import settings", "modules", "modules"),
        ("from simulator import cli", "action", "action"),
    ],
)
def test_the_guard_sees_a_wrong_direction(source: str, package: str, room: str) -> None:
    assert offences(source, f"{COLLECTION}.{package}", ROOMS[room])


@pytest.mark.parametrize(
    ("source", "room"),
    [
        ("import json, os.path", "module_utils"),
        (f"from {COLLECTION}.module_utils.errors import Problem", "modules"),
        (f"from {COLLECTION}.module_utils import errors", "module_utils"),
        ("from . import errors", "module_utils"),
        ("from ansible.module_utils.basic import AnsibleModule", "modules"),
    ],
)
def test_the_guard_allows_the_right_directions(source: str, room: str) -> None:
    assert not offences(source, f"{COLLECTION}.{room}", ROOMS[room])


@pytest.mark.parametrize(
    ("source", "evaluated"),
    [
        ("def f(a: int) -> str: ...", 2),
        ("x: int = 1", 1),
        ("def f():\n    x: int = 1\n    self.y: int = 2", 0),
        ("def f():\n    class C:\n        x: int = 1", 1),
        ("async def f(a: int): ...", 1),
    ],
)
def test_the_guard_knows_which_annotations_are_evaluated(source: str, evaluated: int) -> None:
    assert len(list(evaluated_annotations(ast.parse(source)))) == evaluated
