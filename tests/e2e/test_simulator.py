"""The simulated fleet as its users meet it: the command line, ssh and Ansible, and nothing left afterwards.

Needs root and the simulator's system packages. Uses fleets of its own names beside any that run.
"""

from __future__ import annotations

import fnmatch
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
FLEET = "e2e-sim"
SECOND = "e2e-sim-second"
CRASHED = "e2e-sim-crashed"
SNAPSHOT = "e2e-sim-snapshot"


def simulator(*argv: str, timeout: float = 900, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run one command of the simulator to its end."""
    return subprocess.run(
        [sys.executable, "-m", "simulator", *argv],
        cwd=REPOSITORY,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def done(*argv: str, timeout: float = 900) -> str:
    """Run one command that must succeed; return what it printed."""
    result = simulator(*argv, timeout=timeout)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def state_root() -> Path:
    """Return the simulator's cache."""
    named = os.environ.get("SIMULATOR_CACHE")
    return Path(named).resolve() if named else REPOSITORY / ".cache" / "simulator"


def left_behind(fleet: str) -> list[str]:
    """Return every trace of a fleet on this machine: namespaces, cgroups, mounts, processes, files."""
    traces = [f"netns {path}" for path in Path("/run/netns").glob(f"jetsim-*-{fleet}")]
    for folder, names, _ in os.walk("/sys/fs/cgroup"):
        traces += [f"cgroup {folder}/{name}" for name in names if fnmatch.fnmatch(name, f"jetsim-*-{fleet}")]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            mounts = (process / "mountinfo").read_text()
            command = (process / "cmdline").read_bytes().decode("utf-8", "replace").replace("\0", " ")
        except OSError:
            continue
        if f"fleets/{fleet}/" in mounts:
            traces.append(f"mount seen by {process.name} ({command})")
        if f"-{fleet} socat" in command:
            traces.append(f"process {process.name} ({command})")
    traces += [str(path) for path in (state_root() / "fleets").glob(f"{fleet}*") if path.name == fleet]
    traces += [str(path) for path in state_root().glob(f".lock-fleet-{fleet}") if path.is_file()]
    return traces


@pytest.fixture(scope="module", autouse=True)
def clean() -> Iterator[None]:
    """Begin and end without any fleet of these tests."""
    assert os.geteuid() == 0, "these tests start simulated hosts and need root"

    def sweep() -> None:
        for fleet in (FLEET, SECOND, CRASHED):
            done("down", "--fleet", fleet)
        simulator("forget", SNAPSHOT)

    sweep()
    yield
    sweep()


@pytest.fixture(scope="module")
def fleet() -> Iterator[str]:
    """The default fleet's three hosts, under a name of these tests."""
    done("up", "--fleet", FLEET)
    yield FLEET
    done("down", "--fleet", FLEET)
    assert left_behind(FLEET) == []


def on(fleet: str, host: str, command: str) -> str:
    """Run a shell command on a host over ssh; return what it printed."""
    return done("ssh", "--fleet", fleet, host, "--", command, timeout=120)


def ansible(fleet: str, folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run ansible over the fleet's inventory, with a configuration of nobody's."""
    config = folder / "ansible.cfg"
    config.write_text("[ssh_connection]\nssh_args = -o ControlMaster=auto -o ControlPersist=60s\n")
    inventory = folder / "inventory.yml"
    done("inventory", "--fleet", fleet, "--output", str(inventory))
    program = Path(sys.executable).with_name("ansible")
    return subprocess.run(
        [str(program), "-i", str(inventory), "jetsons", *argv],
        cwd=folder,
        env={**os.environ, "ANSIBLE_CONFIG": str(config), "ANSIBLE_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("host", "revision", "package", "cuda"),
    [
        ("orin-a", "REVISION: 4.7, ", "36.4.7-20250918154033", "12.6"),
        ("orin-b", "REVISION: 4.7, ", "36.4.7-20250918154033", "12.6"),
        ("orin-c", "REVISION: 3.0, ", "36.3.0-20240506102626", "12.2"),
    ],
)
def test_a_host_is_a_jetson(fleet: str, host: str, revision: str, package: str, cuda: str) -> None:
    release = on(fleet, host, "cat /etc/nv_tegra_release")
    assert release.startswith("# R36 (release), ") and revision in release
    assert (
        on(fleet, host, "dpkg-query -W -f '${Version}|${db:Status-Status}' nvidia-l4t-core") == f"{package}|installed"
    )
    assert on(fleet, host, "readlink -f /usr/local/cuda") == f"/usr/local/cuda-{cuda}\n"
    assert f'"{cuda}.' in on(fleet, host, "cat /usr/local/cuda/version.json")
    tree = "/sys/firmware/devicetree/base"
    assert on(fleet, host, f"cat {tree}/model") == "NVIDIA Jetson AGX Orin Developer Kit\0"
    assert on(fleet, host, f"cat {tree}/compatible") == "nvidia,p3737-0000+p3701-0000\0nvidia,tegra234\0"


def test_a_host_is_a_machine(fleet: str) -> None:
    assert on(fleet, "orin-a", "systemctl is-system-running") == "running\n"
    assert on(fleet, "orin-a", "cat /proc/1/comm; hostname; sudo -n id -u") == "systemd\norin-a\n0\n"
    assert on(fleet, "orin-a", "cd /; python3 -c 'import sitecustomize; print(sitecustomize.__file__)'") == (
        "/usr/lib/python3.11/sitecustomize.py\n"
    )
    assert "apport_python_hook" in on(fleet, "orin-a", "cat /usr/lib/python3.11/sitecustomize.py")
    assert on(fleet, "orin-a", "ls /usr/lib/python3.11/EXTERNALLY-MANAGED 2>/dev/null || echo none") == "none\n"
    assert on(fleet, "orin-a", "sudo apt-get check >/dev/null && sudo dpkg --audit && echo sound") == "sound\n"


def test_hosts_share_nothing_personal_and_reach_only_each_other(fleet: str) -> None:
    own = "cat /etc/machine-id /etc/ssh/ssh_host_ed25519_key.pub"
    identities = {line for host in ("orin-a", "orin-b") for line in on(fleet, host, own).splitlines()}
    assert len(identities) == 4
    on(fleet, "orin-a", "sudo touch /etc/only-here")
    assert on(fleet, "orin-b", "test -e /etc/only-here || echo no") == "no\n"
    assert on(fleet, "orin-a", "ip route | grep -c default || true") == "0\n"
    connect = "import socket; socket.create_connection(('192.0.2.1', 80), 5)"
    assert "Network is unreachable" in on(fleet, "orin-a", f'python3 -c "{connect}" 2>&1 || true')


def test_ansible_pings_all_and_becomes_root(fleet: str, tmp_path: Path) -> None:
    result = ansible(fleet, tmp_path, "-m", "ansible.builtin.ping", "--become")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count('"ping": "pong"') == 3


def test_a_changed_host_key_is_refused(fleet: str) -> None:
    known = state_root() / "fleets" / fleet / "known_hosts"
    right = known.read_text()
    lines = right.splitlines()
    swapped = lines[0].split()[0:1] + lines[1].split()[1:]
    known.write_text(" ".join(swapped) + "\n")
    try:
        result = simulator("ssh", "--fleet", fleet, "orin-a", "--", "true", timeout=60)
    finally:
        known.write_text(right)
    assert result.returncode == 255
    assert "Host key verification failed" in result.stderr


def test_the_inventory_takes_variables(fleet: str, tmp_path: Path) -> None:
    extra = tmp_path / "extra.yml"
    extra.write_text("kernel_smoke_tests_device: cpu\nrows:\n  - {machine: x86_64, version: '36.4.7'}\n")
    group = yaml.safe_load(done("inventory", "--fleet", fleet, "--vars", str(extra)))["all"]["children"]["jetsons"]
    assert group["vars"]["kernel_smoke_tests_device"] == "cpu"
    assert group["vars"]["rows"] == [{"machine": "x86_64", "version": "36.4.7"}]
    assert sorted(group["hosts"]) == ["orin-a", "orin-b", "orin-c"]


def test_up_again_changes_nothing_and_a_power_cut_loses_nothing(fleet: str) -> None:
    on(fleet, "orin-b", "echo kept > ~/note")
    before = on(fleet, "orin-b", "cat /etc/machine-id")
    done("power-off", "--fleet", fleet, "orin-b")
    assert "is off" in simulator("ssh", "--fleet", fleet, "orin-b", "--", "true").stderr
    started = time.monotonic()
    done("power-on", "--fleet", fleet, "orin-b")
    assert time.monotonic() - started < 25
    assert on(fleet, "orin-b", "cat ~/note /etc/machine-id") == f"kept\n{before}"
    done("up", "--fleet", fleet)
    assert on(fleet, "orin-b", "cat ~/note") == "kept\n"


def test_exec_enters_as_root_and_gives_the_status(fleet: str) -> None:
    assert done("exec", "--fleet", fleet, "orin-a", "--", "hostname") == "orin-a\n"
    assert simulator("exec", "--fleet", fleet, "orin-a", "--", "sh", "-c", "exit 7").returncode == 7


def test_a_name_that_is_not_there_is_answered_with_the_nearest(fleet: str) -> None:
    result = simulator("ssh", "--fleet", fleet, "orin-aa")
    assert result.returncode == 1
    assert "did you mean 'orin-a'?" in result.stderr


def test_sudo_asks_for_a_password_where_the_definition_says_so(tmp_path: Path, fleet: str) -> None:
    definition = tmp_path / "fleet.yml"
    definition.write_text("hosts:\n  locked: {l4t: '36.4.7', cuda: null, sudo_password: 'two words'}\n")
    done("up", "--fleet", SECOND, "--file", str(definition))
    try:
        assert on(SECOND, "locked", "sudo -n true 2>/dev/null || echo refused") == "refused\n"
        assert on(SECOND, "locked", "echo 'two words' | sudo -S -p '' id -u") == "0\n"
        assert on(SECOND, "locked", "ls -d /usr/local/cuda* 2>/dev/null || echo none") == "none\n"
        result = ansible(SECOND, tmp_path, "-m", "ansible.builtin.command", "-a", "id -u", "--become")
        assert result.returncode == 0, result.stdout + result.stderr
        # two fleets side by side: each answers for itself
        assert on(fleet, "orin-a", "hostname") == "orin-a\n"
    finally:
        done("down", "--fleet", SECOND)
    assert left_behind(SECOND) == []
    assert on(fleet, "orin-a", "hostname") == "orin-a\n"


def test_ten_hosts_start_from_a_snapshot_in_seconds(fleet: str) -> None:
    on(fleet, "orin-a", "sudo mkdir /opt/provisioned && echo yes | sudo tee /opt/provisioned/it")
    on(fleet, "orin-a", "sudo rm /etc/debian_version")
    done("snapshot", "--fleet", fleet, "orin-a", SNAPSHOT)
    assert on(fleet, "orin-a", "cat /opt/provisioned/it; hostname") == "yes\norin-a\n"
    assert SNAPSHOT in done("ls")
    assert "stands on" in simulator("forget", SNAPSHOT).stderr
    started = time.monotonic()
    done("up", "--fleet", SECOND, "--hosts", "10", "--from", SNAPSHOT)
    seconds = time.monotonic() - started
    try:
        assert seconds < 60, "ten hosts from a warm base"
        hosts = [f"orin-{number:02d}" for number in range(1, 11)]
        answers = [on(SECOND, host, "cat /etc/machine-id; cat /opt/provisioned/it; hostname") for host in hosts]
        assert [answer.split()[1:] for answer in answers] == [["yes", host] for host in hosts]
        assert len({answer.split()[0] for answer in answers}) == 10
        assert on(SECOND, "orin-05", "test -e /etc/debian_version || echo gone") == "gone\n"
        on(SECOND, "orin-05", "sudo rm -r /opt/provisioned")
        assert on(SECOND, "orin-06", "cat /opt/provisioned/it") == "yes\n"
    finally:
        done("down", "--fleet", SECOND)
    assert left_behind(SECOND) == []


@pytest.mark.parametrize("seconds", [0.2, 0.35, 0.5, 0.7, 1.0])
def test_down_cleans_up_after_an_up_that_was_killed(seconds: float) -> None:
    command = [sys.executable, "-m", "simulator", "up", "--fleet", CRASHED, "--hosts", "4"]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL) as up:
        time.sleep(seconds)
        up.send_signal(signal.SIGKILL)
    done("down", "--fleet", CRASHED)
    assert left_behind(CRASHED) == []


def test_an_up_that_was_killed_can_be_completed() -> None:
    command = [sys.executable, "-m", "simulator", "up", "--fleet", CRASHED, "--hosts", "2"]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL) as up:
        time.sleep(0.5)
        up.send_signal(signal.SIGKILL)
    done("up", "--fleet", CRASHED, "--hosts", "2")
    assert on(CRASHED, "orin-02", "systemctl is-system-running") == "running\n"
    done("down", "--fleet", CRASHED)
    assert left_behind(CRASHED) == []


def test_down_ends_connections_that_ssh_keeps(tmp_path: Path) -> None:
    done("up", "--fleet", SECOND, "--hosts", "1")
    assert ansible(SECOND, tmp_path, "-m", "ansible.builtin.ping").returncode == 0
    done("down", "--fleet", SECOND)
    assert left_behind(SECOND) == []


def test_down_of_nothing_is_fine() -> None:
    assert simulator("down", "--fleet", CRASHED).returncode == 0


def test_down_finds_a_fleet_whose_files_are_gone(fleet: str) -> None:
    done("up", "--fleet", CRASHED, "--hosts", "1")
    os.rename(state_root() / "fleets" / CRASHED, state_root() / "lost")
    try:
        assert any(line.split()[:3] == [CRASHED, "-", "remnant"] for line in done("ls").splitlines())
        done("down", "--fleet", CRASHED)
    finally:
        subprocess.run(["rm", "-rf", str(state_root() / "lost")], check=True)
    assert left_behind(CRASHED) == []
    assert on(fleet, "orin-a", "hostname") == "orin-a\n"


def test_without_root_the_message_says_so() -> None:
    # imported first: another user need not be able to read this Python
    code = "import os, sys; from simulator.cli import main; os.setuid(65534); "
    code += f"sys.exit(main(['up', '--fleet', '{CRASHED}']))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert "found:    user id 65534" in result.stderr
