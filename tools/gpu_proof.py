"""Proves the project on one machine with an NVIDIA GPU, in steps that can be repeated and that take minutes each.

    python3 tools/gpu_proof.py STEP... --work FOLDER --out FOLDER [--wheels FOLDER] [--torch-python PYTHON]

Made for a machine that has a torch with CUDA and nvcc, but neither internet nor ssh. Ansible runs there with a local
connection and ordinary variables: the machine's torch and what belongs to it are packed again as wheels, a platform row
(`jetson_platform_rows`) describes a CUDA workstation, and site.yml does the rest. Steps, in this order:

    controller  a venv for Ansible, out of wheels that were carried along (--wheels: folder/wheels, folder/sources)
    wheels      torch, triton and their needs as wheels again, and a lock of the whole environment
    provision   site.yml: build, install, patch, shim, kernel smoke tests; again: the same once more, changed=0
    vision      the role vision_mamba, then tests/on_device/vision_adapter.py
    measure     call paths, the adapter, latency and memory over the length
    upstream    the tests that upstream's own sources carry
    builds      upstream's list of GPUs, as far as this nvcc takes it, against the one GPU of `provision`

A step that was stopped goes on when it is called again: builds outlive the playbook that started them, and site.yml
finds them. Every step leaves its result in WORK/results and a log in WORK/logs; OUT/gpu_proof.json holds all of them,
with `not run` for those that were not. A step that passed is not run again without --repeat.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import datetime
import hashlib
import importlib
import io
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PLUGINS = ROOT / "collections/ansible_collections/jetson/mamba/plugins"
NOT_RUN = "not run"
COMPONENTS = ("causal_conv1d", "mamba_ssm")
# what an environment holds beside the components: carried along as wheels, else packed again from the machine's own
NAMES = (
    *("torch", "triton", "numpy", "einops", "transformers", "tokenizers", "huggingface-hub", "safetensors", "hf-xet"),
    *("filelock", "fsspec", "jinja2", "markupsafe", "networkx", "sympy", "mpmath", "typing-extensions", "packaging"),
    *("pyyaml", "regex", "requests", "certifi", "charset-normalizer", "idna", "urllib3", "tqdm"),
    *("ninja", "setuptools", "wheel", "pip"),
    # the CUDA libraries that no toolkit brings, or brings too old
    *("nvidia-cudnn-cu13", "nvidia-cusparselt-cu13", "nvidia-nccl-cu13", "nvidia-nvshmem-cu13"),
)
COMPILERS = ("nvcc", "cicc", "ptxas", "cudafe++", "fatbinary", "cc1plus", "ld", "g++", "gcc", "ninja")
# what an installer writes beside a distribution's own metadata
INSTALLERS = ("INSTALLER", "REQUESTED", "direct_url.json", "RECORD", "uv_cache.json")
JOB_FOLDER = re.compile(r"/(causal_conv1d|mamba_ssm)-[0-9a-f]{12}(?:/|$)")
RECAP = re.compile(r"^(\S+)\s+: ok=(\d+)\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.M)
Data = dict[str, Any]


class StepFailed(Exception):
    """What went wrong in a step, and where to read more."""


# ---------------------------------------------------------------- wheels out of installed packages


def canonical(name: str) -> str:
    """Return a distribution's name as indexes spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def record_rows(text: str) -> list[tuple[str, str, str]]:
    """Return the rows of a RECORD that a wheel holds: no bytecode, nothing outside the site, no installer's notes."""
    rows = []
    for path, digest, size in csv.reader(text.splitlines()):
        name = path.rsplit("/", 1)[-1]
        noted = ".dist-info/" in path and name in INSTALLERS
        if path.startswith(("../", "/")) or "__pycache__/" in path or noted:
            continue
        rows.append((path, digest, size))
    return rows


def pack_again(site: Path, info: Path, folder: Path) -> Path:
    """Write the wheel from which an installed distribution may have come, uncompressed, and return its path.

    Args:
        site: the site-packages folder.
        info: its .dist-info folder.
        folder: where the wheel goes.
    """
    metadata = (info / "METADATA").read_text(encoding="utf-8", errors="replace")
    name = re.search(r"^Name: (.+)$", metadata, re.M)
    # torch's own version has a local part that its METADATA may lack
    version = re.search(r"^Version: (.+)$", metadata, re.M)
    tags = re.findall(r"^Tag: (\S+)$", (info / "WHEEL").read_text(encoding="utf-8"), re.M)
    if not name or not version or not tags:
        raise StepFailed(f"{info} names no version or no tag")
    parts = [sorted({tag.split("-")[place] for tag in tags}) for place in range(3)]
    stem = f"{canonical(name.group(1)).replace('-', '_')}-{version.group(1).strip()}"
    target = folder / f"{stem}-{'-'.join('.'.join(part) for part in parts)}.whl"
    rows = record_rows((info / "RECORD").read_text(encoding="utf-8"))
    listing = io.StringIO()
    writer = csv.writer(listing, lineterminator="\n")
    partial = target.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
        for path, digest, size in rows:
            if (site / path).is_file():
                archive.write(site / path, path)
                # a machine's image may have changed a file since, such as the list of certificates
                if size and int(size) != (site / path).stat().st_size:
                    raw = hashlib.sha256((site / path).read_bytes()).digest()
                    digest = "sha256=" + base64.urlsafe_b64encode(raw).decode().rstrip("=")
                    size = str((site / path).stat().st_size)
                writer.writerow((path, digest, size))
        writer.writerow((f"{info.name}/RECORD", "", ""))
        archive.writestr(f"{info.name}/RECORD", listing.getvalue())
    os.replace(partial, target)
    return target


