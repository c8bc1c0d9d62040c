"""Runs the kernel smoke tests of an environment and makes one report of them.

The tests themselves (`smoke_components`) run in processes of the environment's own interpreter, started as a user
starts it. A process that dies takes one component with it and no more: that component is reported as failed, and
the rest go on in a fresh process. Nothing is written outside the scratch folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from types import MappingProxyType
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ansible_collections.jetson.mamba.plugins.module_utils import smoke_components
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

SCHEMA = 1
KIND = "jetson.mamba.kernel_smoke_tests"
PASSED, FAILED, NOT_RUN = smoke_components.PASSED, smoke_components.FAILED, smoke_components.NOT_RUN
BUSY = "not tested: busy"
INCOMPLETE = "incomplete"

# each in an interpreter of its own: what they prove depends on what was imported before
ALONE = ("linkage_causal_conv1d_cuda", "linkage_selective_scan_cuda", "torch_distributed_names", "import_mamba_ssm")
FILES = ("installed_files", "binary_machine")
KERNELS = (
    "causal_conv1d_fn",
    "causal_conv1d_seq_idx",
    "causal_conv1d_update",
    "selective_scan_fn",
    "mamba_inner_fn",
    "mamba_module",
    "mamba_generation",
    "selective_state_update",
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    "mamba2_module",
    "torchvision_nms",
)
COMPONENTS = ("environment", *FILES, *ALONE, "device", *KERNELS)
NEEDS_MAMBA = KERNELS[3:-1]

DEVICE_FILES = re.compile(r"^/dev/(nvidia(\d|ctl|-uvm|-modeset)|nvhost-|nvmap|nvgpu|dri/renderD)")
OUT_OF_MEMORY = re.compile(
    r"out of memory|NvMapMemAlloc|NvMapMemHandleAlloc|NVML_SUCCESS == r INTERNAL ASSERT|CUBLAS_STATUS_ALLOC_FAILED"
)
SIGNAL_HINTS: Dict[int, str] = {
    signal.SIGKILL: "the kernel's out-of-memory killer is the usual sender: free memory and verify again",
    signal.SIGILL: "a binary made for another processor is the usual cause",
}


class Settings(NamedTuple):
    """What to test, and with what.

    Args:
        python: absolute path of the environment's interpreter, executed as given.
        device: cuda or cpu.
        dtypes: float32, float16, bfloat16.
        components: names out of COMPONENTS; empty means all.
        torchvision_expected: whether the platform has a torchvision that must work.
        cuda_home: the toolkit's folder that login shells should name; empty: not looked at.
        seed: of all random numbers.
        timeout: seconds a component may take.
        min_free_mb: memory that must be free before a GPU is touched.
        autotune: let Triton try all its tile configurations.
        expected_files: path -> sha256 of files without a RECORD (the shim); absent ones are not complained of.
        scratch: folder under which the scratch folder is made; empty: the system's.
    """

    python: str
    device: str = "cuda"
    dtypes: Tuple[str, ...] = ("float32", "float16", "bfloat16")
    components: Tuple[str, ...] = ()
    torchvision_expected: bool = False
    cuda_home: str = ""
    seed: int = 20260201
    timeout: int = 900
    min_free_mb: int = 1024
    autotune: bool = False
    expected_files: Mapping[str, str] = MappingProxyType({})
    scratch: str = ""


def component_source() -> str:
    """Return the tests' source text; asked of the loader, because on a device this package lies inside a zip."""
    spec = smoke_components.__spec__
    get_source = getattr(spec.loader, "get_source", None) if spec is not None else None
    source = get_source(smoke_components.__name__) if get_source is not None else None
    if not source:
        raise Problem(
            "the source text of the smoke tests (module_utils/smoke_components.py) is not available",
            "the collection jetson.mamba with its Python sources",
            "install the collection again, from sources and not as bytecode only",
        )
    return str(source)


def check_settings(settings: Settings) -> None:
    """Raise Problem for an interpreter that is not there, and for names that do not exist."""
    if not os.path.isfile(settings.python) or not os.access(settings.python, os.X_OK):
        raise Problem(
            f"no interpreter at {settings.python}",
            "the Python of an environment that was installed",
            "provision this host first (site.yml), or correct kernel_smoke_tests_python",
        )
    unknown = [name for name in settings.components if name not in COMPONENTS]
    if unknown:
        raise Problem(
            "unknown component {}".format(", ".join(unknown)),
            "one of: {}".format(", ".join(COMPONENTS)),
            "correct kernel_smoke_tests_components",
        )


