"""Reporting and fixing a project's checkout: what is written, when, and that it can be taken back."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ansible_collections.jetson.mamba.plugins.action import vision_project as action
from ansible_collections.jetson.mamba.plugins.module_utils import vision_project
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.modules import vision_project as module

CLASS = (
    "import torch.nn as nn\r\n\r\n\r\nclass SS2D(nn.Module):\r\n    def __init__(self, c, d_conv=3, d_state=4):\r\n"
    "        super().__init__()\r\n        # Größe\r\n"
    "        self.conv2d = nn.Conv2d(c, c, d_conv, padding=(d_conv - 1) // 2, groups=c)\r\n"
)
BLOCK = CLASS.encode("latin-1").replace(b"import", b"# -*- coding: latin-1 -*-\r\nimport", 1)
FIXED = BLOCK.replace(b"// 2,", b'// 2 if d_conv % 2 else "same",')
FILE = "ultralytics/nn/modules/mamba_yolo.py"


class Device(action.ActionModule):
    """The action with a device that is this machine."""

    def __init__(self, arguments: dict[str, Any], check: bool = False) -> None:
        self._task = SimpleNamespace(args=arguments, check_mode=check, async_val=0, action="vision_project", diff=False)
        self._connection = SimpleNamespace(_shell=SimpleNamespace(tmpdir=None), has_native_async=False)
        self.operations: list[str] = []
        self.between = lambda: None

    def _execute_module(self, *_positional: Any, **options: Any) -> dict[str, Any]:
        given = options["module_args"]
        json.dumps(given)  # what reaches a device is JSON
        defaults = {name: row.get("default") for name, row in vision_project.ARGUMENTS.items()}
        assert set(given) <= set(defaults)
        self.operations.append(given["operation"])
        if given["operation"] == "write":
            self.between()
        try:
            return module.perform({**defaults, **given}, self._task.check_mode)
        except Problem as problem:
            return {"failed": True, "msg": problem.render(), "problem": problem.as_dict()}


class Project:
    """A checkout, and runs of the action on it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "Mamba-YOLO"
        self.state = folder / "state"
        self.patches = folder / "patches"
        self.file = self.root / FILE
        self.file.parent.mkdir(parents=True)
        self.file.write_bytes(BLOCK)
        self.between = lambda: None
        self.operations: list[str] = []

    def run(self, check: bool = False, **more: Any) -> dict[str, Any]:
        arguments = {
            "path": str(self.root),
            "preset": "upstream",
            "state_dir": str(self.state),
            "patch_folder": str(self.patches),
            **more,
        }
        device = Device(arguments, check)
        device.between = self.between
        result = device.run(task_vars={"inventory_hostname": "orin-a"})
        self.operations = device.operations
        return result

    def kept(self) -> list[str]:
        return sorted(path.name for path in self.state.iterdir()) if self.state.exists() else []


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_report_changes_nothing_and_writes_a_patch(project: Project) -> None:
    result = project.run()
    assert not result["changed"]
    assert project.file.read_bytes() == BLOCK
    assert project.kept() == []
    assert project.operations == ["fetch"]
    patch = Path(result["patch_file"])
    assert patch == project.patches / "orin-a-Mamba-YOLO.patch"
    assert patch.read_bytes().startswith(f"--- a/{FILE}\n+++ b/{FILE}\n".encode())
    assert b'+        self.conv2d = nn.Conv2d(c, c, d_conv, padding=(d_conv - 1) // 2 if d_conv % 2 else "same"' in (
        patch.read_bytes()
    )
    assert result["files"][0]["status"] == "to fix"
    assert f"to fix: Mamba-YOLO/{FILE}:9: SS2D: self.conv2d" in result["msg"]
    assert result["notes"] == []


def test_report_in_check_mode_writes_nothing_at_all(project: Project) -> None:
    assert project.run(check=True)["patch_file"] == ""
    assert not project.patches.exists()


