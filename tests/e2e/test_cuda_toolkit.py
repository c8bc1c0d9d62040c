"""A device without the wanted CUDA toolkit: named by the preflight, looked for before any change, then installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import ROOT, Fleet, words

NAME = "e2e-cuda"
HOST = "bare"
# an apt source like NVIDIA's, with a package that holds what identifies a toolkit
APT_SOURCE = r"""
mkdir -p /srv/apt/pool/DEBIAN /srv/apt/pool/usr/local/cuda-12.6/bin /srv/apt/pool/usr/local/cuda-12.6/lib64
cd /srv/apt
printf '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}\n' > pool/usr/local/cuda-12.6/version.json
printf '#!/bin/sh\nexit 1\n' > pool/usr/local/cuda-12.6/bin/nvcc; chmod 755 pool/usr/local/cuda-12.6/bin/nvcc
printf 'Package: cuda-toolkit-12-6\nVersion: 12.6.11-1\nArchitecture: all\nMaintainer: test <t@example.org>\n'\
'Description: stand-in for the toolkit\n' > pool/DEBIAN/control
dpkg-deb --build --root-owner-group pool cuda-toolkit-12-6.deb > /dev/null
{ dpkg-deb --field cuda-toolkit-12-6.deb; echo "Filename: ./cuda-toolkit-12-6.deb"
  echo "Size: $(stat -c %s cuda-toolkit-12-6.deb)"
  echo "SHA256: $(sha256sum cuda-toolkit-12-6.deb | cut -d' ' -f1)"; echo; } > Packages
rm -rf pool /etc/apt/sources.list /etc/apt/sources.list.d/*
echo 'deb [trusted=yes] file:/srv/apt ./' > /etc/apt/sources.list
apt-get update > /dev/null
"""
PLAYBOOK = [
    {"name": "CUDA alone", "hosts": "jetsons", "gather_facts": False, "roles": ["jetson_platform", "cuda_env"]},
]


INSTALL = ("-e", "cuda_env_install=true")
# the apt source above is reached on the device only
OWN_APT = (*INSTALL, "-e", "debian_packages_source=device")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Return a fleet of one host, which has no CUDA toolkit but an apt source that holds one."""
    scratch = tmp_path_factory.mktemp("cuda")
    (scratch / "fleet.yml").write_text(yaml.safe_dump({"hosts": {HOST: {"l4t": "36.4.7", "cuda": None}}}))
    (scratch / "cuda.yml").write_text(yaml.safe_dump(PLAYBOOK))
    made = Fleet(NAME, scratch)
    made.simulator("down", "--fleet", NAME)
    up = [sys.executable, "tools/provision.py", "fleet-up", "--fleet", NAME, "--fleet-file", str(scratch / "fleet.yml")]
    subprocess.run(up, cwd=ROOT, check=True)
    made.root(HOST, APT_SOURCE)
    yield made
    made.simulator("down", "--fleet", NAME)


def playbook(bare: Fleet, *more: str) -> tuple[int, str, int]:
    """Run the CUDA role alone; returns exit status, output and the number of changes."""
    run = bare.playbook(str(Path(bare.scratch) / "cuda.yml"), *more)
    return run.status, words(run.output), run.recap[HOST]["changed"]


def test_a_missing_toolkit_is_refused_with_the_package_to_install(bare: Fleet) -> None:
    status, output, changed = playbook(bare)
    assert status != 0
    assert changed == 0
    assert "none under /usr/local" in output
    assert "cuda-toolkit-12-6" in output
    assert "cuda_env_install=true" in output


def toolkit(bare: Fleet) -> str:
    """Return whether the host has a toolkit."""
    return bare.root(HOST, "test -e /usr/local/cuda-12.6 && echo there || echo absent").strip()


@pytest.mark.parametrize("stage", ["fetch", "role"])
def test_what_the_controller_cannot_reach_ends_the_run_before_any_change(bare: Fleet, stage: str) -> None:
    """Where it is fetched ahead as well as where the role is used alone."""
    if stage == "fetch":
        run = bare.playbook("playbooks/fetch.yml", *INSTALL)
        status, output, changed = run.status, words(run.output), run.recap[HOST]["changed"]
    else:
        status, output, changed = playbook(bare, *INSTALL)
    assert status != 0
    assert changed == 0
    assert "file:/srv/apt" in output
    assert "debian_packages_source: device" in output
    assert toolkit(bare) == "absent"


def test_check_says_that_it_would_be_installed(bare: Fleet) -> None:
    status, output, changed = playbook(bare, "--check", "--diff", *OWN_APT)
    assert status == 0
    assert changed > 0
    assert "+cuda-toolkit-12-6 12.6.11-1" in output
    assert toolkit(bare) == "absent"


def test_a_check_of_the_fetch_names_it_too(bare: Fleet) -> None:
    run = bare.playbook("playbooks/fetch.yml", "--check", *OWN_APT)
    assert run.status == 0
    assert run.recap[HOST]["changed"] == 0
    assert "own apt would fetch" in run.output
    assert "cuda-toolkit-12-6" in run.output


def test_it_is_installed_where_the_setting_says_so(bare: Fleet) -> None:
    status, _output, changed = playbook(bare, *OWN_APT)
    assert status == 0
    assert changed > 0
    assert toolkit(bare) == "there"
    assert "CUDA_HOME=/usr/local/cuda-12.6" in bare.ssh(HOST, "env")
    again, _output, changes = playbook(bare, *OWN_APT)
    assert again == 0
    assert changes == 0