# --- results -----------------------------------------------------------------------------------------------------


def make_result(name: str, status: str, message: str, device: str, seconds: float = 0.0) -> Dict[str, Any]:
    """Return a component's row without measurements."""
    return {
        "component": name,
        "status": status,
        "device": device,
        "dtypes": [],
        "shapes_in": None,
        "shapes_out": None,
        "max_error": None,
        "tolerance": None,
        "cases": 0,
        "seconds": round(seconds, 3),
        "message": message,
        "kernels": "",
    }


def from_event(event: Dict[str, Any], device: str) -> Dict[str, Any]:
    """Return a component's row from its result event; says on whose kernels it passed."""
    row = make_result(event["component"], event["status"], event["message"], device, event["seconds"])
    row.update({key: event[key] for key in ("dtypes", "shapes_in", "shapes_out", "max_error", "tolerance", "cases")})
    if event["failures"]:
        row["failures"] = event["failures"]
    if event["component"] in KERNELS and event["status"] in (PASSED, FAILED):
        row["kernels"] = device
        if event["status"] == PASSED and device == "cpu":
            row["message"] = "; ".join(part for part in ("cpu kernels", event["message"]) if part)
    return row


def overall(components: Sequence[Dict[str, Any]], asked: Sequence[str]) -> str:
    """Return passed, failed, busy or incomplete.

    Passed asks that every component was looked at, that none failed and that kernels ran: a subset never passes.
    """
    statuses = [row["status"] for row in components]
    if FAILED in statuses:
        return FAILED
    if BUSY in statuses:
        return "busy"
    ran = any(row["component"] in KERNELS and row["status"] == PASSED for row in components)
    whole = set(asked) == set(COMPONENTS) and {row["component"] for row in components} == set(COMPONENTS)
    return PASSED if ran and whole else INCOMPLETE


# --- what the device is doing ------------------------------------------------------------------------------------


def available_memory_mb(path: str = "/proc/meminfo") -> Optional[int]:
    """Return MemAvailable in MB; on a Jetson it is the GPU's memory too. None where it cannot be read."""
    try:
        with open(path, encoding="ascii", errors="replace") as stream:
            match = re.search(r"^MemAvailable:\s+(\d+) kB", stream.read(), re.MULTILINE)
    except OSError:
        return None
    return int(match.group(1)) // 1024 if match else None


def gpu_holders(proc: str = "/proc", own: Sequence[int] = ()) -> Tuple[List[Dict[str, Any]], int]:
    """Return the processes that hold the GPU open, and how many could not be looked into.

    Args:
        proc: the proc file system.
        own: process ids that are ours.

    Returns:
        rows {pid, command, memory_mb}, the largest first; the number of processes whose files are not readable.
    """
    holders: List[Dict[str, Any]] = []
    hidden = 0
    for name in os.listdir(proc):
        if not name.isdigit() or int(name) in own:
            continue
        folder = os.path.join(proc, name)
        try:
            descriptors = os.listdir(os.path.join(folder, "fd"))
        except OSError as error:
            hidden += error.errno in (errno.EACCES, errno.EPERM)
            continue
        for descriptor in descriptors:
            try:
                target = os.readlink(os.path.join(folder, "fd", descriptor))
            except OSError:
                continue
            if DEVICE_FILES.match(target):
                holders.append(_describe_process(folder, int(name)))
                break
    return sorted(holders, key=lambda row: -row["memory_mb"]), hidden


def _describe_process(folder: str, pid: int) -> Dict[str, Any]:
    command, memory = "?", 0
    try:
        with open(os.path.join(folder, "cmdline"), "rb") as stream:
            words = [word.decode("utf-8", "replace") for word in stream.read(4096).split(b"\0") if word]
        command = " ".join(words)[:120] or command
        with open(os.path.join(folder, "status"), encoding="utf-8", errors="replace") as status:
            match = re.search(r"^VmRSS:\s+(\d+) kB", status.read(), re.MULTILINE)
        memory = int(match.group(1)) // 1024 if match else 0
    except OSError:
        pass  # it has just ended
    return {"pid": pid, "command": command, "memory_mb": memory}


