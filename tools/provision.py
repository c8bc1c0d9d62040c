"""What stands behind the Makefile's fleet targets: prepare the simulated fleet where one is wanted, then run Ansible.

With --inventory this is `ansible-playbook site.yml -i INVENTORY` and nothing more: no simulator, no root. Without it
the simulated fleet is prepared first, by the simulator's own commands, each of which does nothing when its work is
already there.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "collections"))

# E402: they can be imported only after the line above
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem  # noqa: E402

PLAYBOOKS: Mapping[str, tuple[str, ...]] = {
    "provision": ("site.yml",),
    "check": ("site.yml", "--check", "--diff"),
    "verify": ("playbooks/verify.yml",),
}
ACTIONS = (*PLAYBOOKS, "prepare", "fleet-up", "fleet-down", "molecule")

Execute = Callable[[Sequence[str], Mapping[str, str], bool], "tuple[int, str]"]


class Failed(Exception):
    """A child ended with an exit status that is not 0; it has said why itself."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def execute(argv: Sequence[str], env: Mapping[str, str], capture: bool) -> tuple[int, str]:
    """Run a command in the repository root.

    Args:
        argv: the command; its standard error, and its output unless captured, go to the terminal as they come.
        env: the whole environment.
        capture: hand its standard output back instead of showing it.

    Returns:
        exit status and captured output ("" where not captured).
    """
    done = subprocess.run(argv, env=env, cwd=ROOT, stdout=subprocess.PIPE if capture else None, text=True, check=False)
    return done.returncode, done.stdout or ""


@dataclass
class Provisioner:
    """One call of a fleet target.

    Args:
        fleet: name of the simulated fleet.
        fleet_file: a fleet description for the simulator, or None for its default fleet.
        inventory: the user's inventory, or None for the simulated fleet.
        args: further words for ansible-playbook (or molecule).
        cache: where the simulator's inputs and the generated inventory are kept.
        run: runs a command; replaced in tests.
        uid: the effective user id.
        platform: sys.platform of the controller.
    """

    fleet: str = "default"
    fleet_file: Path | None = None
    inventory: str | None = None
    args: Sequence[str] = ()
    cache: Path = ROOT / ".cache" / "simulator"
    run: Execute = execute
    uid: int = field(default_factory=os.geteuid)
    platform: str = sys.platform

    @property
    def artefacts_json(self) -> Path:
        return self.cache / "artefacts" / "artefacts.json"

    @property
    def vars_file(self) -> Path:
        return self.cache / "artefacts" / "vars.yml"

    @property
    def simulated_inventory(self) -> Path:
        return self.cache / "inventories" / f"{self.fleet}.yml"

    def do(self, action: str) -> None:
        """Carry out one of ACTIONS.

        Raises:
            Problem: something is missing that only a person can supply.
            Failed: a command failed.
        """
        if action == "fleet-down":
            self.fleet_down()
        elif action == "fleet-up":
            self.fleet_up()
            tell(f"ansible-playbook site.yml -i {relative(self.simulated_inventory)}   # from the root, .venv active")
        elif action == "prepare":
            self.prepare()
        elif action == "molecule":
            self.prepare()
            self.call([tool("molecule"), "test", "--scenario-name", "default", *self.args])
        else:
            self.playbook(action)

    def playbook(self, action: str) -> None:
        """Run the playbook of an action on the user's inventory, or on the simulated fleet."""
        if self.inventory is not None:
            inventory = self.user_inventory()
            if action == "provision":
                tell("a first run compiles once for each kind of device, 40 minutes on an Orin by estimate")
        else:
            self.fleet_up()
            inventory = str(self.simulated_inventory)
            tell(f"{action}: about " + ("5 minutes on bare hosts, then 1" if action == "provision" else "1 minute"))
        self.call([tool("ansible-playbook"), *PLAYBOOKS[action], "-i", inventory, *self.args])

    def user_inventory(self) -> str:
        """Return the inventory that the user named, after seeing that it is there: Ansible itself would only warn."""
        assert self.inventory is not None
        if "," not in self.inventory and not (ROOT / self.inventory).exists():
            raise Problem(
                f"the inventory {self.inventory} does not exist",
                "a file that lists your devices",
                f"cp inventory/jetsons.example.ini {self.inventory}, edit it, then the same command again",
            )
        return self.inventory

    def need_simulator(self) -> None:
        """Refuse to go on where the simulated fleet cannot run, before anything is changed."""
        if self.platform != "linux" or self.uid != 0:
            raise Problem(
                f"user id {self.uid} on {self.platform}",
                "root on Linux: the simulated fleet is made of namespaces and overlay mounts",
                "sudo make …, or your own devices without root: make provision INVENTORY=jetsons.ini",
            )

    def prepare(self) -> None:
        """Make what every simulated fleet needs: system packages, the CPU torch, source trees, inventory variables."""
        self.need_simulator()
        cold = not self.artefacts_json.exists()
        tell("simulated fleet: " + ("first run, 10 to 15 minutes in all" if cold else "inputs cached, about 3 minutes"))
        python = sys.executable
        self.call([python, "-m", "simulator", "requirements", "--install"])
        tell("torch for CPU and the two source trees: " + ("some minutes, once" if cold else "cached"))
        out = self.artefacts_json.parent
        found = self.call([python, "-m", "simulator.artefacts", "--out", str(out)], capture=True)
        write(self.artefacts_json, found)
        write(
            self.vars_file,
            self.call([python, "-m", "simulator.inventory_vars", str(self.artefacts_json)], capture=True),
        )

    def fleet_up(self) -> None:
        """Start the simulated fleet unless it runs, and write its inventory."""
        self.prepare()
        simulator = [sys.executable, "-m", "simulator"]
        description = ["--file", str(self.fleet_file)] if self.fleet_file else []
        tell(f"hosts of the fleet '{self.fleet}': a minute the first time (base system), then seconds")
        self.call([*simulator, "up", "--fleet", self.fleet, *description])
        files = ["--vars", str(self.vars_file), "--output", str(self.simulated_inventory)]
        self.call([*simulator, "inventory", "--fleet", self.fleet, *files])

    def fleet_down(self) -> None:
        """Stop the simulated fleet; nothing of its hosts stays, the cached inputs do."""
        self.need_simulator()
        self.call([sys.executable, "-m", "simulator", "down", "--fleet", self.fleet])
        self.simulated_inventory.unlink(missing_ok=True)

    def call(self, argv: Sequence[str], capture: bool = False) -> str:
        """Run a command, show it, and pass a failure on with its status."""
        tell("$ " + shlex.join(shorten(word) for word in argv))
        status, output = self.run(argv, environment(), capture)
        if status != 0:
            raise Failed(status)
        return output


def environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for children: our Ansible configuration, our tools first, UTF-8 (Ansible insists)."""
    env = dict(os.environ if base is None else base)
    env["ANSIBLE_CONFIG"] = str(ROOT / "ansible.cfg")
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    chosen = env.get("LC_ALL") or env.get("LC_CTYPE") or env.get("LANG") or ""
    if "utf" not in chosen.lower():
        env["LC_ALL"] = "C.UTF-8"
    return env


def tool(name: str) -> str:
    """Return the path of a command of our own virtual environment."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise Problem(f"{path} is missing", "the locked requirements installed", "make, which installs them into .venv")
    return str(path)


def relative(path: Path) -> str:
    """Return a path as a person in the root would type it."""
    return os.path.relpath(path, ROOT) if path.is_relative_to(ROOT) else str(path)


def shorten(word: str) -> str:
    """Return a word of a command line as shown: our interpreter and our paths without what goes without saying."""
    return relative(Path(word)) if word.startswith(f"{ROOT}{os.sep}") else word


def write(path: Path, text: str) -> None:
    """Write a generated file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def tell(text: str) -> None:
    """Say what comes next; standard output belongs to the commands."""
    print(f"==> {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run an action; return 0, the exit status of the command that failed, or 2 for a Problem."""
    parser = argparse.ArgumentParser(prog="tools/provision.py", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("--inventory", help="your own inventory; no simulator is started")
    parser.add_argument("--fleet", default="default", help="name of the simulated fleet")
    parser.add_argument("--fleet-file", type=Path, help="description of the simulated fleet")
    parser.add_argument("--args", default="", help="further words for ansible-playbook, as one string")
    options = parser.parse_args(argv)
    start = time.monotonic()
    try:
        Provisioner(
            fleet=options.fleet,
            fleet_file=options.fleet_file.resolve() if options.fleet_file else None,
            inventory=options.inventory,
            args=shlex.split(options.args),
        ).do(options.action)
    except Problem as problem:
        print(problem.render(), file=sys.stderr)
        return 2
    except Failed as failed:
        tell(f"{options.action} failed after {minutes(time.monotonic() - start)}, exit status {failed.status}")
        return failed.status if failed.status > 0 else 128 - failed.status
    except KeyboardInterrupt:
        tell(f"{options.action} interrupted; run it again to go on where it stopped")
        return 130
    tell(f"{options.action}: done in {minutes(time.monotonic() - start)}")
    return 0


def minutes(seconds: float) -> str:
    """Return a duration in seconds for people, e.g. "2 min 5 s"."""
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


if __name__ == "__main__":
    sys.exit(main())
