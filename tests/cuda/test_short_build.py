"""The short form of the real CUDA build: one cheap kernel of causal_conv1d 1.6.0, by a real nvcc, through the product.

nvcc comes from the package index, pinned: 105 MB, 270 MB unpacked, kept in .cache. torch is the simulator's, without
CUDA: its headers suffice to compile a kernel, and upstream's setup.py is told that it has CUDA. What torch's CUDA
libraries would bring is linked against empty stand-ins, so the result is looked into and not imported.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from simulator.artefacts.pip_settings import read_pip_settings
from simulator.artefacts.sources import SOURCES, check, fetch
from tests.e2e.build_once import frozen
from tests.e2e.conftest import ROOT, Fleet

NAME = f"{os.environ.get('E2E_FLEET', 'e2e')}-nvcc"
HOST = "compiles"
CACHE = ROOT / ".cache" / "nvcc"
# 105 MB in all
COMPILER = """
nvidia-cuda-nvcc==13.0.88 --hash=sha256:56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03
nvidia-nvvm==13.0.88 --hash=sha256:c5f41ffeb6466944a026dfa5317d7d85355c119bbec279205d22f1869d1054e0
nvidia-cuda-crt==13.0.88 --hash=sha256:2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4
nvidia-cuda-runtime==13.0.96 --hash=sha256:7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
nvidia-cuda-cccl==13.0.85 --hash=sha256:e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649
"""
WHEELS = len(COMPILER.split()) // 2
PLATFORMS = [f"manylinux{version}_x86_64" for version in ("2010", "2014", "_2_12", "_2_17", "_2_28")]
CUDA = "/usr/local/cuda-13.0"
STAND_INS = "/srv/stand-ins"
INSTALL = f"""
cd /srv/nvcc
for wheel in *.whl; do python3 -m zipfile -e "$wheel" all; done
chmod 755 all/nvidia/cu13/bin/* all/nvidia/cu13/nvvm/bin/*
mv all/nvidia/cu13 {CUDA}
ln -s lib {CUDA}/lib64
ln -s libcudart.so.13 {CUDA}/lib/libcudart.so
rm -r /srv/nvcc
mkdir {STAND_INS}
for name in c10_cuda torch_cuda; do gcc -shared -x c /dev/null -o {STAND_INS}/lib$name.so; done
"""
# before upstream's first line
HAS_CUDA = """import torch.cuda

torch.cuda._is_compiled = lambda: True
torch.cuda.is_available = lambda: False
torch.version.cuda = "13.0"
"""
HEAVY = """                "csrc/causal_conv1d.cpp",
                "csrc/causal_conv1d_fwd.cu",
                "csrc/causal_conv1d_bwd.cu",
"""
# without torch's headers, which would take longer to read than the kernel to compile
MODULE = """#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "causal_conv1d_cuda", "one kernel", -1, NULL};
PyMODINIT_FUNC PyInit_causal_conv1d_cuda(void) { return PyModule_Create(&definition); }
"""
DEFINE = "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the pinned nvcc is that of x86-64")


def download() -> list[Path]:
    """Return the wheels of the compiler; what is in the cache is checked and not fetched again."""
    CACHE.mkdir(parents=True, exist_ok=True)
    pins = CACHE / "requirements.txt"
    pins.write_text(COMPILER)
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    argv += [word for name in PLATFORMS for word in ("--platform", name)]
    if len(list(CACHE.glob("*.whl"))) < WHEELS:
        print("nvcc and its headers: 105 MB", flush=True)
    subprocess.run([*argv, "--dest", str(CACHE), "--requirement", str(pins)], check=True)
    found = sorted(CACHE.glob("*.whl"))
    assert len(found) == WHEELS, found
    return found


def source_tree(scratch: Path) -> Path:
    """Return upstream's own tree, its setup.py cut to its one cheap kernel."""
    source = next(one for one in SOURCES if one.name == "causal_conv1d")
    sdist = CACHE / source.sdist
    if not sdist.exists():
        fetch(source, sdist, read_pip_settings())
    check(source, sdist)
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch, filter="data")
    tree = scratch / source.root
    setup = (tree / "setup.py").read_text(encoding="utf-8")
    assert setup.count(HEAVY) == 1 and "csrc/causal_conv1d_update.cu" in setup
    light = HEAVY.splitlines(True)[0].replace("causal_conv1d.cpp", "module.cpp")
    (tree / "setup.py").write_text(HAS_CUDA + setup.replace(HEAVY, light), encoding="utf-8")
    (tree / "csrc" / "module.cpp").write_text(MODULE, encoding="utf-8")
    return tree


def playbook(fleet: Fleet, sm: str) -> Path:
    """Write a playbook that has the kernel built for one GPU."""
    build = {
        "component": "causal_conv1d",
        "version": "1.6.0",
        "source": {"kind": "tree", "path": str(fleet.scratch / "causal_conv1d-1.6.0")},
        "build_root": "{{ jetson_platform_plan.paths.build }}",
        "python": "{{ jetson_platform_plan.paths.python }}",
        "cuda_home": CUDA,
        "class_id": "{{ jetson_platform_plan.class_id | regex_replace('-cpu$', '-sm" + sm + "') }}",
        "sm": sm,
        "build_flags": [f"NVCC_APPEND_FLAGS={DEFINE} -arch=sm_90", f"CFLAGS={DEFINE}", f"LIBRARY_PATH={STAND_INS}"],
        "wheelhouse": {"path": str(fleet.scratch / "wheelhouse")},
        "logs": str(fleet.scratch / "logs"),
    }
    folder = {"path": build["build_root"], "state": "directory", "owner": "{{ jetson_platform_plan.user.name }}"}
    tasks = [
        {"name": "Survey and plan", "ansible.builtin.include_role": {"name": "jetson_platform"}},
        {
            "name": "Make the folder of builds",
            "ansible.builtin.file": {**folder, "mode": "0755"},
            "become": True,
        },
        {"name": "Build", "jetson.mamba.build_wheel": build},
    ]
    path = fleet.scratch / f"build-{sm}.yml"
    path.write_text(yaml.safe_dump([{"name": "Build", "hosts": "jetsons", "gather_facts": False, "tasks": tasks}]))
    return path


@pytest.fixture(scope="module")
def compiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Return a fleet of one host with torch, and with a real nvcc beside the toolkit that it pretends to have."""
    assert os.geteuid() == 0, "the simulated fleet needs root"
    wheels = download()
    scratch = tmp_path_factory.mktemp("nvcc")
    source_tree(scratch)
    sending = {"src": "{{ item }}", "dest": "/srv/nvcc/", "mode": "0644"}
    task = {"name": "Send", "ansible.builtin.copy": sending, "loop": [str(wheel) for wheel in wheels], "become": True}
    play = {"name": "Send the compiler", "hosts": "jetsons", "gather_facts": False, "tasks": [task]}
    (scratch / "send.yml").write_text(yaml.safe_dump([play]))
    fleet = Fleet(NAME, scratch)
    try:
        fleet.up(frozen.describe({HOST: "a"}, {}, scratch / "fleet.yml"))
        assert fleet.playbook(frozen.PLAYBOOK).status == 0, "the environment could not be made"
        fleet.root(HOST, "mkdir /srv/nvcc")
        assert fleet.playbook(str(scratch / "send.yml")).status == 0
        fleet.root(HOST, INSTALL)
        yield fleet
    finally:
        fleet.down()


def test_a_gpu_that_this_nvcc_lacks_is_refused_before_anything_compiles(compiles: Fleet) -> None:
    run = compiles.playbook(str(playbook(compiles, "53")))
    assert run.status != 0
    assert re.search(rf"{CUDA}/bin/nvcc cannot\s+compile for sm_53; it knows sm_75, ", run.output)
    assert not list((compiles.scratch / "wheelhouse").glob("*/manifest.json"))


