"""The table of benchmarks/build_once.py: every ratio is to building once with as many hosts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "build_once.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_build_once", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(hosts: int, variant: str, seconds: float, size: int, compiled: int) -> dict[str, object]:
    return {"hosts": hosts, "variant": variant, "seconds": seconds, "bytes": size, "compiled": compiled}


def test_ratios_are_to_building_once_with_as_many_hosts(benchmark: ModuleType) -> None:
    results = [
        row(2, benchmark.ONCE, 100.0, 4_000_000, 2),
        row(2, benchmark.EVERYWHERE, 150.0, 5_000_000, 4),
        row(10, benchmark.ONCE, 200.0, 8_000_000, 2),
        row(10, benchmark.EVERYWHERE, 800.0, 20_000_000, 20),
    ]
    head, *lines = benchmark.table(results)
    assert head.split() == ["hosts", "variant", "wall", "s", "ratio", "MB", "ratio", "compiled", "ratio"]
    assert [line.split() for line in lines] == [
        ["2", "build", "once", "100.0", "1.00", "4.00", "1.00", "2", "1.00"],
        ["2", "every", "host", "150.0", "1.50", "5.00", "1.25", "4", "2.00"],
        ["10", "build", "once", "200.0", "1.00", "8.00", "1.00", "2", "1.00"],
        ["10", "every", "host", "800.0", "4.00", "20.00", "2.50", "20", "10.00"],
    ]


def test_the_machine_is_named(benchmark: ModuleType) -> None:
    assert "processors" in benchmark.machine()
    assert "simulated" in benchmark.machine()