def test_patches_go_beside_the_reports(project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JETSON_MAMBA_REPORTS", str(tmp_path / "mine"))
    assert project.run(patch_folder="")["patch_file"] == str(tmp_path / "mine/patches/orin-a-Mamba-YOLO.patch")


def test_fix_and_again_and_back(project: Project) -> None:
    project.file.chmod(0o640)
    first = project.run(mode="fix")
    assert first["changed"]
    assert project.file.read_bytes() == FIXED
    assert stat.S_IMODE(project.file.stat().st_mode) == 0o640
    assert first["files"][0]["status"] == "fixed"
    assert first["patch_file"] == ""
    assert "if d_conv" not in first["diff"][0]["before"]
    assert 'if d_conv % 2 else "same"' in first["diff"][0]["after"]
    assert len(project.kept()) == 2
    again = project.run(mode="fix")
    assert (again["changed"], project.operations) == (False, ["fetch"])
    assert again["files"][0]["status"] == "fits"
    back = project.run(state="absent")
    assert back["changed"]
    assert project.file.read_bytes() == BLOCK
    assert project.kept() == []
    assert not project.run(state="absent")["changed"]


def test_check_mode_says_the_same_and_writes_nothing(project: Project) -> None:
    asked = project.run(check=True, mode="fix")
    assert asked["changed"]
    assert asked["files"][0]["status"] == "to fix"
    assert project.file.read_bytes() == BLOCK
    assert project.kept() == []
    assert project.run(mode="fix")["diff"] == asked["diff"]
    assert project.run(check=True, state="absent")["changed"]
    assert project.file.read_bytes() == FIXED


def test_a_file_that_changed_in_between_is_not_written(project: Project) -> None:
    other = BLOCK + b"# saved by an editor\r\n"
    project.between = lambda: project.file.write_bytes(other) and None
    result = project.run(mode="fix")
    assert result["failed"]
    assert "was changed while it was being looked at" in result["problem"]["found"]
    assert project.file.read_bytes() == other
    assert project.kept() == []


def test_all_files_or_none(project: Project) -> None:
    second = project.file.with_name("other.py")
    second.write_bytes(BLOCK)
    project.between = lambda: second.write_bytes(b"") and None
    assert project.run(mode="fix", files=["**/other.py"])["failed"]
    assert project.file.read_bytes() == BLOCK


def test_what_was_edited_after_the_fix_is_not_taken_back(project: Project) -> None:
    project.run(mode="fix")
    project.file.write_bytes(FIXED + b"x = 1\r\n")
    result = project.run(state="absent")
    assert "was changed after it was fixed" in result["problem"]["found"]
    assert ".orig" in result["problem"]["next"]
    assert project.file.read_bytes() == FIXED + b"x = 1\r\n"


def test_a_checkout_that_was_renewed_is_fixed_again(project: Project) -> None:
    project.run(mode="fix")
    newer = BLOCK + b"NEW = 1\r\n"
    project.file.write_bytes(newer)  # git pull
    assert project.run(mode="fix")["changed"]
    project.run(state="absent")
    assert project.file.read_bytes() == newer


def test_what_the_team_put_back_itself_is_forgotten(project: Project) -> None:
    project.run(mode="fix")
    project.file.write_bytes(BLOCK)
    assert not project.run(state="absent")["changed"]
    assert project.kept() == []


def test_a_damaged_original_is_not_put_back(project: Project) -> None:
    project.run(mode="fix")
    next(project.state.glob("*.orig")).write_bytes(b"")
    assert "is damaged" in project.run(state="absent")["problem"]["found"]
    assert project.file.read_bytes() == FIXED


def test_other_projects_originals_are_left(project: Project, tmp_path: Path) -> None:
    project.run(mode="fix")
    (tmp_path / "Mamba-YOLO-2").mkdir()
    assert not project.run(state="absent", path=str(tmp_path / "Mamba-YOLO-2"))["changed"]
    assert len(project.kept()) == 2


def test_a_crash_before_the_file_is_written_is_mended(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    real = vision_project.files.write_atomic

    def stop(path: str, content: bytes, mode: int) -> None:
        if path == str(project.file):
            raise OSError(28, "No space left on device")
        real(path, content, mode)

    monkeypatch.setattr(vision_project.files, "write_atomic", stop)
    assert "No space left" in project.run(mode="fix")["problem"]["found"]
    assert project.file.read_bytes() == BLOCK
    monkeypatch.undo()
    assert project.run(mode="fix")["changed"]
    assert project.run(state="absent")["changed"]
    assert project.file.read_bytes() == BLOCK


def test_an_unrecognised_file_is_left_alone_politely(project: Project) -> None:
    project.file.write_bytes(b"import torch.nn as nn\nconv = nn.Conv2d(1, 1, 4)\n")
    result = project.run(mode="fix")
    assert not result.get("failed")
    assert (result["changed"], result["files"][0]["status"]) == (False, "unrecognised")
    assert "Looked for: a Conv1d, Conv2d or Conv3d call" in "".join(result["notes"])


def test_a_file_that_is_no_python_is_left_alone_politely(project: Project) -> None:
    project.file.write_bytes(b"class Conv2d(:\n")
    result = project.run(mode="fix")
    assert not result.get("failed")
    assert "no Python source" in result["files"][0]["message"]


def test_globs_classes_and_double_names(project: Project) -> None:
    (project.root / "a.py").write_bytes(BLOCK.replace(b"SS2D", b"SS2D_a"))
    (project.root / "b.py").write_text("x = 1\n")
    os.symlink("a.py", project.root / "c.py")
    result = project.run(files=["*.py", "**/*.py"], preset="", classes=["SS2D_a"])
    assert {row["path"]: row["status"] for row in result["files"]} == {
        "a.py": "to fix",
        "b.py": "unrecognised",
        FILE: "unrecognised",
    }
    assert result["notes"] == []


def test_a_link_out_of_the_project_is_skipped(project: Project, tmp_path: Path) -> None:
    (tmp_path / "shared.py").write_bytes(BLOCK)
    os.symlink(tmp_path / "shared.py", project.root / "shared.py")
    result = project.run(mode="fix", files=["shared.py"], preset="")
    assert result["files"][0]["status"] == "skipped"
    assert "leads out of the project" in result["notes"][0]
    assert (tmp_path / "shared.py").read_bytes() == BLOCK


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"preset": ""}, "no file of the project is named"),
        ({"files": ["../other.py"]}, "files has '../other.py'"),
        ({"files": ["/etc/passwd"]}, "files has '/etc/passwd'"),
        ({"files": ["none/*.py"], "preset": ""}, "is named none/*.py"),
    ],
)
def test_wrong_settings(project: Project, arguments: dict[str, Any], found: str) -> None:
    result = project.run(**arguments)
    assert result["failed"]
    assert found in result["problem"]["found"]


def test_a_name_that_fits_nothing_is_said(project: Project) -> None:
    assert project.run(files=["none/*.py"])["notes"] == ["Mamba-YOLO: no file is named none/*.py"]


def test_a_project_that_is_not_there(project: Project) -> None:
    assert "there is no folder" in project.run(path=str(project.root / "none"))["problem"]["found"]
    assert not project.run(path=str(project.root / "none"), state="absent").get("failed")


def test_originals_are_kept_in_the_users_home(
    monkeypatch: pytest.MonkeyPatch, project: Project, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    project.run(mode="fix", state_dir="")
    assert len(list((tmp_path / ".local/state/jetson-mamba/projects").iterdir())) == 2


def test_the_documentation_is_the_argument_spec() -> None:
    def facts(option: dict[str, Any]) -> dict[str, Any]:
        kept = {key: option[key] for key in ("type", "elements", "default", "choices", "required") if key in option}
        inner = option.get("suboptions") or option.get("options") or {}
        return {**kept, "options": {name: facts(row) for name, row in inner.items()}}

    documented = yaml.safe_load(module.DOCUMENTATION)["options"]
    assert {name: facts(row) for name, row in documented.items()} == {
        name: facts(row) for name, row in vision_project.ARGUMENTS.items()
    }
