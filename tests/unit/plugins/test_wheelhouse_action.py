"""The action behind playbooks/wheelhouse.yml: what it prints, what it refuses, check mode and diff."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ansible_collections.jetson.mamba.plugins.action import wheelhouse as action
from ansible_collections.jetson.mamba.plugins.module_utils.build import build_key
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.module_utils.files import sha256_file
from ansible_collections.jetson.mamba.plugins.modules import wheelhouse as module
from ansible_collections.jetson.mamba.plugins.plugin_utils import wheelhouse as store
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheel_inspection import Inspection

ROOT = Path(__file__).resolve().parents[3]
ORIN = "aarch64-glibc2.35-cu12.6-cp310-torch2.5.0a0+872d972e41.nv24.8-cxx11-sm87"
CONV = "causal_conv1d-1.6.0-cp310-cp310-linux_aarch64.whl"
MAMBA = "mamba_ssm-2.2.4-cp310-cp310-linux_aarch64.whl"


class Action(action.ActionModule):
    """The action without an Ansible around it."""

    def __init__(self, house: Path, check: bool = False, diff: bool = False, **arguments: Any) -> None:
        arguments = {"project": str(ROOT), "path": str(house), **arguments}
        self._task = SimpleNamespace(
            args=arguments, check_mode=check, async_val=0, action="wheelhouse", diff=diff
        )
        self._connection = SimpleNamespace(_shell=SimpleNamespace(tmpdir=None), has_native_async=False)


def run(house: Path, variables: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Run the task."""
    return Action(house, **options).run(task_vars=variables or {})


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(action.display, "display", lines.append)
    return lines


@pytest.fixture(autouse=True)
def inspected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Look into no wheel: what is in them here is one word, and b"trap" is refused."""
    seen: list[str] = []

    def inspect(path: Path, _row: dict[str, Any]) -> Inspection:
        seen.append(path.name)
        if path.read_bytes() == b"trap":
            raise Problem(f"{path.name} holds x86-64 code", "aarch64", "build it")
        return Inspection({}, ["GPU code for 7 GPUs"], [])

    monkeypatch.setattr(store, "inspect_row", inspect)
    return seen


@pytest.fixture
def house(tmp_path: Path) -> Path:
    return tmp_path / "wheelhouse"


def build(house: Path, folder: Path, name: str = MAMBA, content: bytes = b"wheel", source: str = "5") -> dict[str, Any]:
    """Put a wheel in that was built."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / name
    wheel.write_bytes(content)
    component, version = name.split("-")[:2]
    row = {
        "component": component,
        "version": version,
        "class_id": ORIN,
        "key": build_key(component, version, source * 64, ORIN, "87", []),
        "sha256": sha256_file(str(wheel)),
        "origin": "built on orin-a",
        "source_sha256": source * 64,
        "sm": "87",
        "flags": [],
        "seconds": 737.5,
    }
    return store.Wheelhouse(house).add(wheel, row)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    folder = tmp_path / "archive"
    folder.mkdir()
    for name in (CONV, MAMBA, CONV.replace("310", "311"), "einops-0.8.0-py3-none-any.whl", "notes.txt"):
        (folder / name).write_bytes(name.encode())
    return folder


# ---------------------------------------------------------------- arguments


def test_documented_options_are_the_arguments() -> None:
    documented = yaml.safe_load(module.DOCUMENTATION)["options"]
    assert set(documented) == set(module.argument_spec())
    assert tuple(documented["mode"]["choices"]) == module.MODES
    for name, option in module.argument_spec().items():
        assert option.get("default") == documented[name].get("default") and option["type"] == documented[name]["type"]
    assert documented["keep"]["default"] == store.KEEP_ROWS and documented["aside_days"]["default"] == store.ASIDE_DAYS


def test_an_unknown_action_is_named_with_its_likely_meaning(house: Path) -> None:
    answer = run(house, mode="lst")
    assert answer["failed"] and "'lst'; did you mean list?" in answer["msg"] and "prune, unlock" in answer["msg"]


@pytest.mark.parametrize("wrong", ["wheelhouse_acton", "wheelhouse_keeps", "wheelhose_path", "wheelhouse_x"])
def test_a_typo_in_a_variable_is_found(house: Path, wrong: str) -> None:
    answer = run(house, {wrong: 1, "jetson_platform_root": "/x", "ansible_user": "x"}, mode="prune")
    assert answer["failed"] and wrong in answer["problem"]["found"] and not house.exists()


