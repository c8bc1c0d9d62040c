"""What a wheel asks of the system's linker, and whether the linker has it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.modules import shared_libraries
from ansible_collections.jetson.mamba.plugins.plugin_utils import fetch, wheel_libs

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="a C compiler makes the libraries")


def library(folder: Path, soname: str, *needs: Path) -> Path:
    """Compile an empty library."""
    path = folder / soname
    source = folder / "empty.c"
    source.write_text("void f_{}(void) {{}}\n".format("".join(c for c in soname if c.isalnum())))
    command = ["gcc", "-shared", "-nostdlib", "-Wl,--no-as-needed", f"-Wl,-soname,{soname}", "-o", str(path)]
    subprocess.run([*command, str(source), *(str(need) for need in needs)], check=True)
    return path


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """Return a wheel whose one library needs another of the wheel, and two of the system."""
    outside = [library(tmp_path, "libcusparseLt.so.0"), library(tmp_path, "libelse.so.9")]
    inside = library(tmp_path, "libinside.so")
    main = library(tmp_path, "main.so", inside, *outside)
    path = tmp_path / "torch-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(inside, "torch/lib/libinside.so")
        archive.write(main, "torch/main.so")
        archive.writestr("torch/text.so", "INPUT(libm.so.6)")
    return path


@needs_compiler
def test_needed_is_what_the_wheel_does_not_hold(wheel: Path) -> None:
    assert wheel_libs.needed_of_wheel(wheel) == ["libcusparseLt.so.0", "libelse.so.9"]


@needs_compiler
def test_packages_are_named_and_the_finding_is_kept(wheel: Path, tmp_path: Path) -> None:
    cache = fetch.Cache(tmp_path / "cache")
    described = {"name": "torch", "version": "1.0", "path": str(wheel)}
    assert wheel_libs.needed([described], cache) == {"libcusparseLt.so.0": "libcusparselt0"}
    (note,) = (cache.root / "needed").iterdir()
    note.write_text(json.dumps({"schema": 1, "needed": ["libopenblas.so.0"]}))
    assert wheel_libs.needed([described], cache) == {"libopenblas.so.0": "libopenblas0"}
    note.write_text("{")
    assert wheel_libs.needed([described], cache) == {"libcusparseLt.so.0": "libcusparselt0"}


@pytest.fixture
def described(tmp_path: Path) -> dict[str, str]:
    """Return a wheel in the cache `cache` of which it is noted what it needs: each library of the table."""
    path = tmp_path / "torch-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("torch-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("torch-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    note = tmp_path / "cache" / "needed" / (hashlib.sha256(path.read_bytes()).hexdigest() + ".json")
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps({"schema": 1, "needed": sorted(wheel_libs.PACKAGES)}))
    return {"name": "torch", "version": "1.0", "path": str(path)}


@pytest.mark.parametrize(
    ("locked", "brought"),
    [
        ([], set()),
        (["nvidia-cudnn-cu12"], {"libcudnn.so.8", "libcudnn.so.9"}),
        (["nvidia_cusparselt_cu13"], {"libcusparseLt.so.0"}),
        (["nvidia-cudnn-frontend", "nvidia-cusparse-cu12", "cudnn", "numpy"], set()),
    ],
)
def test_what_the_locks_wheels_bring_is_not_asked_of_the_system(
    described: dict[str, str], tmp_path: Path, locked: list[str], brought: set[str]
) -> None:
    left = wheel_libs.needed([described], tmp_path / "cache", locked)
    assert set(left) == set(wheel_libs.PACKAGES) - brought


def test_the_two_tables_speak_of_the_same_libraries() -> None:
    assert set(wheel_libs.IN_WHEELS) <= {soname.partition(".so")[0] for soname in wheel_libs.PACKAGES}


def test_what_is_not_fetched_yet_counts_for_nothing(tmp_path: Path) -> None:
    described = {"name": "torch", "version": "1.0", "url": "http://127.0.0.1:9/t.whl", "sha256": "a" * 64}
    assert wheel_libs.needed([described], tmp_path / "cache") == {}


def test_a_broken_wheel(tmp_path: Path) -> None:
    path = tmp_path / "t.whl"
    path.write_bytes(b"no zip")
    with pytest.raises(Problem, match="cannot be read"):
        wheel_libs.needed_of_wheel(path)


# ---------------------------------------------------------------- the module shared_libraries

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
    }


def test_a_library_of_no_known_package_is_named_all_the_same(monkeypatch: pytest.MonkeyPatch, printed: str) -> None:
    answer = ask(monkeypatch, printed, libraries={"libcudart.so.12": ""})
    assert answer.failed and "libcudart.so.12" in answer.said["msg"] and answer.said["packages"] == []
    assert "install what brings them" in answer.said["problem"]["next"]


def test_nothing_is_missing(monkeypatch: pytest.MonkeyPatch, printed: str) -> None:
    answer = ask(monkeypatch, printed, libraries={"libthere.so.1": "libthere1"})
    assert not answer.failed and answer.said == {"changed": False, "missing": [], "packages": []}


# ---------------------------------------------------------------- the tasks that use them

ROOT = Path(__file__).resolve().parents[3]


def play(tmp_path: Path, tasks: list[dict[str, Any]], **variables: Any) -> subprocess.CompletedProcess[str]:
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
        [*command, "-e", f"ansible_python_interpreter={sys.executable}"],
        capture_output=True,
        text=True,
        env=environ,
        cwd=tmp_path,
    )


@pytest.mark.parametrize(
    ("installs", "needs", "reaches"), [(False, True, False), (True, True, True), (False, False, True)]
)
def test_a_bare_device_is_refused_after_the_fetch_and_before_any_change(
    described: dict[str, str], tmp_path: Path, installs: bool, needs: bool, reaches: bool
) -> None:
    (note,) = (tmp_path / "cache" / "needed").iterdir()
    # the one of the table that no machine has any more
    note.write_text(json.dumps({"schema": 1, "needed": ["libcudnn.so.8"] if needs else []}))
    artefacts = {
        "lock": "",
        "target": {"machine": "aarch64", "python": "3.10", "glibc": "2.35"},
        "extra": [described],
        "cache": str(tmp_path / "cache"),
        "trust_on_first_use": False,
        "install_libraries": installs,
    }
    fetching = {"ansible.builtin.include_role": {"name": "jetson_platform", "tasks_from": "fetch.yml"}}
    done = play(
        tmp_path,
        [fetching, {"ansible.builtin.debug": {"msg": "the installation begins"}}],
        jetson_platform_plan={"artefacts": artefacts},
    )
    assert ("the installation begins" in done.stdout) == reaches, done.stdout + done.stderr
    assert (done.returncode == 0) == reaches
    assert ("skipping: [localhost]" in done.stdout) == reaches
    if not reaches:
        assert "install libcudnn8" in done.stdout


def test_only_packages_of_missing_libraries_are_installed() -> None:
    find, install, require = yaml.safe_load((ROOT / "roles/torch_jetpack/tasks/libraries.yml").read_text("utf-8"))
    assert find["jetson.mamba.shared_libraries"]["required"] is False
    packages = install["jetson.mamba.debian_packages"]
    assert packages["names"] == "{{ " + find["register"] + ".packages }}"
    assert install["become"] is True and install["when"] == find["register"] + ".packages | length > 0"
    assert require["jetson.mamba.shared_libraries"].get("required", True)
