"""What the start of Python costs: plain, with the import shim, and with the guide's sitecustomize that imports torch.

    python3 benchmarks/startup.py [--python PATH] [--starts N] [--json FILE]

The three are measured in turn, start by start, in venvs made for the purpose from one interpreter, so that whatever
else the machine does meets all of them. `plain again` is a second venv without anything: it shows the noise.
On a busy machine everything costs more, the shim too: measure on a quiet one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "collections"))

# E402: they can be imported only after the line above
from ansible_collections.jetson.mamba.plugins.module_utils import files, shim  # noqa: E402

LIMIT_MS = 1.0

# the guide's file, whole
GUIDE = """# sitecustomize to patch missing torch.distributed APIs
try:
    import torch
    _pairs = ("all_gather_into_tensor", "_all_gather_base"), ("reduce_scatter_tensor", "_reduce_scatter_base")
    for _new, _old in _pairs:
        for _name, _other in ((_new, _old), (_old, _new)):
            if not hasattr(torch.distributed, _name):
                if hasattr(torch.distributed, _other):
                    setattr(torch.distributed, _name, getattr(torch.distributed, _other))
                else:
                    def _dummy(*args, **kwargs):
                        raise RuntimeError("API not available")
                    setattr(torch.distributed, _name, _dummy)
except Exception:
    pass
"""


def clean_environment() -> dict[str, str]:
    """Return this process's environment without Python's own settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def output(python: Path, code: str) -> str:
    """Return what a piece of code prints in an interpreter, or an empty text where it fails."""
    done = subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, check=False, env=clean_environment()
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def make_environment(python: Path, folder: Path, see: str) -> tuple[Path, Path]:
    """Make an empty venv from an interpreter and return (its interpreter, its site-packages).

    Args:
        python: the interpreter that the venv is made from.
        folder: where.
        see: a folder of packages that the venv shall see too, behind its own, or an empty text.
    """
    subprocess.run(
        [str(python), "-m", "venv", "--without-pip", str(folder)], check=True, env=clean_environment(), timeout=120
    )
    site = next(folder.glob("lib/python3*/site-packages"))
    if see:
        (site / "zz-benchmark.pth").write_text(see + "\n")
    return folder / "bin" / "python", site


def start_ms(python: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Return what one start and end of an interpreter takes: (elapsed, CPU time), in milliseconds."""
    begin = time.perf_counter_ns()
    process = os.posix_spawn(python, [str(python), "-c", "pass"], environment)
    _, status, used = os.wait4(process, 0)
    elapsed = (time.perf_counter_ns() - begin) / 1e6
    if status != 0:
        raise SystemExit(f"{python} -c pass ended with status {status}")
    return elapsed, (used.ru_utime + used.ru_stime) * 1e3


def measure(pythons: dict[str, Path], starts: dict[str, int]) -> dict[str, list[tuple[float, float]]]:
    """Return every start's times by variant; the variants take turns, in an order that rotates."""
    environment = clean_environment()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pythons}
    for python in pythons.values():  # bytecode and page cache
        start_ms(python, environment)
        start_ms(python, environment)
    names = list(pythons)
    for turn in range(max(starts.values())):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if turn < starts[name]:
                times[name].append(start_ms(pythons[name], environment))
    return times


def main() -> int:
    """Measure, print a table, and return 1 where the shim costs a millisecond or more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="an interpreter (with torch)")
    parser.add_argument("--starts", type=int, default=200, help="starts for each variant (default 200)")
    parser.add_argument("--guide-starts", type=int, default=7, help="starts with the guide's file (default 7)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    arguments = parser.parse_args()

    torch = output(arguments.python, "import torch, os; print(os.path.dirname(os.path.dirname(torch.__file__)))")
    version = output(arguments.python, "import sys; print('%d.%d.%d' % sys.version_info[:3])")
    with tempfile.TemporaryDirectory(prefix="jetson-mamba-startup-") as scratch:
        pythons: dict[str, Path] = {}
        sites: dict[str, Path] = {}
        for name in ("plain", "plain again", "shim", *(["guide"] if torch else [])):
            folder = Path(scratch) / name.replace(" ", "-")
            pythons[name], sites[name] = make_environment(arguments.python, folder, torch)
        files.ensure_files(shim.wanted_files(str(sites["shim"])), check=False)
        if output(pythons["shim"], "import sys; print('jetson_mamba_shim' in sys.modules)") != "True":
            print("the shim does not load in a venv of this interpreter: nothing measured", file=sys.stderr)
            return 2
        if torch:
            # by a .pth line: where Debian and Ubuntu ship a sitecustomize of their own, a file of that name never runs
            (sites["guide"] / "zzz_guide_sitecustomize.py").write_text(GUIDE)
            (sites["guide"] / "zzz-guide.pth").write_text("import zzz_guide_sitecustomize\n")
        starts = {name: arguments.guide_starts if name == "guide" else arguments.starts for name in pythons}
        times = measure(pythons, starts)

    elapsed = {name: statistics.median(both[0] for both in values) for name, values in times.items()}
    cpu = {name: statistics.median(both[1] for both in values) for name, values in times.items()}
    print(f"Python {version}; medians of {arguments.starts} starts (guide: {arguments.guide_starts}), taken in turn")
    print(f"{'variant':<14}{'elapsed ms':>12}{'more':>10}{'ratio':>8}{'CPU ms':>12}{'more':>10}{'ratio':>8}")
    for name in times:
        cells = [f"{name:<14}"]
        for medians in (elapsed, cpu):
            more, ratio = medians[name] - medians["plain"], medians[name] / medians["plain"]
            cells.append(f"{medians[name]:>12.2f}{more:>10.2f}{ratio:>8.2f}")
        print("".join(cells))
    if not torch:
        print(f"{'guide':<14}  not run: {arguments.python} has no torch (name an interpreter that has: --python PATH)")
    cost = cpu["shim"] - cpu["plain"]
    if arguments.json:
        report = {
            "python": version,
            "elapsed_ms": elapsed,
            "cpu_ms": cpu,
            "shim_cost_ms": cost,
            "limit_ms": LIMIT_MS,
            "times_ms": times,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    # judged by CPU time: on a busy machine the elapsed time is mostly other people's
    print(f"the shim costs {cost:.2f} ms of CPU a start (limit {LIMIT_MS} ms)")
    return 0 if cost < LIMIT_MS else 1


if __name__ == "__main__":
    sys.exit(main())
