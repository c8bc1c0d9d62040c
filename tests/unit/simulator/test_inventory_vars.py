"""simulator/inventory_vars.py: the artefacts' answer becomes ordinary inventory variables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from simulator.inventory_vars import LOCK, RELEASES, inventory_vars, main

ARTEFACTS = {
    "torch_wheel": {"path": "/cache/torch.whl", "sha256": "a" * 64, "version": "2.13.0+cpu", "extra": 1},
    "sources": {
        "causal_conv1d": {"path": "/cache/causal-conv1d", "version": "1.6.0"},
        "mamba_ssm": {"path": "/cache/mamba", "version": "2.2.4"},
    },
}


def test_every_row_is_complete() -> None:
    made = inventory_vars(ARTEFACTS)
    assert [(row["l4t"], row["cuda"]) for row in made["jetson_platform_rows"]] == [
        (["36.4.7"], "12.6"),
        (["36.3.0"], "12.2"),
    ]
    for row in made["jetson_platform_rows"]:
        assert row["torch"] == {"path": "/cache/torch.whl", "sha256": "a" * 64, "version": "2.13.0+cpu"}
        assert row["sm"] == "cpu"
        assert row["machine"] == "x86_64"
        assert row["lock"] == str(LOCK)
    assert made["kernel_smoke_tests_device"] == "cpu"
    assert made["causal_conv1d_source"] == {"kind": "tree", "path": "/cache/causal-conv1d"}
    assert made["mamba_ssm_source"] == {"kind": "tree", "path": "/cache/mamba"}


def test_releases_are_those_of_the_default_fleet(root: Path) -> None:
    fleet = yaml.safe_load((root / "simulator" / "fleets" / "default.yml").read_text())
    hosts = {(host["l4t"], host["cuda"]) for host in fleet["hosts"].values()}
    assert hosts == {(release["l4t"], release["cuda"]) for release in RELEASES}


def test_yaml_keeps_versions_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "artefacts.json").write_text(json.dumps(ARTEFACTS))
    assert main([str(tmp_path / "artefacts.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("---\n")
    assert yaml.safe_load(printed) == inventory_vars(ARTEFACTS)
    assert all(isinstance(row["cuda"], str) for row in yaml.safe_load(printed)["jetson_platform_rows"])


def test_a_missing_artefact_is_an_error() -> None:
    with pytest.raises(KeyError):
        inventory_vars({"torch_wheel": ARTEFACTS["torch_wheel"], "sources": {}})
