"""A simulated fleet of this session's own, and the commands that a user would type against it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLEET = "e2e"
HOSTS = ("orin-a", "orin-b", "orin-c")


@dataclass
class Run:
    """One finished ansible-playbook: exit status, output, and the recap as {host: {ok, changed, …}}."""

    status: int
    output: str
    reports: Path

    @property
    def recap(self) -> dict[str, dict[str, int]]:
        found = {}
        for host, counts in re.findall(r"^(\S+)\s+: (ok=.*)$", self.output, re.MULTILINE):
            found[host] = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", counts)}
        return found

    def report(self, host: str) -> dict[str, Any]:
        """Return the JSON report of a host, keyed by component."""
        (path,) = self.reports.glob(f"*/{host}.json")
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return data


class Fleet:
    """The simulated fleet of this session."""

    def __init__(self, name: str, scratch: Path) -> None:
        self.name = name
        self.scratch = scratch
        self.inventory = ROOT / ".cache" / "simulator" / "inventories" / f"{name}.yml"
        self.runs = 0

    def up(self, description: Path | None = None) -> None:
        """Start the fleet anew, its default hosts or those of a description, and write its inventory."""
        self.simulator("down", "--fleet", self.name)
        argv = [sys.executable, "tools/provision.py", "fleet-up", "--fleet", self.name]
        if description:
            argv += ["--fleet-file", str(description)]
        # its progress is told on standard error; the rest is a table of what is installed anyway
        subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    def down(self) -> None:
        """Remove the fleet."""
        self.simulator("down", "--fleet", self.name)

    def simulator(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of the simulator on this fleet."""
        return subprocess.run(
            [sys.executable, "-m", "simulator", *words], cwd=ROOT, check=check, text=True, capture_output=True
        )

    def root(self, host: str, script: str) -> str:
        """Run a shell script as root on a host, past ssh and Ansible; returns its output."""
        done = self.simulator("exec", "--fleet", self.name, host, "--", "sh", "-euc", script, check=False)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def roots(self, hosts: Iterable[str], script: str) -> dict[str, str]:
        """Run a shell script as root on several hosts, two at a time; returns {host: output}."""
        names = list(hosts)
        with ThreadPoolExecutor(2) as pool:
            return dict(zip(names, pool.map(lambda host: self.root(host, script), names), strict=True))

    def ssh(self, host: str, command: str, check: bool = True) -> str:
        """Run a command over ssh as the fleet's user, as a person would; returns its output."""
        done = self.simulator("ssh", "--fleet", self.name, host, "--", command, check=False)
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def playbook(
        self, playbook: str = "site.yml", *words: str, inventory: Path | None = None, env: dict[str, str] | None = None
    ) -> Run:
        """Run ansible-playbook from the repository's root."""
        process, reports = self.started(playbook, *words, inventory=inventory, env=env)
        try:
            output, _ = process.communicate()
        except BaseException:
            process.kill()
            raise
        print(output)
        return Run(process.returncode, output, reports)

    def started(
        self, playbook: str, *words: str, inventory: Path | None = None, env: dict[str, str] | None = None
    ) -> tuple[subprocess.Popen[str], Path]:
        """Start ansible-playbook from the repository's root; returns the process and where its reports will be."""
        self.runs += 1
        reports = self.scratch / f"reports-{self.runs}"
        argv = [
            str(Path(sys.executable).parent / "ansible-playbook"),
            playbook,
            "-i",
            str(inventory or self.inventory),
            # of this session: what an earlier one has built is not to be found
            *([] if inventory else ["-e", f"wheelhouse_path={self.scratch / 'wheelhouse'}"]),
            *words,
        ]
        print(f"$ {shlex.join(argv)}")
        process = subprocess.Popen(
            argv,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={
                **os.environ,
                "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
                "ANSIBLE_NOCOLOR": "1",
                "LC_ALL": "C.UTF-8",
                "JETSON_MAMBA_REPORTS": str(reports),
                **(env or {}),
            },
        )
        return process, reports


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Return a fleet of three bare hosts; it goes away with the session."""
    assert os.geteuid() == 0, "the simulated fleet needs root"
    made = Fleet(FLEET, tmp_path_factory.mktemp("fleet"))
    made.up()
    yield made
    made.down()


def words(text: str | Sequence[str]) -> str:
    """Return text on one line, for searching what a terminal would wrap."""
    return " ".join(text.split() if isinstance(text, str) else text)