def sha256_of(path: Path) -> str:
    """Return the checksum of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------- running things


def plain_environment(further: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment such as a login gives, without what the machine's image adds for its own purposes."""
    kept = {name: os.environ[name] for name in ("HOME", "USER", "LOGNAME", "TERM") if name in os.environ}
    path = "/usr/local/nvidia/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {**kept, "PATH": path, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "PYTHONUNBUFFERED": "1", **(further or {})}


def run(argv: Sequence[str], log: Path, timeout: float, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> int:
    """Run a command with its output in a log; returns its status, 124 where it took too long."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        output.write(("$ " + " ".join(argv) + "\n").encode())
        output.flush()
        try:
            return subprocess.run(
                list(argv), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=timeout, cwd=cwd,
                env=dict(plain_environment() if env is None else env), check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            output.write(f"\n(stopped after {timeout:.0f} s)\n".encode())
            return 124


def tail(path: Path, lines: int = 40) -> str:
    """Return the end of a log."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


class CompilerWatch:
    """While the body runs, notes how much memory the compilers of each build job take together.

    The sum of resident sizes, sampled every 0.2 s: pages that several processes share count several times, and a peak
    between two samples is missed.
    """

    def __init__(self, interval: float = 0.2) -> None:
        self.interval = interval
        self.jobs: dict[str, Data] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> CompilerWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self.interval):
            self._sample()

    def _sample(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        sums: dict[str, list[float]] = {}
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            with contextlib.suppress(OSError, ValueError, IndexError):
                if Path(f"/proc/{entry}/comm").read_text().strip() not in COMPILERS:
                    continue
                match = JOB_FOLDER.search(os.readlink(f"/proc/{entry}/cwd"))
                if match is None:
                    continue
                rss = int(Path(f"/proc/{entry}/statm").read_text().split()[1]) * page / 2**20
                sums.setdefault(match.group(1), []).append(rss)
        for name, sizes in sums.items():
            row = self.jobs.setdefault(name, {"peak_mb": 0.0, "largest_process_mb": 0.0, "most_processes": 0})
            row["peak_mb"] = round(max(row["peak_mb"], sum(sizes)), 1)
            row["largest_process_mb"] = round(max(row["largest_process_mb"], max(sizes)), 1)
            row["most_processes"] = max(row["most_processes"], len(sizes))


# ---------------------------------------------------------------- the proof


class Proof:
    """The steps, and what they share.

    Args:
        options: see main().
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work.resolve()
        self.logs, self.results = self.work / "logs", self.work / "results"
        for folder in (self.logs, self.results, options.out):
            folder.mkdir(parents=True, exist_ok=True)
        self.controller = Path(options.controller or self.work / "controller/bin/python")
        self.inventory, self.variables = self.work / "hosts.ini", self.work / "vars.yml"
        self.reports = self.work / "reports"

    # -- results

    def read(self, step: str) -> Data:
        """Return what a step left, or {status: not run}."""
        try:
            found: Data = json.loads((self.results / f"{step}.json").read_text(encoding="utf-8"))
            return found
        except OSError:
            return {"status": NOT_RUN}

    def write(self, step: str, data: Data) -> None:
        """Keep what a step found, and write the whole anew."""
        (self.results / f"{step}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        whole = {
            "schema": 1,
            "made_at": now(),
            "machine": self.read("machine"),
            "steps": {name: self.read(name) for name in STEPS},
        }
        (self.options.out / "gpu_proof.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        with tarfile.open(self.options.out / "logs.tar.gz", "w:gz") as archive:
            archive.add(self.logs, "logs")

    def step(self, name: str) -> bool:
        """Run one step, keep its result, and return whether it passed."""
        if self.read(name).get("status") == "passed" and not self.options.repeat:
            print(f"{name}: passed before", flush=True)
            return True
        print(f"{name}: …", flush=True)
        started = time.monotonic()
        try:
            found = dict(STEPS[name](self))
            found.setdefault("status", "passed")
        except StepFailed as failure:
            found = {"status": "failed", "message": str(failure)}
        found.update(seconds=round(time.monotonic() - started, 1), at=now())
        self.write(name, found)
        print(f"{name}: {found['status']} in {found['seconds']} s {found.get('message', '')}", flush=True)
        return bool(found["status"] == "passed")

    # -- steps

    def do_controller(self) -> Data:
        """Make a venv for Ansible, and note what machine this is."""
        self.write("machine", describe_machine())
        if self.options.controller:
            return {"python": self.options.controller}
        wheels = sorted(str(path) for path in (self.options.wheels / "wheels").glob("*.whl"))
        log = self.logs / "controller.log"
        venv = [self.options.base_python, "-m", "venv", "--without-pip", str(self.work / "controller")]
        pip = [self.options.torch_python, "-m", "pip", "--python", str(self.controller), "install", "--no-index"]
        if run(venv, log, 60) or run([*pip, "--no-deps", "--no-compile", *wheels], log, 120):
            raise StepFailed(tail(log))
        return {"wheels": [Path(path).name for path in wheels]}

    def do_wheels(self) -> Data:
        """Pack the machine's torch and its needs again as wheels, lock them, put all into the controller's cache."""
        site = Path(self.ask(self.options.torch_python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
        installed = {canonical(path.name.split("-")[0]): path for path in site.glob("*.dist-info")}
        packed, cache = self.work / "wheels", self.work / "cache"
        incoming = cache / "incoming"
        for folder in (packed, incoming):
            folder.mkdir(parents=True, exist_ok=True)
        carried = {canonical(path.name.split("-")[0]): path for path in (self.options.wheels / "runtime").glob("*.whl")}
        chosen: dict[str, Path] = {}
        for name in NAMES:
            if name in carried:
                chosen[name] = Path(shutil.copy(carried[name], packed))
            elif name in installed:
                chosen[name] = pack_again(site, installed[name], packed)
        for path in (self.options.wheels / "sources").glob("*.tar.gz"):
            shutil.copy(path, incoming)
        lines = ["# The environment of this machine: wheels that were carried along, or packed again from what it had."]
        digests = {name: sha256_of(path) for name, path in chosen.items()}
        for name, path in chosen.items():
            if name != "torch":
                lines += [f"# {path.name} {path.stat().st_size}", f"{name}=={path.name.split('-')[1]} \\"]
                lines += [f"    --hash=sha256:{digests[name]}"]
                os.replace(path, incoming / path.name)
        (self.work / "lock.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        # as its METADATA says it, which may lack the local part that torch.__version__ has
        torch = chosen["torch"].name.split("-")[1]
        self._write_inventory({"version": torch, "path": str(chosen["torch"]), "sha256": digests["torch"]})
        return {"torch": torch, "wheels": {name: path.name for name, path in chosen.items()},
                "carried": sorted(carried), "absent": sorted(set(NAMES) - set(chosen))}

    def _write_inventory(self, torch: Data) -> None:
        python = self.options.base_python
        lines = ["[jetsons]", f"workstation ansible_connection=local ansible_python_interpreter={python}"]
        if os.geteuid() == 0 and not shutil.which("sudo"):
            lines += ["", "[jetsons:vars]", "# root itself, on a machine without sudo", "ansible_become_method=su"]
        self.inventory.write_text("\n".join(lines) + "\n", encoding="utf-8")
        short = self.ask(python, "import sys; print('%d.%d' % sys.version_info[:2])")
        row = {
            "id": "cuda-workstation", "l4t": ["none"], "soc": ["any"], "machine": os.uname().machine, "python": short,
            "cuda": self.options.cuda, "sm": self.options.sm, "torch": torch, "torchvision": None,
            "lock": str(self.work / "lock.txt"), "disk_mb": 9000,
        }
        variables = {
            "jetson_platform_rows": [row],
            "jetson_platform_root": str(self.options.root),
            "jetson_platform_cache": str(self.work / "cache"),
            "wheelhouse_path": str(self.work / "wheelhouse"),
            "debian_packages_source": "none",
            # no sshd on this machine
            "cuda_env_ssh": Path("/etc/ssh").exists(),
            "mamba_ssm_version": self.options.mamba,
            "kernel_smoke_tests_device": "cpu" if self.options.sm == "cpu" else "cuda",
            **json.loads(self.options.set),
        }
        self.variables.write_text(json.dumps(variables, indent=1) + "\n", encoding="utf-8")

    def playbook(self, name: str, log: str, timeout: float, *further: str) -> tuple[int, dict[str, int]]:
        """Run a playbook; returns its status and the recap's numbers."""
        path = self.logs / f"{log}.log"
        path.unlink(missing_ok=True)
        before = set(ROOT.glob("reports/*"))
        argv = [str(self.controller), "-m", "ansible", "playbook"]
        argv += ["-i", str(self.inventory), "-e", f"@{self.variables}", *further, name]
        status = run(argv, path, timeout, env=plain_environment({"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}))
        for folder in set(ROOT.glob("reports/*")) - before:
            shutil.copytree(folder, self.reports / log / folder.name, dirs_exist_ok=True)
        recap = RECAP.findall(path.read_text(encoding="utf-8", errors="replace"))
        names = ("ok", "changed", "unreachable", "failed")
        return status, dict(zip(names, map(int, recap[-1][1:]), strict=True)) if recap else {}

    def report(self, log: str) -> Data:
        """Return the host's report of a playbook run, as the project's own callback wrote it."""
        found = sorted((self.reports / log).glob("*/workstation.json"))
        data: Data = json.loads(found[-1].read_text(encoding="utf-8")) if found else {}
        return data

    def do_provision(self) -> Data:
        """From nothing to verified, with site.yml."""
        with CompilerWatch() as watch:
            status, recap = self.playbook("site.yml", "provision", self.options.limit)
        report = self.report("provision")
        found: Data = {
            "recap": recap, "state": report.get("state"), "summary": report.get("summary"),
            "builds": self._builds(watch.jobs), "smoke": smoke_rows(report), "mamba_ssm": self.options.mamba,
            "class_id": (report.get("plan") or {}).get("class_id"),
        }
        if status:
            found.update(status="failed", message=tail(self.logs / "provision.log", 60))
        return found

    def _builds(self, jobs: Mapping[str, Data]) -> Data:
        """Return the manifest's rows of what was built, with the memory that was seen."""
        # what was sampled by earlier runs too: a build may outlast one of them
        kept = self.work / "compilers.json"
        seen: dict[str, Data] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        for name, sampled in jobs.items():
            known = seen.get(name, {})
            seen[name] = {key: max(value, known.get(key, 0)) for key, value in sampled.items()}
        kept.write_text(json.dumps(seen) + "\n", encoding="utf-8")
        found: Data = {}
        for manifest in (self.work / "wheelhouse").glob("*/manifest.json"):
            for row in json.loads(manifest.read_text(encoding="utf-8"))["wheels"].values():
                keys = ("version", "sm", "size", "seconds", "filename", "sha256", "flags")
                found[row["component"]] = {**{key: row.get(key) for key in keys}, **seen.get(row["component"], {})}
        return found

    def do_again(self) -> Data:
        """The same run once more: nothing may change."""
        status, recap = self.playbook("site.yml", "again", self.options.limit)
        found: Data = {"recap": recap, "smoke": smoke_rows(self.report("again"))}
        if status or recap.get("changed") != 0 or recap.get("failed") != 0:
            found.update(status="failed", message=f"changed={recap.get('changed')}, expected 0\n"
                         + tail(self.logs / "again.log", 60))
        return found

    @property
    def env_python(self) -> str:
        """The interpreter of the environment that was provisioned."""
        current = self.options.root / "current"
        if not current.exists():
            envs = sorted((self.options.root / "envs").glob("*/bin/python"))
            if not envs:
                raise StepFailed("nothing is provisioned: run the step provision first")
            return str(envs[0])
        return str(current.resolve() / "bin/python")

    def do_vision(self) -> Data:
        """The adapter through its role, then against the reference."""
        play = self.work / "vision.yml"
        roles = [{"name": "jetson_platform", "tasks_from": "survey.yml"}, {"name": "vision_mamba"}]
        tasks = [{"name": f"Run {role['name']}", "ansible.builtin.include_role": role} for role in roles]
        plays = [{"name": "Vision", "hosts": "jetsons", "gather_facts": False, "tasks": tasks}]
        play.write_text(json.dumps(plays), encoding="utf-8")
        status, recap = self.playbook(str(play), "vision-role", 120, "-e", "vision_mamba_adapter=present")
        if status:
            raise StepFailed(tail(self.logs / "vision-role.log"))
        device = "cpu" if self.options.sm == "cpu" else "cuda"
        log = self.logs / "vision.log"
        log.unlink(missing_ok=True)
        status = run([self.env_python, str(ROOT / "tests/on_device/vision_adapter.py"), "--device", device], log,
                     self.options.limit)
        rows = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        checks = [row for row in rows if "check" in row]
        counts = {kind: sum(row["status"] == kind for row in checks) for kind in {row["status"] for row in checks}}
        found: Data = {"recap": recap, "checks": counts, "summary": rows[-1] if rows else None,
                       "failed": [row for row in checks if row["status"] == "failed"][:20]}
        if status or not counts.get("passed"):
            found.update(status="failed", message=tail(log, 10))
        return found

    def do_measure(self) -> Data:
        """Latencies and memory, in a process of the environment."""
        log, result = self.logs / "measure.log", self.results / "measured.json"
        status = run([self.env_python, __file__, "_measure", "--out", str(result.parent), "--work", str(self.work),
                      "--sm", self.options.sm], log, self.options.limit)
        found: Data = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
        return found if status == 0 else {**found, "status": "failed", "message": tail(log, 30)}

    def do_upstream(self) -> Data:
        """The tests in upstream's sources. mamba's archives hold none."""
        folder = self.work / "upstream"
        folder.mkdir(exist_ok=True)
        found: Data = {"mamba_ssm": {"status": NOT_RUN, "reason": "its source archives hold no tests"}}
        archives = sorted((self.options.wheels / "sources").glob("causal_conv1d-*.tar.gz"))
        site = folder / "site"
        log = self.logs / "upstream.log"
        log.unlink(missing_ok=True)
        wheels = [str(path) for path in (self.options.wheels / "testing").glob("*.whl")]
        install = [self.env_python, "-m", "pip", "install", "--no-index", "--no-deps", "--target", str(site), *wheels]
        if not archives or not wheels or run(install, log, 60):
            raise StepFailed("no archive of causal_conv1d, or no pytest")
        with tarfile.open(archives[-1]) as archive:
            for member in archive:
                if "/tests/" in member.name and member.isfile() and member.name.endswith(".py"):
                    reader = archive.extractfile(member)
                    assert reader is not None
                    (folder / Path(member.name).name).write_bytes(reader.read())
        # every n-th case of each file's list, so that all parameters are met; n is no multiple of their counts
        (folder / "conftest.py").write_text(
            "import os\n\n\ndef pytest_collection_modifyitems(config, items):\n"
            "    items[:] = [item for place, item in enumerate(items) if place % int(os.environ['STRIDE']) == 0]\n")
        argv = [self.env_python, "-m", "pytest", "-q", "-n", "8", "-p", "no:cacheprovider", "--tb=short", str(folder)]
        env = plain_environment({"PYTHONPATH": str(site), "STRIDE": str(self.options.stride)})
        status = run(argv, log, self.options.limit, cwd=folder, env=env)
        text = log.read_text(encoding="utf-8", errors="replace")
        counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", text[-600:])}
        row: Data = {"stride": self.options.stride, **counts, "status": "passed" if status == 0 else "failed"}
        row["failures"] = re.findall(r"^FAILED (.+)$", text, re.M)[:20]
        found["causal_conv1d"] = row
        if status:
            found.update(status="failed", message=f"pytest ended with {status}: {counts}")
        return found

    def do_builds(self) -> Data:
        """Both components for upstream's list of GPUs, one after the other, through the project's own build engine."""
        log, result = self.logs / "builds.log", self.results / "built.json"
        argv = [str(self.controller), __file__, "_builds", "--out", str(result.parent), "--work", str(self.work),
                "--torch-python", self.env_python, "--mamba", self.options.mamba, "--limit", str(self.options.limit)]
        argv += ["--components", self.options.components]
        env = plain_environment({"PYTHONPATH": str(ROOT / "collections")})
        status = run(argv, log, self.options.limit + 30, env=env)
        found: Data = {"upstream": json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}}
        found["one_gpu"] = self.read("provision").get("builds")
        return found if status == 0 else {**found, "status": "failed", "message": tail(log, 20)}

    @staticmethod
    def ask(python: str, code: str) -> str:
        """Return what a piece of code prints in an interpreter."""
        argv = [python, "-c", code]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=plain_environment())
        if done.returncode:
            raise StepFailed(f"{python}: {done.stderr.strip()[-400:]}")
        return done.stdout.strip().splitlines()[-1]


STEPS: dict[str, Callable[[Proof], Data]] = {
    "controller": Proof.do_controller,
    "wheels": Proof.do_wheels,
    "provision": Proof.do_provision,
    "again": Proof.do_again,
    "vision": Proof.do_vision,
    "measure": Proof.do_measure,
    "upstream": Proof.do_upstream,
    "builds": Proof.do_builds,
}


def now() -> str:
    """Return the time, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def describe_machine() -> Data:
    """Return what this machine is: GPU, driver, compiler, system."""

    def first(*argv: str) -> str | None:
        path = f"{os.environ.get('PATH', '')}:/usr/local/nvidia/bin:/usr/local/cuda/bin"
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(list(argv), capture_output=True, text=True, timeout=30, check=False,
                                  env={**os.environ, "PATH": path}, executable=shutil.which(argv[0], path=path))
            lines = [line for line in done.stdout.splitlines() if line.strip()]
            return lines[-1 if argv[0] == "nvcc" else 0].strip() if done.returncode == 0 and lines else None
        return None

    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    return {
        "status": "passed",
        "gpu": first("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"),
        "nvcc": first("nvcc", "--version"),
        "gcc": first("gcc", "--version"),
        "kernel": os.uname().release,
        "machine": os.uname().machine,
        "os": dict(re.findall(r'^(ID|VERSION_ID)="?([^"\n]*)"?$', Path("/etc/os-release").read_text(), re.M)),
        "cpus": os.cpu_count(),
        "memory_mb": int(memory.group(1)) // 1024 if memory else None,
    }


def smoke_rows(report: Mapping[str, Any]) -> Data:
    """Return the smoke tests' verdict and one short row for each component, out of a host's report."""
    verification = report.get("verification") or {}
    keys = ("component", "status", "device", "dtypes", "max_error", "tolerance", "seconds", "message")
    rows = verification.get("components") or []
    if isinstance(rows, Mapping):
        rows = list(rows.values())
    return {
        "overall": verification.get("overall", NOT_RUN),
        "versions": verification.get("versions"),
        "components": [{key: row.get(key) for key in keys} for row in rows],
    }


# ---------------------------------------------------------------- in the controller's venv: upstream's list of GPUs


def build_upstream(options: argparse.Namespace) -> int:
    """Build the components for upstream's list, with the project's own engine; the result goes to OUT/built.json."""
    from ansible_collections.jetson.mamba.plugins.module_utils import build, nvcc_wrapper
    from ansible_collections.jetson.mamba.plugins.plugin_utils import components, sources

    target = options.out / "built.json"
    found: Data = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    variables = json.loads((options.work / "vars.yml").read_text(encoding="utf-8"))
    row = variables["jetson_platform_rows"][0]
    versions: dict[str, str | None] = {"causal_conv1d": "1.6.0", "mamba_ssm": options.mamba, "cuda": row["cuda"]}
    deadline = time.monotonic() + options.limit
    for name in options.components.split(","):
        version = str(versions[name])
        facts = components.find(name, version)
        archive = sources.prepare(
            name, version, variables.get(f"{name}_source"), options.work / "cache", print,
            patch_root=str(ROOT / "files/patches"), companions=versions,
        )
        flags = (f"{nvcc_wrapper.LIST_VARIABLE}={nvcc_wrapper.UPSTREAM_LIST}",)
        key = build.build_key(name, version, archive.sha256, "benchmark", row["sm"], flags)
        request = build.Request(
            component=name, version=version, key=key, source_sha256=archive.sha256, root=str(options.work / "builds"),
            python=options.torch_python,
            cuda_home=f"/usr/local/cuda-{row['cuda']}", sm=row["sm"],
            force_build=facts["force_build"], modules=tuple(facts["provides_modules"]),
            job_memory_mb=facts["job_memory_mb"], disk_mb=facts["disk_mb"], flags=flags,
        )
        folder = Path(request.folder)
        shutil.rmtree(folder, ignore_errors=True)
        for part in ("tmp", "bin", "wheel"):
            (folder / part).mkdir(parents=True)
        build.unpack_source(str(archive.path), archive.sha256, str(folder))
        wrapper = folder / "bin/nvcc"
        wrapper.write_text(nvcc_wrapper.script(sys.executable), encoding="utf-8")
        wrapper.chmod(0o755)
        jobs = max(1, os.cpu_count() or 1)
        started = time.monotonic()
        with CompilerWatch() as watch:
            status = run(
                build.build_command(request), folder / "log", max(1.0, deadline - time.monotonic()), cwd=folder,
                env=build.build_environment(request, jobs),
            )
        seconds = round(time.monotonic() - started, 1)
        text = (folder / "log").read_text(encoding="utf-8", errors="replace")
        listed = sorted({int(number) for number in re.findall(r"code=sm_(\d+)", text)})
        wheels = list((folder / "wheel").glob("*.whl"))
        found[name] = {
            "version": version, "seconds": seconds, "max_jobs": jobs, "asked_for": listed,
            "status": "passed" if status == 0 else "stopped at the time limit" if status == 124 else "failed",
            "size": wheels[0].stat().st_size if wheels else None, **watch.jobs.get(name, {}),
        }
        if wheels:
            found[name]["compiled_for"] = architectures_of(wheels[0])
        elif status not in (0, 124):
            found[name]["message"] = text[-2000:]
        target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name, found[name], flush=True)
    return 0 if all(row["status"] == "passed" for row in found.values()) else 1


def architectures_of(wheel: Path) -> dict[str, Any]:
    """Return {GPU: {cubins, ptx, bytes}} of all libraries in a wheel, by the project's own reader."""
    from ansible_collections.jetson.mamba.plugins.module_utils import fatbin

    found: dict[str, Any] = {}
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.endswith(".so"):
                archive.extract(member, wheel.parent)
                found.update(fatbin.architectures(str(wheel.parent / member)))
    return found


# ---------------------------------------------------------------- in the environment: measuring


def fit_exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Return the slope of log(value) over log(length) by least squares, or None for fewer than two points."""
    rows = [(math.log(length), math.log(value)) for length, value in points if value > 0]
    if len(rows) < 2:
        return None
    mean_x, mean_y = (statistics.fmean(column) for column in zip(*rows, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _y in rows)
    return round(sum((x - mean_x) * (y - mean_y) for x, y in rows) / spread, 3) if spread else None


def spread_of(times: Sequence[float]) -> Data:
    """Return median and quartiles, in the times' own unit."""
    quarters = statistics.quantiles(times, n=4)
    return {"median": round(statistics.median(times), 4), "quartiles": [round(quarters[0], 4), round(quarters[2], 4)],
            "rounds": len(times)}


def compare_calls(calls: Mapping[str, Callable[[], Any]], rounds: int, warm: int = 10) -> Data:
    """Time calls in turn, round by round, so that whatever drifts meets all of them; milliseconds.

    `gpu` is between two events around the call, `wall` is until the GPU is done.
    """
    import torch

    events: dict[str, list[float]] = {name: [] for name in calls}
    walls: dict[str, list[float]] = {name: [] for name in calls}
    cuda = torch.cuda.is_available()
    for place in range(rounds + warm):
        order = list(calls) if place % 2 else list(reversed(list(calls)))
        for name in order:
            if cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
            started = time.perf_counter()
            if cuda:
                begin.record()
            calls[name]()
            if cuda:
                end.record()
                torch.cuda.synchronize()
            elapsed = (time.perf_counter() - started) * 1e3
            if place >= warm:
                walls[name].append(elapsed)
                events[name].append(begin.elapsed_time(end) if cuda else elapsed)
    return {name: {"gpu": spread_of(events[name]), "wall": spread_of(walls[name])} for name in calls}


@contextlib.contextmanager
def direct_path(interface: Any) -> Iterator[None]:
    """Let Mamba call the extension itself with its own arguments, without causal_conv1d's custom operators."""
    import torch

    causal_conv1d_cuda = importlib.import_module("causal_conv1d_cuda")

    def forward(x: Any, weight: Any, bias: Any, seq_idx: Any, initial: Any, final: Any, silu: bool) -> Any:
        out = torch.empty_like(x)
        causal_conv1d_cuda.causal_conv1d_fwd(x, weight, bias, seq_idx, initial, out, final, silu)
        return out

    def backward(x: Any, weight: Any, bias: Any, dout: Any, *rest: Any) -> Any:
        seq_idx, initial, dfinal, dx, _wants_dinitial, silu = rest
        dx = torch.empty_like(x) if dx is None else dx
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        dbias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        causal_conv1d_cuda.causal_conv1d_bwd(
            x, weight, bias, dout, seq_idx, initial, dfinal, dx, dweight, dbias, None, silu)
        return dx, dweight.type_as(weight), None if dbias is None else dbias.type_as(bias), None

    names = ("causal_conv1d_fwd_function", "causal_conv1d_bwd_function")
    kept = [getattr(interface, name) for name in names]
    try:
        for name, function in zip(names, (forward, backward), strict=True):
            setattr(interface, name, function)
        yield
    finally:
        for name, function in zip(names, kept, strict=True):
            setattr(interface, name, function)


def measure_call_path(device: str, rounds: int) -> list[Data]:
    """Mamba's fused function through the patch, and with direct calls of the extension; they must agree bit for bit."""
    import torch
    from mamba_ssm.modules.mamba_simple import Mamba
    from mamba_ssm.ops import selective_scan_interface as interface

    rows = []
    sizes = [(1, 64, 256), (1, 1024, 1024), (4, 2048, 1024)] if device == "cuda" else [(1, 16, 32)]
    for batch, length, width in sizes:
        for kind in (torch.float32, torch.float16, torch.bfloat16) if device == "cuda" else (torch.float32,):
            torch.manual_seed(0)
            model = Mamba(d_model=width, device=device)
            x = torch.randn(batch, length, width, device=device)
            autocast = torch.autocast(device, dtype=kind, enabled=kind is not torch.float32)

            def forward(model: Any = model, x: Any = x, autocast: Any = autocast) -> Any:
                with autocast:
                    return model(x)

            def both(forward: Callable[[], Any] = forward, model: Any = model) -> Any:
                model.zero_grad(set_to_none=True)
                out = forward()
                out.sum().backward()
                return [out.detach(), *(value.grad for value in model.parameters())]

            def inference(forward: Callable[[], Any] = forward) -> None:
                with torch.no_grad():
                    forward()

            def direct(call: Callable[[], Any]) -> Callable[[], Any]:
                def wrapped() -> Any:
                    with direct_path(interface):
                        return call()
                return wrapped

            ours, theirs = both(), direct(both)()
            largest = max(float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-30))
                          for a, b in zip(ours, theirs, strict=True))
            row: Data = {"batch": batch, "length": length, "d_model": width, "dtype": str(kind).split(".")[1],
                         "largest_relative_difference": largest}
            for what, call in (("forward", inference), ("forward_backward", both)):
                row[what] = compare_calls({"patched": call, "direct": direct(call)}, rounds)
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def adapter_calls(device: str, kind: Any, batch: int, dim: int, length: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return {forward, backward: {adapter, direct}}: one scan through the adapter and through mamba's extension."""
    import torch

    direct = importlib.import_module("selective_scan_cuda")
    adapter = importlib.import_module("selective_scan_cuda_core")
    torch.manual_seed(0)
    states = 16

    def normal(*shape: int, of: Any = kind) -> Any:
        return torch.randn(*shape, device=device, dtype=torch.float32).to(of)

    u, delta = normal(batch, dim, length), normal(batch, dim, length) * 0.5
    a = -torch.rand(dim, states, device=device) - 0.2
    b, c = normal(batch, 1, states, length), normal(batch, 1, states, length)
    d, bias = normal(dim, of=torch.float32), normal(dim, of=torch.float32)
    _out, x, *_rest = direct.fwd(u, delta, a, b, c, d, None, bias, True)
    dout = normal(batch, dim, length)
    return {
        "forward": {
            "adapter": lambda: adapter.fwd(u, delta, a, b, c, d, bias, True, 1),
            "direct": lambda: direct.fwd(u, delta, a, b, c, d, None, bias, True),
        },
        "backward": {
            "adapter": lambda: adapter.bwd(u, delta, a, b, c, d, bias, dout, x, True, 1),
            "direct": lambda: direct.bwd(u, delta, a, b, c, d, None, bias, dout, x, None, None, True, False),
        },
    }


def measure_adapter(device: str, rounds: int) -> list[Data]:
    """VMamba's extension as the adapter gives it, against mamba's own called directly, forward and backward."""
    import torch

    rows = []
    sizes = [(1, 192, 784), (8, 384, 3136)] if device == "cuda" else [(1, 8, 16)]
    for batch, dim, length in sizes:
        for kind in (torch.float32, torch.float16) if device == "cuda" else (torch.float32,):
            row: Data = {"batch": batch, "dim": dim, "length": length, "dtype": str(kind).split(".")[1]}
            for what, pair in adapter_calls(device, kind, batch, dim, length).items():
                row[what] = compare_calls(pair, rounds)
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def measure_scaling(device: str, rounds: int, budget: float, save: Callable[[Data], None]) -> Data:
    """Latency and peak memory of one block of Mamba, Mamba2 and causal attention over the length, batch 1."""
    import torch
    import torch.nn.functional as functional
    from mamba_ssm.modules.mamba2 import Mamba2
    from mamba_ssm.modules.mamba_simple import Mamba

    width, heads = (1024, 16) if device == "cuda" else (64, 4)
    lengths = [1024 << place for place in range(7)] if device == "cuda" else [64, 128]
    kind = torch.bfloat16 if device == "cuda" else torch.float32

    class Attention(torch.nn.Module):
        """Causal self-attention with the projections that a block has."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)

        def forward(self, x: Any) -> Any:
            q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(y.transpose(1, 2).reshape(x.shape))

    def mamba2() -> Any:
        return Mamba2(d_model=width, d_state=64, headdim=64)

    makers: dict[str, Callable[[], Any]] = {"Mamba": lambda: Mamba(d_model=width), "attention": Attention}
    if device == "cuda":
        makers["Mamba2"] = mamba2
    found: Data = {"d_model": width, "dtype": str(kind).split(".")[1], "batch": 1, "heads": heads, "blocks": {}}
    deadline = time.monotonic() + budget
    for name, maker in makers.items():
        torch.manual_seed(0)
        model = maker().to(device)
        parameters = sum(value.numel() for value in model.parameters())
        rows: list[Data] = []
        for length in lengths:
            if time.monotonic() > deadline:
                rows.append({"length": length, "status": NOT_RUN, "reason": "out of time"})
                continue
            x = torch.randn(1, length, width, device=device)

            def forward(model: Any = model, x: Any = x) -> Any:
                with torch.autocast(device, dtype=kind, enabled=device == "cuda"):
                    return model(x)

            def inference(forward: Callable[[], Any] = forward) -> None:
                with torch.no_grad():
                    forward()

            def both(forward: Callable[[], Any] = forward, model: Any = model) -> None:
                model.zero_grad(set_to_none=True)
                forward().sum().backward()

            row: Data = {"length": length}
            try:
                for what, call in (("forward", inference), ("forward_backward", both)):
                    call()
                    if device == "cuda":
                        torch.cuda.synchronize()
                        before = torch.cuda.memory_allocated()
                        torch.cuda.reset_peak_memory_stats()
                        call()
                        torch.cuda.synchronize()
                        row[f"{what}_peak_mb"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)
                    row[what] = compare_calls({"call": call}, rounds, warm=3)["call"]
            except torch.cuda.OutOfMemoryError as error:
                row.update(status="out of memory", reason=str(error)[:200])
            rows.append(row)
            print(name, json.dumps(row), flush=True)
        block: Data = {"parameters": parameters, "rows": rows, "exponents": {}}
        for what in ("forward", "forward_backward"):
            for label, floor in (("all", 0), ("from_8k", 8192)):
                at = [row for row in rows if what in row and row["length"] >= floor]
                block["exponents"][f"{what}_latency_{label}"] = fit_exponent(
                    [(row["length"], row[what]["gpu"]["median"]) for row in at])
                block["exponents"][f"{what}_memory_{label}"] = fit_exponent(
                    [(row["length"], row[f"{what}_peak_mb"]) for row in at if f"{what}_peak_mb" in row])
        found["blocks"][name] = block
        save(found)
        del model
    return found


def measure(options: argparse.Namespace) -> int:
    """Measure in this process; OUT/measured.json grows part by part, so that a stopped run keeps what it has."""
    import torch

    device = "cpu" if options.sm == "cpu" else "cuda"
    rounds = 100 if device == "cuda" else 5
    found: Data = {
        "versions": {name: __import__(name).__version__ for name in ("torch", "triton", "causal_conv1d", "mamba_ssm")},
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "unit": "milliseconds; MiB",
    }

    def save() -> None:
        (options.out / "measured.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def keep_scaling(data: Data) -> None:
        found["scaling"] = data
        save()

    failures = []
    parts: dict[str, Callable[[], Any]] = {
        "call_path": lambda: measure_call_path(device, rounds),
        "adapter": lambda: measure_adapter(device, rounds),
        "scaling": lambda: measure_scaling(device, 20 if device == "cuda" else 3, 150, keep_scaling),
    }
    for name, part in parts.items():
        try:
            found[name] = part()
        except Exception as error:
            failures.append(name)
            found[name] = {"status": "failed", "message": f"{type(error).__name__}: {error}"}
            print(name, found[name], flush=True)
        save()
    return 1 if failures else 0


def main(arguments: Sequence[str]) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", help=", ".join(STEPS))
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu-proof"), help="what is needed between steps")
    parser.add_argument("--out", type=Path, default=Path("gpu-proof"), help="results")
    parser.add_argument("--wheels", type=Path, default=ROOT.parent, help="holds wheels/, runtime/, testing/, sources/")
    parser.add_argument("--torch-python", default=sys.executable, help="the interpreter that has torch")
    parser.add_argument("--base-python", default="/usr/bin/python3", help="the system's Python of the same version")
    parser.add_argument("--controller", default="", help="a Python that has Ansible; made from wheels where empty")
    parser.add_argument("--root", type=Path, default=Path("/opt/jetson-mamba"), help="jetson_platform_root")
    parser.add_argument("--cuda", default="13.0", help="of the toolkit and of torch, or none")
    parser.add_argument("--sm", default="90", help="the GPU's number, or cpu")
    parser.add_argument("--mamba", default="2.2.4", help="version of mamba_ssm")
    parser.add_argument("--set", default="{}", help="further variables of the project, as JSON")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds that one step may take")
    parser.add_argument("--stride", type=int, default=7, help="take every n-th of upstream's tests")
    parser.add_argument("--components", default=",".join(COMPONENTS), help="what the step builds compiles")
    parser.add_argument("--repeat", action="store_true", help="run steps again that passed")
    options = parser.parse_args(arguments)
    if options.steps == ["_measure"]:
        return measure(options)
    if options.steps == ["_builds"]:
        return build_upstream(options)
    unknown = [name for name in options.steps if name not in STEPS]
    if unknown:
        parser.error(f"no step {', '.join(unknown)}; there are {', '.join(STEPS)}")
    proof = Proof(options)
    passed = [proof.step(name) for name in options.steps]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
