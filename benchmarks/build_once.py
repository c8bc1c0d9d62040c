"""What building once saves: a fleet provisioned with one wheelhouse against one where every host builds for itself.

    sudo python3 benchmarks/build_once.py [--hosts 2 5 10] [--json FILE]

Runs site.yml on simulated hosts of one platform class that have torch and lack the two extensions: once with a common
wheelhouse, once with a wheelhouse for each host (`wheelhouse_path` per host), side by side for each number of hosts.
Wall time is that of the whole command, tests included; bytes are what went over the hosts' interfaces, both ways.
Nothing is judged: the exit status says only whether it could be measured.

All hosts share the processors of this one machine. Devices have their own, so that there building everywhere takes as
long as building once, and what is saved is compiling: that is the column `compiled`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "collections")]

# E402: they can be imported only after the line above
from tests.e2e.build_once import frozen  # noqa: E402
from tests.e2e.conftest import Fleet  # noqa: E402

ONCE, EVERYWHERE = "build once", "every host"
COLUMNS = ("hosts", "variant", "wall s", "ratio", "MB", "ratio", "compiled", "ratio")
# of every host's interface, both ways, as its kernel counts them
TRAFFIC = "awk '/eth0:/ {print $2 + $10}' /proc/net/dev"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Show what is printed inside, on standard error, only if it ends with an error."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            yield
    except BaseException:
        print(shown.getvalue(), file=sys.stderr)
        raise


def measure(name: str, scratch: Path, snapshots: dict[str, str], hosts: Sequence[str], variant: str) -> dict[str, Any]:
    """Provision a fleet of fresh hosts and return what it took.

    Args:
        name: of the fleet; it is gone afterwards.
        scratch: an empty folder, for the wheelhouses too.
        snapshots: of frozen.freeze().
        hosts: their names.
        variant: ONCE or EVERYWHERE.

    Returns:
        {hosts, variant, seconds, bytes, compiled}.
    """
    fleet = Fleet(name, scratch)
    try:
        fleet.up(frozen.describe(dict.fromkeys(hosts, "a"), snapshots, scratch / "fleet.yml"))
        own = {host: {"wheelhouse_path": str(scratch / host)} for host in hosts} if variant == EVERYWHERE else {}
        common = {"wheelhouse_path": str(scratch / "wheelhouse")}
        inventory = frozen.write_inventory(fleet, scratch / "inventory.yml", hosts, (), common, own)
        before = fleet.roots(hosts, TRAFFIC)
        with quietly():
            begin = time.monotonic()
            run = fleet.playbook("site.yml", inventory=inventory)
            seconds = time.monotonic() - begin
            if run.status != 0:
                raise SystemExit(f"{variant}, {len(hosts)} hosts: site.yml ended with status {run.status}")
        after = fleet.roots(hosts, TRAFFIC)
        return {
            "hosts": len(hosts),
            "variant": variant,
            "seconds": round(seconds, 1),
            "bytes": sum(int(after[host]) - int(before[host]) for host in hosts),
            "compiled": frozen.compiled(fleet, hosts).total(),
        }
    finally:
        fleet.down()


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the results as lines, each number of hosts with its ratios to building once."""
    bases = {row["hosts"]: row for row in results if row["variant"] == ONCE}
    lines = [COLUMNS]
    for row in results:
        base = bases[row["hosts"]]
        cells = [str(row["hosts"]), row["variant"]]
        for key, text in (
            ("seconds", f"{row['seconds']:.1f}"),
            ("bytes", f"{row['bytes'] / 1e6:.2f}"),
            ("compiled", str(row["compiled"])),
        ):
            cells += [text, f"{row[key] / base[key]:.2f}" if base[key] else "-"]
        lines.append(tuple(cells))
    widths = [max(len(line[place]) for line in lines) for place in range(len(COLUMNS))]
    return [
        "  ".join(
            cell.ljust(width) if place == 1 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def machine() -> str:
    """Return what this is run on, in a line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[0]
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return (
        f"{os.cpu_count()} processors, {memory:.0f} GiB, {system}, load {load:.1f} at the start; "
        "all hosts are simulated on this one machine"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 5, 10], help="numbers of hosts (default 2 5 10)")
    parser.add_argument("--fleet", default="bench-once", help="name of the simulated fleet (default bench-once)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args(argv)
    if os.geteuid() != 0:
        parser.error("the simulated fleet needs root")
    on = machine()
    print(f"on {on}", flush=True)
    results = []
    with tempfile.TemporaryDirectory(prefix="jetson-mamba-build-once-") as scratch:
        seeds = Fleet(f"{options.fleet}-seed", Path(scratch))
        try:
            with quietly():
                snapshots = frozen.freeze(seeds.name, Path(scratch), ("a",))
            for count in options.hosts:
                for variant in (ONCE, EVERYWHERE):
                    folder = Path(scratch, f"{count}-{variant.replace(' ', '-')}")
                    folder.mkdir()
                    hosts = [f"orin-{number:02d}" for number in range(1, count + 1)]
                    results.append(measure(options.fleet, folder, snapshots, hosts, variant))
                    print(json.dumps(results[-1]), file=sys.stderr, flush=True)
        finally:
            # of an interrupted run too: what was measured took its time
            if results:
                print("\n".join(table(results)))
            if options.json:
                data = {"machine": on, "results": results}
                options.json.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
            frozen.forget(seeds, ("a",))
    return 0


if __name__ == "__main__":
    sys.exit(main())
