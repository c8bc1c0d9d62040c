"""The callback in real runs of ansible-playbook, over local hosts and made-up results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.unit.plugins import fleet_kit
from tests.unit.plugins.test_fleet_data import faults

ROOT = Path(__file__).resolve().parents[3]
MODULE = """
import json
from ansible.module_utils.basic import AnsibleModule
module = AnsibleModule(argument_spec={"answer": {"type": "json"}}, supports_check_mode=True)
module.exit_json(**json.loads(module.params["answer"]))
"""
PLAYBOOK = """
- name: Made up
  hosts: all
  gather_facts: false
  tasks:
    - name: Plan
      made_up:
        answer: "{{ plan }}"
    - name: Install
      made_up:
        answer: '{"changed": true}'
      when: inventory_hostname != 'idle'
    - name: Prove
      made_up:
        answer: "{{ verification }}"
      when: verification is defined
      register: proved
    - name: Require that no component failed
      ansible.builtin.fail:
        msg: "{{ proved.report.components | selectattr('status', 'equalto', 'failed') | map(attribute='message') }}"
      when:
        - proved.report is defined
        - proved.report.overall == 'failed'
"""


@dataclass
class Done:
    status: int
    output: str
    reports: Path

    @property
    def folder(self) -> Path:
        (found,) = self.reports.iterdir()
        return found

    def host(self, name: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        assert faults("host", document) == []
        return document


def play(folder: Path, hosts: dict[str, dict[str, Any]], reports: Path | None = None, *words: str) -> Done:
    """Run the playbook; a host without variables of its own cannot be reached."""
    (folder / "library").mkdir()
    (folder / "library" / "made_up.py").write_text(MODULE)
    (folder / "play.yml").write_text(PLAYBOOK)
    # JSON is YAML; a variable of ours stays text, so that nothing is templated
    common = {"ansible_python_interpreter": sys.executable, "plan": json.dumps({"jetson_mamba_plan": fleet_kit.plan()})}
    inventory: dict[str, Any] = {}
    for name, own in hosts.items():
        inventory[name] = {
            **common,
            **(own or {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}),
        }
    (folder / "inventory.yml").write_text(json.dumps({"all": {"hosts": inventory}}))
    reports = reports or folder / "reports"
    done = subprocess.run(
        [sys.executable, "-m", "ansible", "playbook", "play.yml", "-i", "inventory.yml", *words],
        cwd=folder,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
            "ANSIBLE_CONFIG": str(folder / "none.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "collections"),
            "ANSIBLE_CALLBACKS_ENABLED": "jetson.mamba.fleet_report",
            "ANSIBLE_HOME": str(folder / "home"),
            "JETSON_MAMBA_REPORTS": str(reports),
            "TMPDIR": str(folder),
            "LC_ALL": "C.UTF-8",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return Done(done.returncode, done.stdout + done.stderr, reports)


def local(found: dict[str, Any] | None = None) -> dict[str, Any]:
    variables: dict[str, Any] = {"ansible_connection": "local"}
    return {**variables, "verification": json.dumps({"report": found})} if found else variables


def failed() -> dict[str, Any]:
    found = fleet_kit.failed().outcome.report
    assert found is not None
    return found


def test_a_fleet_with_a_failed_device(tmp_path: Path) -> None:
    hosts = {"good": local(fleet_kit.verification()), "bad": local(failed()), "idle": local(), "gone": {}}
    done = play(tmp_path, hosts)
    assert done.status != 0
    assert "1 host(s): kernels verified, projects not tested" in done.output
    for name in ("fleet.html", "fleet.json", "junit.xml", "results.csv"):
        assert f"{done.folder / name} " in done.output and (done.folder / name).stat().st_size > 100
    fleet = json.loads((done.folder / "fleet.json").read_text())
    assert faults("fleet", fleet) == [] and fleet["playbook"] == "play.yml" and fleet["seconds"] > 0
    assert fleet["counts"] == {"passed": 1, "failed": 1, "not verified": 2}
    assert [item["task"] for item in done.host("good")["changes"]] == ["Install"]
    assert done.host("good")["changes"][0]["seconds"] > 0 and done.host("idle")["changes"] == []
    assert done.host("good")["failure"] is None and "[" in str(done.host("bad")["failure"]["message"])
    gone = done.host("gone")
    assert gone["unreachable_at"] == "Plan" and "127.0.0.1" in gone["failure"]["message"]
    root = ElementTree.fromstring((done.folder / "junit.xml").read_bytes())
    assert (root.get("failures"), root.get("errors")) == ("1", "1")
    page = (done.folder / "fleet.html").read_text()
    assert page.index("selective_scan_fn") < page.index('id="matrix"') and "127.0.0.1" in page


def test_the_exit_status_tells_of_the_devices_whatever_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = play(tmp_path, {"a": local(fleet_kit.verification())}, tmp_path / "file")
    assert done.status == 0
    assert "cannot be written" in done.output and "JETSON_MAMBA_REPORTS" in done.output
    (folder,) = tmp_path.glob("jetson-mamba-reports-*")
    assert (folder / "fleet.html").is_file()


def test_a_check_writes_nothing(tmp_path: Path) -> None:
    done = play(tmp_path, {"a": local(fleet_kit.verification())}, None, "--check")
    assert done.status == 0 and not done.reports.exists() and "reports:" not in done.output