def test_every_variable_of_the_playbook_is_known(house: Path, printed: list[str]) -> None:
    text = (ROOT / "playbooks" / "wheelhouse.yml").read_text(encoding="utf-8")
    settings = ("wheelhouse_path", "wheelhouse_sha256", "wheelhouse_sources", "wheelhouse_patience_minutes")
    assert all(f"{{{{ {name} |" in text for name in store.PLAYBOOK_VARIABLES)
    assert "failed" not in run(house, dict.fromkeys((*store.PLAYBOOK_VARIABLES, *settings)))


# ---------------------------------------------------------------- list


def test_an_empty_wheelhouse_says_so(house: Path, printed: list[str]) -> None:
    answer = run(house)
    assert not answer["changed"] and answer["wheels"] == [] and printed == [f"{house} holds no wheels"]


def test_the_table_is_readable(house: Path, tmp_path: Path, printed: list[str]) -> None:
    row = build(house, tmp_path)
    other = build(house, tmp_path, CONV)
    (house / ORIN / "mine.whl").write_bytes(b"mine")
    answer = run(house)
    head, empty, class_line, columns, first, second, remark = answer["table"]
    assert (head, empty, class_line) == (f"wheelhouse {house}", "", ORIN)
    assert columns.split() == ["component", "version", "key", "MB", "added", "(UTC)", "took", "origin"]
    assert first.split()[:4] == ["causal_conv1d", "1.6.0", other["key"][:12], "0.0"]
    assert second.split()[-4:] == ["12m18s", "built", "on", "orin-a"] and row["added"][:10] in second
    assert columns.index("origin") == first.index("built on") == second.index("built on")
    assert "mine.whl" in remark and "import" in remark
    assert printed == ["\n".join(answer["table"])] and not answer["changed"]
    assert [one["key"] for one in answer["wheels"]] == [other["key"], row["key"]]
    json.dumps(answer)


def test_a_damaged_manifest_fails_the_task(house: Path, tmp_path: Path) -> None:
    build(house, tmp_path)
    (house / ORIN / "manifest.json").write_text("{")
    for mode in ("list", "verify", "prune"):
        answer = run(house, mode=mode)
        assert answer["failed"] and "manifest.json cannot be read" in answer["msg"]


# ---------------------------------------------------------------- verify


def test_verify_of_good_wheels(house: Path, tmp_path: Path, printed: list[str], inspected: list[str]) -> None:
    build(house, tmp_path)
    answer = run(house, mode="verify")
    assert not answer["changed"] and "failed" not in answer and inspected == [MAMBA]
    assert "7 GPUs" in printed[0] and "1 wheels verified" in printed[-1]


@pytest.mark.parametrize("check", [True, False])
def test_verify_names_all_bad_wheels_at_the_end(house: Path, tmp_path: Path, check: bool) -> None:
    build(house, tmp_path, source="4")
    trap = build(house, tmp_path, CONV, b"trap")
    bad = build(house, tmp_path)
    wheels = store.Wheelhouse(house)
    wheels.path_of(bad).write_bytes(b"wheeL")
    answer = run(house, mode="verify", check=check)
    assert answer["failed"] and answer["changed"] is not check
    assert f"2 of 3 wheels in {house} are wrong" in answer["msg"]
    assert trap["key"][:12] in answer["msg"] and "x86-64" in answer["msg"] and bad["key"][:12] in answer["msg"]
    assert len(list(wheels.rows())) == (3 if check else 1)
    assert len(list((house / ORIN).glob("aside/*.whl"))) == (0 if check else 2)


# ---------------------------------------------------------------- import


def test_an_archive_folder_is_imported_once(house: Path, archive: Path, printed: list[str]) -> None:
    options = {"mode": "import", "import_path": str(archive), "class_id": ORIN, "diff": True}
    planned = run(house, check=True, **options)
    assert planned["changed"] and len(planned["changes"]) == 2 and not house.exists()
    assert "would be imported: causal_conv1d 1.6.0" in printed[-1]
    done = run(house, **options)
    assert done["changed"] and done["changes"] == planned["changes"]
    assert done["diff"][0]["before"] == "" and CONV in done["diff"][0]["after"]
    assert {row["origin"] for row in done["wheels"]} == {f"imported from {archive / name}" for name in (CONV, MAMBA)}
    said = "\n".join(printed)
    assert "cp311-cp311-linux_aarch64.whl: it is for cp311" in said
    assert "einops-0.8.0-py3-none-any.whl is no wheel of causal_conv1d, mamba_ssm" in said and "notes.txt" in said
    again = run(house, **options)
    assert not again["changed"] and "diff" not in again and f"{CONV} is there already" in "\n".join(printed)