def describe_busy(what: str, holders: Sequence[Dict[str, Any]], hidden: int) -> str:
    """Return the message for a device that cannot be tested now: what is short, and who holds what."""
    if holders:
        held = "the GPU is held by " + ", ".join(
            "pid {} ({}, {} MB)".format(row["pid"], row["command"], row["memory_mb"]) for row in holders[:5]
        )
        if len(holders) > 5:
            held += " and %s more" % (len(holders) - 5)
    else:
        held = "no process was seen to hold the GPU"
    if hidden:
        held += f"; {hidden} processes of other users could not be looked into"
    return f"{what}; {held}; nothing was stopped: end what can be spared and verify again"


# --- the environment component -----------------------------------------------------------------------------------


def login_environment(name: str, scratch: str) -> Optional[str]:
    """Return a variable as the user's login shell has it; None when no shell could be asked."""
    keep = {key: os.environ[key] for key in ("HOME", "USER", "LOGNAME") if key in os.environ}
    keep.update(PATH="/usr/local/bin:/usr/bin:/bin", LC_ALL="C", TMPDIR=scratch)
    try:
        done = subprocess.run(
            ["bash", "-lc", 'printf "\\n%s" "${!0-}"', name],
            env=keep,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    # a profile may print a greeting of its own, so only the last line counts
    return done.stdout.decode("utf-8", "replace").rpartition("\n")[2].strip()


def test_environment(settings: Settings, scratch: str) -> Dict[str, Any]:
    """CUDA_HOME is the configured toolkit for whoever logs in."""
    started = time.monotonic()
    if settings.device != "cuda" or not settings.cuda_home:
        reason = (
            "no CUDA device is under test" if settings.device != "cuda" else "no CUDA_HOME was given to compare with"
        )
        return make_result("environment", NOT_RUN, reason, settings.device)
    problems = []
    if not os.path.isfile(os.path.join(settings.cuda_home, "bin", "nvcc")):
        problems.append(f"{settings.cuda_home} has no bin/nvcc")
    found = login_environment("CUDA_HOME", scratch)
    if found is None:
        problems.append("no login shell could be asked for CUDA_HOME")
    elif os.path.realpath(found or "/nowhere") != os.path.realpath(settings.cuda_home):
        problems.append("CUDA_HOME in a login shell is {}, expected {}".format(found or "not set", settings.cuda_home))
    status = FAILED if problems else PASSED
    message = "; ".join(problems) or f"CUDA_HOME={found}"
    row = make_result("environment", status, message, settings.device, time.monotonic() - started)
    if problems:
        row["failures"] = problems
    return row


# --- processes ---------------------------------------------------------------------------------------------------


def child_environment(settings: Settings, scratch: str) -> Dict[str, str]:
    """Return the environment of the tests: the user's, with every cache in the scratch folder."""
    environment = dict(os.environ)
    environment.update(
        LC_ALL="C",
        PYTHONDONTWRITEBYTECODE="1",
        TMPDIR=scratch,
        XDG_CACHE_HOME=os.path.join(scratch, "cache"),
        HF_HOME=os.path.join(scratch, "hf"),
        HF_HUB_OFFLINE="1",
        TRITON_CACHE_DIR=os.path.join(scratch, "triton"),
        TORCHINDUCTOR_CACHE_DIR=os.path.join(scratch, "inductor"),
        CUDA_CACHE_PATH=os.path.join(scratch, "nv"),
        # glibc fills fresh memory, so that an output on the CPU that nobody wrote is not by chance right
        MALLOC_PERTURB_="1",
    )
    if settings.cuda_home:
        environment.setdefault("CUDA_HOME", settings.cuda_home)
    return environment


class Runner:
    """Runs lists of components in processes and collects their result events."""

    def __init__(self, settings: Settings, scratch: str) -> None:
        self.settings = settings
        self.scratch = scratch
        self.script = os.path.join(scratch, "kernel_smoke_tests.py")
        self.extra: Dict[str, Dict[str, Any]] = {}
        self.rows: Dict[str, Dict[str, Any]] = {}
        with open(self.script, "w", encoding="utf-8") as stream:
            stream.write(component_source())

    def run(self, names: Sequence[str]) -> None:
        """Run these in one process, and in a fresh one again whatever is left after a crash or a time-out."""
        left = list(names)
        while left:
            done = self._process(left)
            # a process that ends before it begins anything must not make us try for ever
            left = left[max(done, 1) :]

    def _process(self, names: Sequence[str]) -> int:
        request = {
            "components": list(names),
            "device": self.settings.device,
            "dtypes": list(self.settings.dtypes),
            "seed": self.settings.seed,
            "torchvision_expected": self.settings.torchvision_expected,
            "autotune": self.settings.autotune,
            "machine": os.uname().machine,
            "kernels": any(name in KERNELS or name == "device" for name in names),
        }
        path = os.path.join(self.scratch, "request.json")
        with open(path, "w", encoding="utf-8") as stream:
            json.dump(request, stream)
        errors = os.path.join(self.scratch, "stderr")
        with open(errors, "wb") as stderr:
            try:
                child = subprocess.Popen(
                    [self.settings.python, self.script, path],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    cwd=self.scratch,
                    env=child_environment(self.settings, self.scratch),
                    start_new_session=True,
                )
            except OSError as error:
                for name in names:
                    message = f"{self.settings.python} could not be started: {error}"
                    self._keep(make_result(name, FAILED, message, self.settings.device))
                return len(names)
        try:
            return self._follow(child, names, errors)
        finally:
            _end(child)

    def _follow(self, child: subprocess.Popen[bytes], names: Sequence[str], errors: str) -> int:
        lines: queue.Queue[Optional[bytes]] = queue.Queue()

        def read() -> None:
            assert child.stdout is not None
            for line in child.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        done, case, started = 0, "", time.monotonic()
        while done < len(names):
            try:
                line = lines.get(timeout=max(0.0, started + self.settings.timeout - time.monotonic()))
            except queue.Empty:
                os.killpg(child.pid, signal.SIGKILL)
                return self._lost(names[done], done, f"no result within {self.settings.timeout} s", case, started, "")
            if line is None:
                code = child.wait()
                return self._lost(names[done], done, describe_exit(code), case, started, tail(errors))
            try:
                event = json.loads(line.decode("utf-8", "replace"))
            except ValueError:
                continue
            if event["event"] == "start":
                case, started = "", time.monotonic()
            elif event["event"] == "case":
                case = event["case"]
            elif event["event"] == "result":
                self.extra[event["component"]] = event["extra"]
                self._keep(from_event(event, self.settings.device))
                done += 1
                case, started = "", time.monotonic()
        return done

    def _lost(self, name: str, done: int, why: str, case: str, started: float, log: str) -> int:
        message = why + (f" during {case}" if case else "") + (f": {log}" if log else "")
        row = make_result(name, FAILED, message, self.settings.device, time.monotonic() - started)
        row["failures"] = [message]
        if name in KERNELS:
            row["kernels"] = self.settings.device
        self._keep(row)
        return done + 1

    def _keep(self, row: Dict[str, Any]) -> None:
        self.rows[row["component"]] = row


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a test process of ours, with whatever it started, and wait for it."""
    if child.poll() is None:
        try:
            child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.stdout is not None:
        child.stdout.close()


def describe_exit(code: int) -> str:
    """Return how a process ended that gave no result."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = "unknown"
        hint = SIGNAL_HINTS.get(-code)
        return "killed by signal {} ({}){}".format(-code, name, f", {hint}" if hint else "")
    return f"ended with status {code} before it gave a result"


def tail(path: str, lines: int = 8, characters: int = 1000) -> str:
    """Return the last words of a log, in one line."""
    try:
        with open(path, "rb") as stream:
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return ""
    crash = text.find("Fatal Python error")
    if crash >= 0:  # the interpreter's own account: the innermost call comes first
        return " | ".join(line.strip() for line in text[crash:].splitlines()[:lines] if line.strip())[:characters]
    return " | ".join(line.strip() for line in text.splitlines()[-lines:] if line.strip())[-characters:]


# --- the whole run -----------------------------------------------------------------------------------------------


def run(settings: Settings) -> Dict[str, Any]:
    """Run the smoke tests and return the report.

    Raises:
        Problem: no such interpreter, or an unknown component.
    """
    check_settings(settings)
    asked = [name for name in COMPONENTS if not settings.components or name in settings.components]
    # resolved now, because the children's TMPDIR has to be absolute
    scratch = os.path.abspath(tempfile.mkdtemp(prefix="jetson-mamba-verify-", dir=settings.scratch or None))
    started = time.monotonic()
    try:
        runner = Runner(settings, scratch)
        if "environment" in asked:
            runner.rows["environment"] = test_environment(settings, scratch)
        runner.run([name for name in FILES if name in asked])
        if "installed_files" in runner.rows:
            check_expected_files(runner.rows["installed_files"], settings.expected_files)
        for name in ALONE:
            if name in asked:
                runner.run([name])
        holders = _run_on_device(runner, asked)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    rows = [runner.rows[name] for name in asked]
    versions = dict(runner.extra.get("installed_files", {}).get("versions", {}))
    versions.update({name: value for name, value in runner.extra.get("device", {}).items() if name == "torch"})
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "overall": overall(rows, asked),
        "device": settings.device,
        "gpu": runner.extra.get("device", {}).get("gpu"),
        "kernels": settings.device,
        "python": settings.python,
        "seed": settings.seed,
        "dtypes": list(settings.dtypes),
        "seconds": round(time.monotonic() - started, 1),
        "versions": versions,
        "holders": holders,
        "components": rows,
    }


