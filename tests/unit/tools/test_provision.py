"""tools/provision.py: which commands run, in which order, and what happens when one fails."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

import tools.provision as provision

ARTEFACTS = json.dumps({"torch_wheel": {}, "sources": {}})


class FakeRun:
    """Records commands; answers with what the simulator's commands print."""

    def __init__(self, fail_on: str = "", status: int = 0) -> None:
        self.calls: list[str] = []
        self.environments: list[Mapping[str, str]] = []
        self.fail_on = fail_on
        self.status = status

    def __call__(self, argv: Sequence[str], env: Mapping[str, str], capture: bool) -> tuple[int, str]:
        line = " ".join(Path(word).name if word.startswith("/") else word for word in argv)
        self.calls.append(line)
        self.environments.append(env)
        if self.fail_on and self.fail_on in line:
            return self.status, ""
        if not capture:
            return 0, ""
        return 0, ARTEFACTS if "artefacts --out" in line else f"output of {argv[2]}\n"

    def starts(self) -> list[str]:
        return [" ".join(call.split()[1:4]) if "-m" in call else call.split()[0] for call in self.calls]


@pytest.fixture(autouse=True)
def _tools_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provision, "tool", lambda name: f"/venv/bin/{name}")


def make(tmp_path: Path, run: FakeRun, **more: object) -> provision.Provisioner:
    settings = {"cache": tmp_path, "run": run, "uid": 0, "platform": "linux", **more}
    return provision.Provisioner(**settings)  # type: ignore[arg-type]  # fields differ in type


def test_provision_prepares_the_simulated_fleet_then_runs_the_site(tmp_path: Path) -> None:
    run = FakeRun()
    make(tmp_path, run).do("provision")
    assert run.starts() == [
        "-m simulator requirements",
        "-m simulator.artefacts --out",
        "-m simulator.inventory_vars artefacts.json",
        "-m simulator up",
        "-m simulator inventory",
        "ansible-playbook",
    ]
    assert run.calls[-2].endswith("inventory --fleet default --vars vars.yml --output default.yml")
    assert run.calls[-1] == "ansible-playbook site.yml -i default.yml"
    assert (tmp_path / "artefacts" / "vars.yml").read_text() == "output of simulator.inventory_vars\n"
    assert (tmp_path / "artefacts" / "artefacts.json").read_text() == ARTEFACTS


def test_real_fleet_needs_neither_root_nor_simulator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inventory = tmp_path / "jetsons.ini"
    inventory.write_text("[jetsons]\n")
    run = FakeRun()
    make(tmp_path, run, inventory=str(inventory), uid=1000, args=["--ask-become-pass"]).do("provision")
    assert run.calls == ["ansible-playbook site.yml -i jetsons.ini --ask-become-pass"]
    assert "a first run compiles once for each kind of device, 40 minutes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("action", "command"),
    [
        ("check", "ansible-playbook site.yml --check --diff -i jetsons.ini"),
        ("verify", "ansible-playbook playbooks/verify.yml -i jetsons.ini"),
    ],
)
def test_actions_name_their_playbook(tmp_path: Path, action: str, command: str) -> None:
    (tmp_path / "jetsons.ini").touch()
    run = FakeRun()
    make(tmp_path, run, inventory=str(tmp_path / "jetsons.ini")).do(action)
    assert run.calls == [command]


def test_missing_inventory_is_refused_before_ansible_runs(tmp_path: Path) -> None:
    run = FakeRun()
    with pytest.raises(Problem) as caught:
        make(tmp_path, run, inventory=str(tmp_path / "typo.ini")).do("provision")
    assert "typo.ini does not exist" in caught.value.found
    assert "jetsons.example.ini" in caught.value.next_step
    assert run.calls == []


@pytest.mark.parametrize("action", ["provision", "check", "verify", "prepare", "fleet-up", "fleet-down", "molecule"])
@pytest.mark.parametrize(("uid", "platform"), [(1000, "linux"), (0, "darwin")])
def test_simulator_is_refused_without_root_or_linux(tmp_path: Path, action: str, uid: int, platform: str) -> None:
    run = FakeRun()
    with pytest.raises(Problem, match=rf"user id {uid} on {platform}"):
        make(tmp_path, run, uid=uid, platform=platform).do(action)
    assert run.calls == []


STEPS = ["requirements", "artefacts", "inventory_vars", " up ", "inventory --fleet", "playbook"]


@pytest.mark.parametrize("step", STEPS)
def test_a_failing_step_ends_the_run_with_its_status(tmp_path: Path, step: str) -> None:
    run = FakeRun(fail_on=step, status=7)
    with pytest.raises(provision.Failed) as caught:
        make(tmp_path, run).do("provision")
    assert caught.value.status == 7
    assert step in run.calls[-1]


def test_failed_artefacts_leave_no_file_that_looks_done(tmp_path: Path) -> None:
    with pytest.raises(provision.Failed):
        make(tmp_path, FakeRun(fail_on="artefacts --out", status=1)).do("prepare")
    assert not (tmp_path / "artefacts" / "artefacts.json").exists()


def test_fleet_file_and_name_reach_the_simulator(tmp_path: Path) -> None:
    run = FakeRun()
    make(tmp_path, run, fleet="small", fleet_file=tmp_path / "fleet.yml").do("fleet-up")
    assert run.calls[3].endswith("-m simulator up --fleet small --file fleet.yml")
    assert run.calls[4].endswith("inventory --fleet small --vars vars.yml --output small.yml")


def test_fleet_down_removes_the_generated_inventory(tmp_path: Path) -> None:
    run = FakeRun()
    made = make(tmp_path, run)
    made.do("fleet-up")
    made.simulated_inventory.parent.mkdir()
    made.simulated_inventory.touch()
    made.do("fleet-down")
    assert run.calls[-1].endswith("-m simulator down --fleet default")
    assert not made.simulated_inventory.exists()


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ({}, "C.UTF-8"),
        ({"LANG": "C"}, "C.UTF-8"),
        ({"LANG": "de_DE.UTF-8"}, None),
        ({"LANG": "de_DE.UTF-8", "LC_ALL": "POSIX"}, "C.UTF-8"),
    ],
)
def test_children_get_a_utf8_locale(base: dict[str, str], expected: str | None) -> None:
    assert provision.environment(base).get("LC_ALL") == expected


def test_children_get_our_configuration_and_tools() -> None:
    env = provision.environment({"PATH": "/usr/bin"})
    assert env["ANSIBLE_CONFIG"] == str(provision.ROOT / "ansible.cfg")
    assert env["PATH"].endswith(":/usr/bin")


def test_main_passes_exit_statuses_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(self: provision.Provisioner, action: str) -> None:
        raise provision.Failed(4)

    monkeypatch.setattr(provision.Provisioner, "do", fail)
    assert provision.main(["provision"]) == 4
    assert "failed after" in capsys.readouterr().err


def test_main_renders_problems(capsys: pytest.CaptureFixture[str]) -> None:
    assert provision.main(["provision", "--inventory", "no-such.ini"]) == 2
    assert capsys.readouterr().err.startswith("found:    the inventory no-such.ini does not exist")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s")])
def test_durations(seconds: float, text: str) -> None:
    assert provision.minutes(seconds) == text