def test_a_bad_wheel_among_good_ones(house: Path, archive: Path) -> None:
    (archive / CONV).write_bytes(b"trap")
    answer = run(house, mode="import", import_path=str(archive), class_id=ORIN)
    assert answer["failed"] and answer["changed"]
    assert "1 of 2 wheels are refused" in answer["msg"] and "x86-64" in answer["msg"]
    assert "imported:\n  - mamba_ssm" in answer["msg"]
    assert [row["component"] for row in store.Wheelhouse(house).rows()] == ["mamba_ssm"]


def test_an_import_checks_pinned_hashes(house: Path, archive: Path) -> None:
    answer = run(
        house, mode="import", import_path=str(archive / CONV), class_id=ORIN, sha256={CONV: "0" * 64}
    )
    assert answer["failed"] and "has sha256" in answer["msg"] and not house.exists()


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, "is not set"),
        ({"import_path": "x"}, "is not set"),
        ({"import_path": "nowhere", "class_id": ORIN}, "there is no"),
        ({"import_path": "playbooks", "class_id": ORIN}, "nothing to import"),
        ({"import_path": "playbooks", "class_id": "sm87"}, "no platform class"),
        ({"import_path": "playbooks", "class_id": ORIN, "sha256": {CONV: "x"}}, "wheelhouse_sha256"),
    ],
)
def test_an_import_that_cannot_be(house: Path, options: dict[str, Any], found: str) -> None:
    answer = run(house, mode="import", **options)
    assert answer["failed"] and found in answer["problem"]["found"] and "changed" not in answer


# ---------------------------------------------------------------- prune, unlock


def test_prune_lists_what_would_go_and_then_removes_it(house: Path, tmp_path: Path, printed: list[str]) -> None:
    for source in "123":
        build(house, tmp_path, source=source)
    planned = run(house, mode="prune", check=True, diff=True, keep="1")
    assert planned["changed"] and len(planned["changes"]) == 2 and "would be removed: " in printed[-1]
    assert planned["diff"][0]["after"] == "" and planned["diff"][0]["before"].count("1 are newer") == 2
    assert len(planned["wheels"]) == 3
    done = run(house, mode="prune", diff=True, keep="1")
    assert done["changes"] == planned["changes"] and len(done["wheels"]) == 1
    again = run(house, mode="prune", diff=True, keep="1")
    assert not again["changed"] and "diff" not in again and "nothing to prune" in printed[-1]


def test_unlock_removes_stale_locks_and_keeps_living_ones(house: Path, tmp_path: Path, printed: list[str]) -> None:
    row = build(house, tmp_path)
    wheels = store.Wheelhouse(house)
    with wheels.locked(ORIN, "mamba_ssm", row["key"], printed.append, 1):
        (lock,) = (house / ORIN / "locks").glob("*.json")
        stale = lock.with_name("causal_conv1d-000000000000.json")
        stale.write_text(json.dumps({**json.loads(lock.read_text()), "controller": "other"}))
        os.utime(stale, (1, 1))
        assert "locked: causal_conv1d-000000000000, mamba_ssm-" in run(house)["table"][-1]
        planned = run(house, mode="unlock", check=True)
        assert planned["changed"] and stale.exists()
        answer = run(house, mode="unlock")
        assert len(answer["changes"]) == len(planned["changes"]) == 1
        assert "on other" in answer["changes"][0] and stale.name in answer["changes"][0]
        assert lock.exists() and not stale.exists()
        assert "its owner lives" in "\n".join(printed)
    assert run(house, mode="unlock")["changed"] is False and "there are no locks" in printed[-1]


# ---------------------------------------------------------------- the playbook itself


def test_the_playbook_runs_without_a_warning(house: Path, tmp_path: Path) -> None:
    row = build(house, tmp_path)
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("ansible-playbook")), "playbooks/wheelhouse.yml", "-i", "localhost,"),
            *("-e", f"wheelhouse_path={house}", "-e", "wheelhouse_action=prune", "-e", "wheelhouse_keep=1", "--check"),
        ],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "LC_ALL": "C.UTF-8", "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert row["key"][:12] in done.stdout and "nothing to prune" in done.stdout
    assert "changed=0" in done.stdout and "WARNING" not in done.stdout + done.stderr
