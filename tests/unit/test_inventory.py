"""The example inventory is what README promises, as Ansible reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "inventory" / "jetsons.example.ini"


@pytest.fixture(scope="module")
def listing() -> dict[str, Any]:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ansible-inventory"), "-i", str(EXAMPLE), "--list"],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "WARNING" not in done.stderr
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def test_the_playbooks_group_holds_all_sites(listing: dict[str, Any]) -> None:
    hosts = {host for site in listing["jetsons"]["children"] for host in listing[site]["hosts"]}
    assert hosts == set(listing["_meta"]["hostvars"])
    assert len(listing["jetsons"]["children"]) == 2


def test_sites_have_their_own_users_and_one_a_jump_host(listing: dict[str, Any]) -> None:
    hosts = listing["_meta"]["hostvars"]
    assert {hosts[host]["ansible_user"] for host in listing["site_a"]["hosts"]} == {"jetson"}
    assert {hosts[host]["ansible_user"] for host in listing["site_b"]["hosts"]} == {"nvidia"}
    assert all("ProxyJump=" in hosts[host]["ansible_ssh_common_args"] for host in listing["site_b"]["hosts"])
    assert not any("ansible_ssh_common_args" in hosts[host] for host in listing["site_a"]["hosts"])


def test_no_password_stands_in_the_example_and_the_prompt_is_shown() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert "--ask-become-pass" in text
    settings = [line for line in text.splitlines() if not line.startswith("#")]
    assert not [line for line in settings if "password" in line or "_pass=" in line]


def test_host_keys_stay_checked() -> None:
    assert "StrictHostKeyChecking" not in EXAMPLE.read_text(encoding="utf-8")
