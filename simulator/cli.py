"""The command line: ``python -m simulator COMMAND``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from simulator import inventory, requirements
from simulator.errors import Problem
from simulator.manager import Manager
from simulator.namespaces import Namespaces
from simulator.progress import say
from simulator.store import Store, cache_root, write_text


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0 done, 1 a problem that is printed, 130 interrupted."""
    args = _parser().parse_args(argv)
    store = Store(cache_root())
    manager = Manager(store, Namespaces(store))
    try:
        status: int = args.action(manager, args)
        sys.stdout.flush()
        return status
    except Problem as problem:
        print(problem.render(), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what is there can be completed by `up` or removed by `down`", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m simulator", description="A fleet of simulated Jetsons.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fleet = argparse.ArgumentParser(add_help=False)
    fleet.add_argument("--fleet", default="default", metavar="NAME", help="the fleet (default: default)")

    up = commands.add_parser("up", parents=[fleet], help="start a fleet, or complete one that is there")
    which = up.add_mutually_exclusive_group()
    which.add_argument("--file", type=Path, help="a fleet file (default: simulator/fleets/default.yml)")
    which.add_argument("--hosts", type=int, metavar="N", help="N hosts of the default platform instead")
    up.add_argument("--from", dest="snapshot", metavar="SNAPSHOT", help="start the hosts of its platform from it")
    up.set_defaults(action=_up)

    down = commands.add_parser("down", parents=[fleet], help="remove a fleet and all that is left of it")
    down.add_argument("--all", action="store_true", help="every fleet of this cache")
    down.set_defaults(action=_down)

    ls = commands.add_parser("ls", help="list fleets, hosts and snapshots")
    ls.set_defaults(action=_ls)

    ssh = commands.add_parser("ssh", parents=[fleet], help="log in to a host, or run a command on it")
    ssh.add_argument("host")
    ssh.add_argument("remote", nargs=argparse.REMAINDER, metavar="command")
    ssh.set_defaults(action=_ssh)

    enter = commands.add_parser("exec", parents=[fleet], help="run a command as root inside a host, without ssh")
    enter.add_argument("host")
    enter.add_argument("remote", nargs=argparse.REMAINDER, metavar="-- command")
    enter.set_defaults(action=_exec)

    for name, action, text in (
        ("power-off", _power_off, "end all of a host's processes at once, as a power cut does"),
        ("power-on", _power_on, "start a host that is off, with all that it had written"),
    ):
        power = commands.add_parser(name, parents=[fleet], help=text)
        power.add_argument("host")
        power.set_defaults(action=action)

    freeze = commands.add_parser("snapshot", parents=[fleet], help="freeze a host as a layer that others start from")
    freeze.add_argument("host")
    freeze.add_argument("name")
    freeze.set_defaults(action=_snapshot)

    forget = commands.add_parser("forget", help="remove a snapshot")
    forget.add_argument("name")
    forget.set_defaults(action=_forget)

    listing = commands.add_parser("inventory", parents=[fleet], help="print the fleet's Ansible inventory, or write it")
    listing.add_argument("--vars", type=Path, action="append", default=[], metavar="FILE", help="variables to add")
    listing.add_argument("--output", type=Path, metavar="FILE", help="write it there instead (mode 600)")
    listing.set_defaults(action=_inventory)

    needs = commands.add_parser("requirements", help="name the system packages needed, and which are missing")
    needs.add_argument("--install", action="store_true", help="install the missing ones by apt")
    needs.set_defaults(action=_requirements)
    return parser


def _up(manager: Manager, args: argparse.Namespace) -> int:
    fleet = manager.up(args.fleet, args.file, args.hosts, args.snapshot)
    say(f"inventory: {manager.folder(fleet) / 'inventory.yml'}")
    return 0


def _down(manager: Manager, args: argparse.Namespace) -> int:
    for name in manager.remnants() if args.all else [args.fleet]:
        if not manager.down(name):
            say(f"no fleet {name}: nothing to take down")
    return 0


def _ls(manager: Manager, args: argparse.Namespace) -> int:
    del args
    rows = [("FLEET", "HOST", "STATE", "ADDRESS", "L4T", "CUDA", "FROM")]
    known = {fleet.name: fleet for fleet in manager.known()}
    for name in manager.remnants():
        if name not in known:
            rows.append((name, "-", "remnant", "-", "-", "-", "-"))
            continue
        fleet = known[name]
        for host in fleet.hosts:
            state = "off" if manager.backend.pid(fleet.network, host) is None else "on"
            origin = host.spec.snapshot or "base"
            rows.append((name, host.spec.name, state, host.address, host.spec.l4t, host.spec.cuda or "-", origin))
    _table(rows)
    names = manager.store.names(manager.store.snapshots)
    if names:
        print()
        shots = [("SNAPSHOT", "OF", "L4T", "CUDA", "MADE")]
        for name in names:
            data = manager.read_snapshot(name)
            of = f"{data['fleet']}/{data['host']}"
            shots.append((name, of, data["l4t"], data["cuda"] or "-", data["made"]))
        _table(shots)
    return 0


def _ssh(manager: Manager, args: argparse.Namespace) -> int:
    fleet = manager.fleet(args.fleet)
    host = manager.host(fleet, args.host)
    if manager.backend.pid(fleet.network, host) is None:
        raise Problem(f"host {args.host} is off", "a running host", _power_on_hint(args))
    return _become(manager.ssh_command(fleet, host, _without_dashes(args.remote)))


def _exec(manager: Manager, args: argparse.Namespace) -> int:
    fleet = manager.fleet(args.fleet)
    command = _without_dashes(args.remote) or ["bash", "-l"]
    return _become(manager.backend.command(fleet.network, manager.host(fleet, args.host), command))


def _power_off(manager: Manager, args: argparse.Namespace) -> int:
    say(f"{args.host} is off" if manager.power_off(args.fleet, args.host) else f"{args.host} was off already")
    return 0


def _power_on(manager: Manager, args: argparse.Namespace) -> int:
    say(f"{args.host} is on" if manager.power_on(args.fleet, args.host) else f"{args.host} was on already")
    return 0


def _snapshot(manager: Manager, args: argparse.Namespace) -> int:
    manager.snapshot(args.fleet, args.host, args.name)
    say(f"use it: python -m simulator up --fleet NAME --hosts N --from {args.name}")
    return 0


def _forget(manager: Manager, args: argparse.Namespace) -> int:
    manager.forget(args.name)
    return 0


def _inventory(manager: Manager, args: argparse.Namespace) -> int:
    text = manager.inventory(manager.fleet(args.fleet), [inventory.read_variables(path) for path in args.vars])
    if args.output is None:
        print(text, end="")
    else:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.output, text, 0o600)
    return 0


def _requirements(manager: Manager, args: argparse.Namespace) -> int:
    del manager
    lacking = requirements.missing()
    rows = [("PACKAGE", "STATE", "FOR")]
    rows += [(item.package, "missing" if item in lacking else "there", item.why) for item in requirements.REQUIREMENTS]
    _table(rows)
    if lacking and args.install:
        say(f"installing: {' '.join(item.package for item in lacking)}")
        started = time.monotonic()
        requirements.install()
        say(f"installed after {time.monotonic() - started:.0f} s")
        return 0
    return 1 if lacking else 0


def _power_on_hint(args: argparse.Namespace) -> str:
    return f"python -m simulator power-on --fleet {args.fleet} {args.host}"


def _without_dashes(command: list[str]) -> list[str]:
    return command[1:] if command[:1] == ["--"] else command


def _become(command: list[str]) -> int:
    try:
        os.execvp(command[0], command)
    except FileNotFoundError as error:
        raise Problem(f"no command {command[0]}", "the simulator's system packages", requirements.INSTALL) from error


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
