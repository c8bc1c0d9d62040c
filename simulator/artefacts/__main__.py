"""Prepares what the simulated fleet installs, and prints where it is: `python -m simulator.artefacts --out DIR`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simulator.artefacts import cache, sources, torch_wheel
from simulator.errors import Problem


def prepare(out: Path) -> dict[str, Any]:
    """Prepare the torch wheel and the source trees; instant when they are there already.

    Args:
        out: the folder for them; made when absent.
    Returns:
        {"torch_wheel": {"path", "sha256", "version"}, "sources": {NAME: {"path", "version"}}}, paths absolute.
    Raises:
        Problem: something could not be had.
    """
    out = out.resolve()
    with cache.locked(out):
        wheel = torch_wheel.prepare(out)
        trees = {source.name: (sources.prepare(source, out), source.version) for source in sources.SOURCES}
    return {
        "torch_wheel": {"path": str(wheel.path), "sha256": wheel.sha256, "version": wheel.version},
        "sources": {name: {"path": str(path), "version": version} for name, (path, version) in trees.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m simulator.artefacts", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to prepare them in")
    try:
        print(json.dumps(prepare(parser.parse_args(arguments).out), indent=2))
    except Problem as problem:
        print(problem.render(), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
