"""Inventory variables of the simulated fleet, out of what simulator.artefacts made.

All are ordinary variables that any user of the product may set: own platform rows, an own torch wheel, own source
trees, and the device of the smoke tests.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

LOCK = Path(__file__).resolve().parent / "locks" / "cp311-linux_x86_64.txt"

# The two releases of the default fleet. They differ in CUDA, hence in platform class.
RELEASES: Sequence[Mapping[str, str]] = (
    {"id": "sim-l4t-36.4", "l4t": "36.4.7", "cuda": "12.6", "jetpack": "6.2.1"},
    {"id": "sim-l4t-36.3", "l4t": "36.3.0", "cuda": "12.2", "jetpack": "6.0"},
)


def inventory_vars(artefacts: Mapping[str, Any], lock: Path = LOCK) -> dict[str, Any]:
    """Return the variables that the simulator's inventory sets for all its hosts.

    Args:
        artefacts: the answer of simulator.artefacts: torch_wheel with path, sha256 and version; sources with
            causal_conv1d and mamba_ssm, each with path and version.
        lock: the locked Python requirements of these platforms.

    Raises:
        KeyError: the answer lacks one of these.
    """
    wheel = artefacts["torch_wheel"]
    torch = {key: wheel[key] for key in ("path", "sha256", "version")}
    sources = artefacts["sources"]
    return {
        "kernel_smoke_tests_device": "cpu",
        "jetson_platform_rows": [
            {
                "id": release["id"],
                "jetpack": release["jetpack"],
                "l4t": [release["l4t"]],
                "soc": ["tegra234"],
                "machine": "x86_64",
                "python": "3.11",
                "cuda": release["cuda"],
                "sm": "cpu",
                "torch": dict(torch),
                "torchvision": None,
                "lock": str(lock),
            }
            for release in RELEASES
        ],
        "causal_conv1d_source": {"kind": "tree", "path": sources["causal_conv1d"]["path"]},
        "mamba_ssm_source": {"kind": "tree", "path": sources["mamba_ssm"]["path"]},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the variables as YAML."""
    parser = argparse.ArgumentParser(prog="python -m simulator.inventory_vars", description=__doc__)
    parser.add_argument("artefacts", type=Path, help="file with the output of python -m simulator.artefacts")
    options = parser.parse_args(argv)
    artefacts = json.loads(options.artefacts.read_text(encoding="utf-8"))
    yaml.safe_dump(inventory_vars(artefacts), sys.stdout, explicit_start=True, sort_keys=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
