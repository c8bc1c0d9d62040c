"""Whether a device's linker has what wheels are linked with, asked before anything is changed there."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.jetson.mamba.plugins.module_utils import plan
from ansible_collections.jetson.mamba.plugins.modules import shared_libraries

WANTED = {"libcusparseLt.so.0": "libcusparselt0", "libopenblas.so.0": "libopenblas0", "libthere.so.1": "libthere1"}


class Answer(Exception):
    """What the module says at its end."""

    def __init__(self, failed: bool, said: dict[str, Any]) -> None:
        super().__init__(said.get("msg"))
        self.failed = failed
        self.said = said


def ask(monkeypatch: pytest.MonkeyPatch, printed: str, **arguments: Any) -> Answer:
    """Run the module where ldconfig prints this."""

    class Module:
        def __init__(self, argument_spec: dict[str, Any], supports_check_mode: bool) -> None:
            assert supports_check_mode and set(arguments) <= set(argument_spec)
            self.params = {name: arguments.get(name, option.get("default")) for name, option in argument_spec.items()}

        def run_command(self, command: list[str], check_rc: bool) -> tuple[int, str, str]:
            assert command[1:] == ["-p"] and check_rc
            return 0, printed, ""

        def fail_json(self, **said: Any) -> None:
            raise Answer(True, said)

        def exit_json(self, **said: Any) -> None:
            raise Answer(False, said)

    monkeypatch.setattr(shared_libraries, "AnsibleModule", Module)
    with pytest.raises(Answer) as answer:
        shared_libraries.main()
    return answer.value


@pytest.fixture
def printed() -> str:
    """Return what ldconfig prints where one library of WANTED is there."""
    return "2 libs found in cache\n\tlibthere.so.1 (libc6,AArch64) => /lib/libthere.so.1\n"


def test_missing_libraries_are_refused_with_their_packages(monkeypatch: pytest.MonkeyPatch, printed: str) -> None:
    answer = ask(monkeypatch, printed, libraries=WANTED)
    assert answer.failed and "install libcusparselt0 libopenblas0 " in answer.said["problem"]["next"]
    assert "debian_packages_source=controller" in answer.said["problem"]["next"]
    assert "libthere" not in answer.said["msg"]


def test_missing_libraries_that_are_not_required_are_named_only(monkeypatch: pytest.MonkeyPatch, printed: str) -> None:
    answer = ask(monkeypatch, printed, libraries=WANTED, required=False)
    assert not answer.failed
    assert answer.said == {
        "changed": False,
        "missing": ["libcusparseLt.so.0", "libopenblas.so.0"],
        "packages": ["libcusparselt0", "libopenblas0"],
        "reasons": [
            {"name": "libcusparselt0", "why": "libcusparseLt.so.0, which the torch wheel is linked with"},
            {"name": "libopenblas0", "why": "libopenblas.so.0, which the torch wheel is linked with"},
        ],
    }


def test_a_library_of_no_known_package_is_named_all_the_same(monkeypatch: pytest.MonkeyPatch, printed: str) -> None:
    answer = ask(monkeypatch, printed, libraries={"libcudart.so.12": ""})
    assert answer.failed and "libcudart.so.12" in answer.said["msg"] and answer.said["packages"] == []
    assert "install what brings them" in answer.said["problem"]["next"]


def test_a_package_of_two_libraries_has_one_reason_the_one_that_a_plan_names(
    monkeypatch: pytest.MonkeyPatch, printed: str
) -> None:
    two = {"libb.so.1": "libab1", "liba.so.1": "libab1"}
    answer = ask(monkeypatch, printed, libraries=two, required=False)
    state = {"tools": dict.fromkeys(("gcc", "g++", "patch"), True), "libraries": [], "interpreters": []}
    planned = plan.find_packages({"python": "3.10"}, state, two)["run"]
    assert answer.said["reasons"] == planned
    assert [row["name"] for row in planned] == ["libab1"]


def test_nothing_is_missing(monkeypatch: pytest.MonkeyPatch, printed: str) -> None:
    answer = ask(monkeypatch, printed, libraries={"libthere.so.1": "libthere1"})
    assert not answer.failed and answer.said == {"changed": False, "missing": [], "packages": [], "reasons": []}


# ---------------------------------------------------------------- the tasks that use them

ROOT = Path(__file__).resolve().parents[3]


def play(
    tmp_path: Path, tasks: list[dict[str, Any]], *words: str, **variables: Any
) -> subprocess.CompletedProcess[str]:
    """Run tasks on this machine."""
    book = tmp_path / "play.yml"
    content = {"hosts": "localhost", "gather_facts": False, "vars": variables, "tasks": tasks}
    book.write_text(json.dumps([content]))
    environ = dict(os.environ, ANSIBLE_CONFIG=str(ROOT / "ansible.cfg"), ANSIBLE_LOCAL_TEMP=str(tmp_path / "local"))
    environ.update(ANSIBLE_COLLECTIONS_PATH=str(ROOT / "collections"), ANSIBLE_ROLES_PATH=str(ROOT / "roles"))
    environ.update(ANSIBLE_REMOTE_TEMP=str(tmp_path / "remote"), ANSIBLE_NOCOLOR="1", ANSIBLE_STDOUT_CALLBACK="default")
    environ.update(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    command = [sys.executable, "-m", "ansible", "playbook", "-i", "localhost,", "-c", "local", str(book)]
    return subprocess.run(
        [*command, "-e", f"ansible_python_interpreter={sys.executable}", *words],
        capture_output=True,
        text=True,
        env=environ,
        cwd=tmp_path,
    )


def bare(tmp_path: Path, needs: list[str], installs: bool = True, toolkit: bool = False) -> dict[str, Any]:
    """Return a plan for a device that has nothing, whose torch wheel is here and needs these libraries."""
    path = tmp_path / "torch-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("torch-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("torch-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    note = tmp_path / "cache" / "needed" / (hashlib.sha256(path.read_bytes()).hexdigest() + ".json")
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps({"schema": 1, "needed": needs}))
    cuda = {"outcome": "cuda_env", "what": "install" if toolkit else "configure"}
    return {
        "artefacts": {
            "lock": "",
            "target": {"machine": "aarch64", "python": "3.10", "glibc": "2.35"},
            "extra": [{"name": "torch", "version": "1.0", "path": str(path)}],
            "cache": str(tmp_path / "cache"),
            "trust_on_first_use": False,
            "install_libraries": installs,
        },
        "paths": {"cuda_home": str(tmp_path / "cuda-12.6")},
        "platform": {"cuda": "12.6"},
        "packages": [{"name": "gcc", "why": "Triton"}],
        "work": [cuda, {"outcome": "torch_jetpack", "what": "install"}],
        "outcomes": ["cuda_env", "torch_jetpack"],
    }


FETCH = [
    {"ansible.builtin.include_role": {"name": "jetson_platform", "tasks_from": "fetch.yml"}},
    {
        "ansible.builtin.debug": {
            "msg": "packages {{ jetson_platform_plan.packages | map(attribute='name') | join(' ') }};"
            " outcomes {{ jetson_platform_plan.outcomes | join(' ') }}"
        }
    },
]
# the one of the table that no machine has any more
ABSENT = "libcudnn.so.8"


@pytest.mark.parametrize(
    ("needs", "toolkit", "more", "expected"),
    [
        ([ABSENT], False, {}, "packages gcc libcudnn8; outcomes debian_packages cuda_env torch_jetpack"),
        ([], False, {}, "packages gcc; outcomes cuda_env torch_jetpack"),
        (
            [ABSENT],
            True,
            {},
            "packages gcc libcudnn8 cuda-toolkit-12-6; outcomes debian_packages cuda_env torch_jetpack",
        ),
        (
            [],
            True,
            {"cuda_env_packages": ["cuda-nvcc-12-6", "gcc"]},
            "packages gcc cuda-nvcc-12-6 gcc; outcomes debian_packages cuda_env torch_jetpack",
        ),
    ],
)
def test_what_is_known_only_after_the_fetch_is_among_the_plans_packages_before_any_change(
    tmp_path: Path, needs: list[str], toolkit: bool, more: dict[str, Any], expected: str
) -> None:
    done = play(tmp_path, FETCH, jetson_platform_plan=bare(tmp_path, needs, toolkit=toolkit), **more)
    assert done.returncode == 0, done.stdout + done.stderr
    assert expected in " ".join(done.stdout.split()), done.stdout
    # what a device with nothing missing is not asked
    assert "changed=0" in done.stdout
    skipped = [words for words in done.stdout.split("TASK [")[1:] if "skipping: [localhost]" in words]
    asked = {"Find the libraries": needs, "Ask which packages": toolkit}
    for name, wanted in asked.items():
        assert any(name in words for words in skipped) != bool(wanted)


def test_where_nothing_may_be_installed_the_run_ends_before_any_change(tmp_path: Path) -> None:
    done = play(tmp_path, FETCH, jetson_platform_plan=bare(tmp_path, [ABSENT], installs=False))
    assert done.returncode != 0
    assert "install libcudnn8" in done.stdout
    assert "packages gcc" not in done.stdout


def test_a_check_says_what_would_be_fetched_and_what_cannot_be_known(tmp_path: Path) -> None:
    planned = bare(tmp_path, [ABSENT])
    wheel = {"name": "torch", "version": "1.0", "url": "https://127.0.0.1:9/torch-1.0-py3-none-any.whl"}
    planned["artefacts"]["extra"] = [{**wheel, "sha256": "a" * 64}]
    done = play(tmp_path, FETCH, "--check", jetson_platform_plan=planned)
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert "torch==1.0" in said
    assert "linked with is known once they are here" in said
    assert "packages gcc; outcomes cuda_env torch_jetpack" in said


def test_only_packages_of_missing_libraries_are_installed() -> None:
    find, install, require = yaml.safe_load((ROOT / "roles/torch_jetpack/tasks/libraries.yml").read_text("utf-8"))
    assert find["jetson.mamba.shared_libraries"]["required"] is False
    packages = install["jetson.mamba.debian_packages"]
    assert packages["names"] == "{{ " + find["register"] + ".packages }}"
    assert install["become"] is True and install["when"] == find["register"] + ".packages | length > 0"
    assert require["jetson.mamba.shared_libraries"].get("required", True)
