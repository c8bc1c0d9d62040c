"""Series files: the ones that are shipped, and every way in which one can be wrong."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.jetson.mamba.plugins.action.source_patches import ActionModule
from ansible_collections.jetson.mamba.plugins.module_utils import patches
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.plugin_utils.patch_series import load_series

BEFORE, AFTER = "one\ntwo\n", "one\n2\n"
DIFF = "--- a/demo/x.py\n+++ b/demo/x.py\n@@ -1,2 +1,2 @@\n one\n-two\n+2\n"


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def series(**change: Any) -> dict[str, Any]:
    patch = {
        "file": "0001-x.patch",
        "target": "demo/x.py",
        "sha256_before": sha(BEFORE),
        "sha256_after": sha(AFTER),
        "applies_to": "python",
        "when": {"friend": ">=1.5.1"},
        "why": "because",
        "upstream": "none",
        "until": "1.1",
    }
    patch.update(change)
    return {"schema": 1, "package": "demo_pkg", "version": "1.0", "patches": [patch]}


Writer = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    def writer(data: Any, diff: str = DIFF) -> Path:
        folder = tmp_path / "demo_pkg" / "1.0"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "series.yml").write_text(data if isinstance(data, str) else yaml.safe_dump(data))
        (folder / "0001-x.patch").write_text(diff)
        return tmp_path

    return writer


def load(root: Path, version: str = "1.0", friend: str | None = "1.6.0", **other: Any) -> list[dict[str, Any]]:
    return load_series(str(root), "demo-pkg", version, {"friend": friend}, **other)


def test_loads_plain_data_with_the_diff(write: Writer) -> None:
    (patch,) = load(write(series()))
    assert patch["diff"] == DIFF
    assert (patch["target"], patch["until"]) == ("demo/x.py", "1.1")
    assert patches.expected_hashes([patch]) == {"demo/x.py": sha(AFTER)}


@pytest.mark.parametrize(
    ("friend", "count"),
    [("1.6.0", 1), ("1.5.1", 1), ("1.6.0+cu126", 1), ("1.6.1rc1", 1), ("1.5.0.post8", 0), ("1.4.0", 0), (None, 0)],
)
def test_companions_decide(write: Writer, friend: str | None, count: int) -> None:
    assert len(load(write(series()), friend=friend)) == count


def test_a_companion_that_was_not_given_is_a_problem(write: Writer) -> None:
    with pytest.raises(Problem, match="depends on friend"):
        load_series(str(write(series())), "demo_pkg", "1.0", {"other": "1"})


def test_a_version_without_a_folder_needs_no_patch(write: Writer) -> None:
    root = write(series())
    assert load(root, version="1.1") == []
    assert load_series(str(root), "stranger", "1.0", {}) == []
    assert len(load(root, version="1.0+cu126")) == 1


def test_patches_to_sources_are_kept_apart(write: Writer) -> None:
    root = write(series(applies_to="source"))
    assert load(root) == []
    assert len(load(root, applies_to="source")) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "/demo/x.py"}, "has the target"),
        ({"target": "../x.py"}, "has the target"),
        ({"file": "../0001-x.patch"}, "file is"),
        ({"file": "0002-gone.patch"}, "does not name 0001-x.patch"),
        ({"sha256_before": "abc"}, "sha256_before is"),
        ({"sha256_after": sha(AFTER).upper()}, "sha256_after is"),
        ({"applies_to": "binary"}, "applies_to is"),
        ({"until": "1.0"}, "until is"),
        ({"until": 1.1}, "until is"),
        ({"until": "soon"}, "until is"),
        ({"when": {"friend": "1.5.1"}}, "when friend is"),
        ({"when": ["friend"]}, "when is"),
        ({"why": ""}, "why is"),
        ({"target": "demo/y.py"}, "the header says"),
    ],
)
def test_a_wrong_value_is_named(write: Writer, change: dict[str, Any], message: str) -> None:
    with pytest.raises(Problem, match=message):
        load(write(series(**change)))


def test_an_unknown_key_is_answered_with_the_nearest(write: Writer) -> None:
    with pytest.raises(Problem) as caught:
        load(write(series(sha256_befor="0" * 64)))
    assert "sha256_befor'" in caught.value.found
    assert "sha256_before" in caught.value.next_step


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("- 1\n", "is list"),
        ("a: [\n", "cannot be read"),
        ({**series(), "schema": 2}, "schema is 2"),
        ({**series(), "version": 1.0}, "version is 1.0"),
        ({**series(), "package": "other"}, "package is 'other'"),
        ({**series(), "patches": []}, r"patches is \[\]"),
        ({key: value for key, value in series().items() if key != "version"}, "lacks version"),
        ({**series(), "patches": [series()["patches"][0]] * 2}, "each once|the patches are"),
    ],
)
def test_a_wrong_series_file_is_named(write: Writer, data: Any, message: str) -> None:
    with pytest.raises(Problem, match=message):
        load(write(data))


@pytest.mark.parametrize(
    ("diff", "message"),
    [
        (DIFF.rstrip("\n"), "does not end"),
        ("", "does not end|no header"),
        ("a story\n", "no header"),
        (DIFF.replace("-1,2", "-1,3"), "another number of lines"),
        (DIFF.replace("+2\n", "?2\n"), "is no line of a hunk"),
        (DIFF + DIFF.replace("x.py", "y.py"), "outside of a hunk"),
        (DIFF.replace("b/demo/x.py", "/dev/null"), "the header says"),
    ],
)
def test_a_diff_that_is_not_whole_is_named(write: Writer, diff: str, message: str) -> None:
    with pytest.raises(Problem, match=message):
        load(write(series(), diff))


@pytest.mark.parametrize(("package", "version"), [("../demo", "1.0"), ("demo", "../1.0"), ("demo", "")])
def test_names_stay_names(write: Writer, package: str, version: str) -> None:
    with pytest.raises(Problem, match="is '"):
        load_series(str(write(series())), package, version, {"friend": "2"})


def test_a_missing_root_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="is no folder"):
        load_series(str(tmp_path / "none"), "demo", "1.0", {})


def test_a_description_before_the_header_and_a_file_without_a_last_newline(write: Writer) -> None:
    diff = "Why it is so.\n\n" + DIFF + "\\ No newline at end of file\n"
    assert load(write(series(), diff))[0]["diff"] == diff


def shipped(root: Path) -> list[Path]:
    return sorted((root / "files" / "patches").glob("*/*/series.yml"))


def test_every_shipped_series_is_sound(root: Path) -> None:
    assert shipped(root)
    for path in shipped(root):
        names = {name for patch in yaml.safe_load(path.read_text())["patches"] for name in patch.get("when") or {}}
        for applies_to in ("python", "source"):
            load_series(
                str(root / "files" / "patches"),
                path.parents[1].name,
                path.parent.name,
                dict.fromkeys(names),
                applies_to=applies_to,
            )


def test_the_pairs_of_mamba_and_convolution(root: Path) -> None:
    def targets(mamba: str, convolution: str) -> list[str]:
        found = load_series(str(root / "files" / "patches"), "mamba_ssm", mamba, {"causal_conv1d": convolution})
        return [patch["target"] for patch in found]

    both = ["mamba_ssm/ops/selective_scan_interface.py", "mamba_ssm/ops/triton/ssd_combined.py"]
    assert targets("2.2.4", "1.6.0") == both
    assert targets("2.2.4", "1.5.0.post8") == []
    assert targets("2.2.5", "1.6.0") == []


def test_the_backport_reaches_forward_recomputation_and_backward(root: Path) -> None:
    found = load_series(str(root / "files" / "patches"), "mamba_ssm", "2.2.4", {"causal_conv1d": "1.6.0"})
    for patch in found:
        lines = patch["diff"].splitlines()
        removed = "\n".join(line for line in lines if line.startswith("-"))
        added = "\n".join(line for line in lines if line.startswith("+"))
        assert removed.count("causal_conv1d_cuda.causal_conv1d_fwd(") == added.count("causal_conv1d_fwd_function(") == 2
        assert removed.count("causal_conv1d_cuda.causal_conv1d_bwd(") == added.count("causal_conv1d_bwd_function(") == 1
        assert "causal_conv1d_cuda" not in added


def test_gnu_patch_reads_the_shipped_diffs_as_we_do(root: Path, tmp_path: Path) -> None:
    """The sizes that the hunks claim are what GNU patch sees; the checksums are proven on the real file elsewhere."""
    tool = shutil.which("patch")
    assert tool, "GNU patch is needed: apt-get install patch"
    for path in sorted((root / "files" / "patches").glob("*/*/*.patch")):
        done = subprocess.run(
            [tool, "--batch", "--dry-run", "--unified", "-p1", f"--input={path}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "malformed" not in done.stdout + done.stderr
        assert "hunks ignored" in done.stdout or "hunk ignored" in done.stdout


class _Task:
    def __init__(self, args: dict[str, Any]) -> None:
        self.args = args
        self.async_val = 0
        self.check_mode = False
        self.diff = False


def action(monkeypatch: pytest.MonkeyPatch, args: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    calls: list[dict[str, Any]] = []

    def execute(_self: ActionModule, **given: Any) -> dict[str, Any]:
        calls.append(given)
        return {"changed": True}

    monkeypatch.setattr(ActionModule, "_execute_module", execute)
    monkeypatch.setattr("ansible.plugins.action.ActionBase.run", lambda *_args, **_kwargs: {})
    plugin = ActionModule.__new__(ActionModule)
    plugin._task = _Task(args)
    return plugin.run(task_vars={}), calls


def test_the_action_fills_in_the_series(monkeypatch: pytest.MonkeyPatch, write: Writer) -> None:
    args = {"package": "demo_pkg", "version": "1.0", "site_packages": "/s", "state_dir": "/t", "state": "present"}
    given = {**args, "patch_root": str(write(series())), "companions": {"friend": "2.0"}}
    result, calls = action(monkeypatch, given)
    assert result == {"changed": True}
    (call,) = calls
    assert call["module_name"] == "jetson.mamba.source_patches"
    assert {key: call["module_args"][key] for key in args} == args
    assert [patch["diff"] for patch in call["module_args"]["series"]] == [DIFF]
    assert "companions" not in call["module_args"]


def test_the_action_reports_a_bad_series_without_a_connection(monkeypatch: pytest.MonkeyPatch, write: Writer) -> None:
    root = write(series(applies_to="binary"))
    result, calls = action(
        monkeypatch, {"package": "demo_pkg", "version": "1.0", "patch_root": str(root), "companions": {"friend": "2"}}
    )
    assert result["failed"] is True and not calls
    assert "applies_to" in result["problem"]["found"] and "expected:" in result["msg"]