def check_expected_files(row: Dict[str, Any], expected: Mapping[str, str]) -> None:
    """Hold files that no RECORD knows (the shim) against their checksums; one that is absent is another's matter."""
    for path, wanted in sorted(expected.items()):
        try:
            with open(path, "rb") as stream:
                found = hashlib.sha256(stream.read()).hexdigest()
        except FileNotFoundError:
            continue
        except OSError as error:
            found = str(error)
        row["cases"] += 1
        if found != wanted:
            problem = f"{path}: sha256 {found}, expected {wanted}"
            row["message"] = problem if row["status"] != FAILED else "{}; {}".format(row["message"], problem)
            row["status"] = FAILED
            row.setdefault("failures", []).append(problem)


def _run_on_device(runner: Runner, asked: Sequence[str]) -> List[Dict[str, Any]]:
    """Look at the device, then run the kernels; returns who holds the GPU when that kept the tests from running."""
    settings = runner.settings
    kernels = [name for name in KERNELS if name in asked]
    if not kernels and "device" not in asked:
        return []
    cuda = settings.device == "cuda"
    if cuda:
        free = available_memory_mb()
        if free is not None and free < settings.min_free_mb:
            return _busy(runner, ["device", *kernels], asked, _short("memory", free, settings.min_free_mb))
    runner.run(["device"])
    look = runner.rows["device"]
    gpu_free = runner.extra.get("device", {}).get("gpu", {}).get("free_mb")
    if cuda and look["status"] == FAILED and OUT_OF_MEMORY.search(look["message"]):
        return _busy(runner, ["device", *kernels], asked, "the GPU could not be opened for lack of memory")
    if cuda and gpu_free is not None and gpu_free < settings.min_free_mb:
        return _busy(runner, kernels, asked, _short("GPU memory", gpu_free, settings.min_free_mb))
    if look["status"] != PASSED:
        for name in kernels:
            runner.rows[name] = make_result(name, NOT_RUN, "the device is not usable (see device)", settings.device)
        return []
    broken = runner.rows.get("import_mamba_ssm", {}).get("status") == FAILED
    blocked = [name for name in kernels if broken and name in NEEDS_MAMBA]
    for name in blocked:
        message = "mamba_ssm cannot be imported (see import_mamba_ssm)"
        runner.rows[name] = make_result(name, NOT_RUN, message, settings.device)
    runner.run([name for name in kernels if name not in blocked])
    starved = [
        name
        for name in kernels
        if cuda and runner.rows[name]["status"] == FAILED and OUT_OF_MEMORY.search(runner.rows[name]["message"])
    ]
    # somebody took the memory while the tests ran; if it is free after all, the failure is the kernel's own
    free = available_memory_mb() if starved else None
    if starved and free is not None and free < settings.min_free_mb:
        return _busy(runner, starved, asked, _short("memory", free, settings.min_free_mb))
    return []


def _short(what: str, free: int, needed: int) -> str:
    return f"{what}: {free} MB free, {needed} MB needed"


def _busy(runner: Runner, names: Sequence[str], asked: Sequence[str], what: str) -> List[Dict[str, Any]]:
    holders, hidden = gpu_holders(own=(os.getpid(),))
    message = describe_busy(what, holders, hidden)
    for name in names:
        if name in asked:
            runner.rows[name] = make_result(name, BUSY, message, runner.settings.device)
    return holders


def failure_message(report: Dict[str, Any]) -> str:
    """Return what a person reads first: which components failed, and why."""
    failed = [row for row in report["components"] if row["status"] == FAILED]
    lines = ["{} of {} components failed:".format(len(failed), len(report["components"]))]
    lines += ["- {}: {}".format(row["component"], row["message"]) for row in failed]
    problem = Problem(
        "\n".join(lines),
        "every component passes on {}".format(report["device"]),
        "put right what the first line names (later ones are often its consequence) and run playbooks/verify.yml again",
    )
    return problem.render()
