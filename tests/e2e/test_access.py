"""The ways to a device that inventory/jetsons.example.ini shows: jump host, per-site user, sudo password prompt."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import ROOT, Fleet, words

NAME = "e2e-access"
PASSWORD = "opensesame-42"  # of a simulated user, nowhere else
# what prompts are answered within; a host that hangs must not hang the suite
TIMEOUT = 300


@pytest.fixture(scope="module")
def access(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Return a fleet whose second host asks for a sudo password."""
    scratch = tmp_path_factory.mktemp("access")
    description = scratch / "fleet.yml"
    hosts = {
        "gate": {"l4t": "36.4.7", "cuda": "12.6"},
        "inner": {"l4t": "36.4.7", "cuda": "12.6", "sudo_password": PASSWORD},
    }
    description.write_text(yaml.safe_dump({"hosts": hosts}), encoding="utf-8")
    made = Fleet(NAME, scratch)
    made.simulator("down", "--fleet", NAME)
    subprocess.run(
        [sys.executable, "tools/provision.py", "fleet-up", "--fleet", NAME, "--fleet-file", str(description)],
        cwd=ROOT,
        check=True,
    )
    yield made
    made.simulator("down", "--fleet", NAME)


@pytest.fixture(scope="module")
def jetsons_ini(access: Fleet) -> tuple[Path, list[str]]:
    """Return an inventory like the example's, and the prefix that puts the controller into the fleet's network."""
    data = yaml.safe_load(access.inventory.read_text(encoding="utf-8"))["all"]["children"]["jetsons"]
    address = {host: values["ansible_host"] for host, values in data["hosts"].items()}
    arguments = data["vars"]["ansible_ssh_common_args"]
    (namespace,) = re.findall(r"--net=(\S+)", arguments)
    (known_hosts,) = re.findall(r"UserKnownHostsFile=\"?([^\"' ]+)", arguments)
    config = access.scratch / "ssh_config"
    config.write_text(
        f"Host *\n  UserKnownHostsFile {known_hosts}\n  StrictHostKeyChecking yes\n  IdentitiesOnly yes\n"
        f"  IdentityFile {data['vars']['ansible_ssh_private_key_file']}\n",
        encoding="utf-8",
    )
    path = access.scratch / "jetsons.ini"
    path.write_text(
        f"[site_b]\ninner ansible_host={address['inner']}\n\n[jetsons:children]\nsite_b\n\n[site_b:vars]\n"
        f"ansible_user=jetson\nansible_ssh_common_args='-F {config} -o ProxyJump=jetson@{address['gate']}'\n",
        encoding="utf-8",
    )
    variables = {name: value for name, value in data["vars"].items() if not name.startswith("ansible_")}
    (access.scratch / "group_vars").mkdir()
    (access.scratch / "group_vars" / "jetsons.yml").write_text(yaml.safe_dump(variables), encoding="utf-8")
    return path, ["nsenter", f"--net={namespace}"]


def ansible(words: list[str], prefix: list[str], answer: str | None = None) -> tuple[int, str]:
    """Run an Ansible command on a terminal of its own; type `answer` at the first prompt for a password."""
    env = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "LC_ALL": "C.UTF-8"}
    tool = str(Path(sys.executable).parent / words[0])
    main, terminal = pty.openpty()
    # a session of its own, whose terminal getpass opens as /dev/tty
    process = subprocess.Popen(
        ["timeout", str(TIMEOUT), *prefix, "setsid", "--ctty", "--wait", tool, *words[1:]],
        cwd=ROOT,
        env=env,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    output = b""
    while True:
        try:
            block = os.read(main, 65536)
        except OSError:  # the other end was closed
            break
        if not block:
            break
        output += block
        if answer is not None and b"password" in output.lower():
            os.write(main, answer.encode() + b"\n")
            answer = None
    os.close(main)
    text = output.decode("utf-8", "replace")
    print(text)
    return process.wait(), text


def test_through_the_jump_host(jetsons_ini: tuple[Path, list[str]], access: Fleet) -> None:
    path, prefix = jetsons_ini
    status, output = ansible(
        ["ansible", "jetsons", "-i", str(path), "-m", "ansible.builtin.command", "-a", "printenv SSH_CONNECTION USER"],
        prefix,
    )
    assert status == 0
    gate = yaml.safe_load(access.inventory.read_text())["all"]["children"]["jetsons"]["hosts"]["gate"]["ansible_host"]
    assert f"{gate} " in words(output), "the connection does not come from the jump host"
    assert "jetson" in output


def test_sudo_with_a_password_prompt(jetsons_ini: tuple[Path, list[str]], access: Fleet) -> None:
    path, prefix = jetsons_ini
    status, output = ansible(
        ["ansible-playbook", "site.yml", "-i", str(path), "--ask-become-pass", "--check"], prefix, PASSWORD
    )
    assert status == 0
    assert PASSWORD not in output
    assert re.search(r"inner\s+: ok=\d+\s+changed=[1-9]", output)


def test_without_the_password_nothing_changes(jetsons_ini: tuple[Path, list[str]], access: Fleet) -> None:
    path, prefix = jetsons_ini
    # inside the fleet's network the controller has no internet, so nothing that would have to be fetched first
    playbook = access.scratch / "cuda.yml"
    plays = [{"name": "CUDA", "hosts": "jetsons", "gather_facts": False, "roles": ["jetson_platform", "cuda_env"]}]
    playbook.write_text(yaml.safe_dump(plays), encoding="utf-8")
    status, output = ansible(["ansible-playbook", str(playbook), "-i", str(path)], prefix)
    assert status != 0
    assert "sudo" in output.lower()
    assert "password" in output.lower()
    assert access.root("inner", "ls -A /opt; find /etc -path '*jetson-mamba*'").strip() == ""