def test_one_kernel_of_upstream_is_compiled_for_one_gpu(compiles: Fleet) -> None:
    run = compiles.playbook(str(playbook(compiles, "87")))
    assert run.status == 0
    (manifest,) = (compiles.scratch / "wheelhouse").glob("*/manifest.json")
    (row,) = json.loads(manifest.read_text(encoding="utf-8"))["wheels"].values()
    assert (row["component"], row["sm"], row["needed"]) == ("causal_conv1d", "87", ["libcudart.so.13"])
    folder = manifest.parent / f"causal_conv1d-{row['key'][:12]}"
    log = (folder / "build.log").read_text(encoding="utf-8")
    # upstream asks for eight GPUs, and the flags for a ninth; what ptxas says names those that it compiled for
    assert set(re.findall(r"code=sm_(\d+)", log)) >= {"75", "80", "90", "100"}
    assert set(re.findall(r"ptxas info\s*: Compiling entry function '\w+' for '(\w+)'", log)) == {"sm_87"}
    with zipfile.ZipFile(folder / row["filename"]) as wheel:
        (library,) = [name for name in wheel.namelist() if name.endswith(".so")]
        code = wheel.read(library)
    for place in ("$ORIGIN/torch/lib", "$ORIGIN/nvidia/cu13/lib"):
        assert place.encode() in code
    # nothing is compiled twice
    again = compiles.playbook(str(playbook(compiles, "87")))
    assert again.status == 0 and again.recap[HOST]["changed"] == 0
