"""Build jobs on a device: start one that outlives the connection, follow it, judge the wheel that comes out.

A job is a folder <build root>/<component>-<first 12 digits of the key>/:

    lock      held (flock) by the runner and by pip; whoever finds it free knows that the job ended or died
    job.json  what was asked for and the exact command; pid.json: the runner, with its start time
    src/      the unpacked source, built in place, so that ninja goes on where a dead build stopped
    log       everything that the command printed; rc.json: how it ended, written last
    wheel/    the result; result.json: what it was found to be
    bin/nvcc  the compiler that torch is given; tmp/: temporary files
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import sys
import tarfile
import time
from typing import Any, Dict, Iterator, List, NamedTuple, NoReturn, Optional, Sequence, Tuple

from ansible_collections.jetson.mamba.plugins.module_utils import (
    build_runner,
    environment,
    files,
    inspection,
    nvcc_wrapper,
    swap,
)
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

# part of every key: a change in how wheels are made, such as another rpath, makes other wheels
RECIPE = 2
TAIL_LINES = 40
# The extension finds libc10 and its like whatever was imported first; the linker must see this dollar sign.
RPATH = "-Wl,-rpath,$ORIGIN/torch/lib"
# Where the CUDA runtime's own wheels put libcudart, for a torch that comes with them (CUDA 13, then 12). On a Jetson
# neither folder exists, and the linker's cache knows the toolkit's.
CUDA_RPATH = RPATH + ":$ORIGIN/nvidia/cu13/lib:$ORIGIN/nvidia/cuda_runtime/lib"
# upstream asks nvcc to compile for so many GPUs of its list at a time
UPSTREAM_THREADS = 4

_FLAG = re.compile(r"^([A-Z][A-Z0-9_]*)=(.*)$", re.S)
_OWN_VARIABLES = frozenset(
    (
        *("PATH", "HOME", "TMPDIR", "CUDA_HOME", "MAX_JOBS", "PYTORCH_NVCC"),
        *(nvcc_wrapper.NVCC_VARIABLE, nvcc_wrapper.SM_VARIABLE),
    )
)
_NINJA = re.compile(r"^\s*\[(\d+)/(\d+)\]\s", re.M)
_COMPILE = re.compile(r"^ *(?:\S*/)?(?:\S*(?:gcc|g\+\+|clang|clang\+\+|nvcc)(?:-\d+)?|cc|c\+\+)(?: .*)? -c ", re.M)
_COMPILE_LINE = re.compile(_COMPILE.pattern + ".*$", re.M)
# from here on pip repeats its own command and says nothing about the compiler's trouble
_PIP_NOISE = re.compile(r"^\s*(?:error: )?subprocess-exited-with-error", re.M)
_FAILED_NINJA = re.compile(r"^\s*FAILED:.*\n\s*(\S.*)$", re.M)
_FAILED_SETUPTOOLS = re.compile(r"^\s*error: [Cc]ommand '?(.+?)'? failed with exit (?:code|status) \d+", re.M)
# what the shell, gcc, nvcc, its parts, ninja, pip and Python say of a process that the kernel has killed, or that was
# refused memory; a compiler's own message that quotes such a word is none of these
_KILLED = re.compile(
    r"^\s*Killed\b|Killed signal terminated program|internal compiler error: Killed|died due to signal 9\b|"
    r"failed with exit (?:code|status) (?:137|-9)\b|^[\s│╰─>]*exit code: (?:137|-9)\s*$|"
    r"terminate called after throwing an instance of 'std::bad_alloc'|"
    r"^\s*(?:\S+: )?out of memory allocating \d+ bytes|^\s*(?:\S+: )?virtual memory exhausted|"
    r"LLVM ERROR: out of memory|"
    r"^\s*ptxas fatal\s*: Memory allocation failure|\[Errno 12\] Cannot allocate memory|"
    r"^\s*(?:ninja: fatal: |fatal error: |\S+: )(?:\S+: )?Cannot allocate memory",
    re.M,
)
_COMPILER_ERROR = re.compile(r"\berror(?: #\d+(?:-D)?)?: |^\s*(?:error|fatal)\s+: ", re.M)
# Linux has this scheme for every Python, whatever a distribution makes of the others
_USER_SCRIPTS = "import json, sysconfig; print(json.dumps(sysconfig.get_path('scripts', 'posix_user')))"
_PYTHON_VERSION = "import json, sys; print(json.dumps('%d.%d' % sys.version_info[:2]))"


def build_key(
    component: str, version: str, source_sha256: str, class_id: str, sm: str, flags: Sequence[str]
) -> str:
    """Return the digest of everything that a wheel is made from.

    Args:
        component: such as mamba_ssm.
        version: of the component.
        source_sha256: digest of the packed source.
        class_id: what a binary needs of its host.
        sm: the GPU's number ("87"), or "cpu".
        flags: NAME=VALUE settings of the build; their order does not matter.

    Returns:
        64 hex digits.
    """
    inputs = {
        "recipe": RECIPE,
        "component": component,
        "version": version,
        "source": source_sha256,
        "class": class_id,
        "sm": str(sm),
        "flags": sorted(flags),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode("utf-8")).hexdigest()


class Request(NamedTuple):
    """What shall be built, where and with what.

    Args:
        root: the folder of all build jobs.
        python: the interpreter of the environment that the wheel is for.
        cuda_home: the CUDA toolkit; not used where sm is "cpu".
        force_build: the variable that keeps setup.py from downloading a wheel.
        modules: extension modules that the wheel must hold.
        job_memory_mb: memory of one compiler process.
        disk_mb: free space that the build needs.
        max_jobs: compilers at a time; 0 means as many as the free memory holds.
        flags: NAME=VALUE settings of the build.
        user: the environment is the user's site of a Python that others use too.
    """

    component: str
    version: str
    key: str
    source_sha256: str
    root: str
    python: str
    cuda_home: str
    sm: str
    force_build: str
    modules: Tuple[str, ...]
    job_memory_mb: int
    disk_mb: int
    max_jobs: int = 0
    flags: Tuple[str, ...] = ()
    user: bool = False

    @property
    def folder(self) -> str:
        """The job's folder."""
        return job_folder(self.root, self.component, self.key)


def job_folder(root: str, component: str, key: str) -> str:
    """Return the folder of a job."""
    return os.path.join(root, f"{component}-{key[:12]}")


# ---------------------------------------------------------------- environment


def choose_jobs(available_mb: int, job_memory_mb: int, cpus: int, setting: int = 0, swap_mb: int = 0) -> int:
    """Return how many compilers may run at a time: never none, never more than processors unless set.

    Args:
        available_mb: free memory.
        job_memory_mb: what one compiler can take.
        cpus: number of processors.
        setting: the user's own number, or 0.
        swap_mb: free swap on disks. It carries one compiler more at most: two that live in it push each other out.
    """
    if setting > 0:
        return setting
    one = max(1, job_memory_mb)
    return max(1, min(cpus, (available_mb + min(swap_mb, one) - swap.RESERVED_MB) // one))


def compiler_memory_mb(request: Request) -> int:
    """Return what one compiler of a job can take, MB."""
    return request.job_memory_mb * (UPSTREAM_THREADS if takes_upstream_list(request) else 1)


def takes_upstream_list(request: Request) -> bool:
    """Return whether upstream's whole list of GPUs is compiled for, as far as the compiler knows them."""
    flags = parse_flags(request.flags)
    return request.sm != "cpu" and flags.get(nvcc_wrapper.LIST_VARIABLE) == nvcc_wrapper.UPSTREAM_LIST


def parse_flags(flags: Sequence[str]) -> Dict[str, str]:
    """Return build flags as environment variables.

    Raises:
        Problem: a flag is not NAME=VALUE, or names a variable that the build sets itself.
    """
    variables = {}
    for flag in flags:
        match = _FLAG.match(flag)
        if not match:
            raise Problem(
                f"the build flag {flag!r}",
                "NAME=VALUE, a variable for the build's environment",
                "write compiler flags as CXXFLAGS=… or NVCC_APPEND_FLAGS=…",
            )
        if match.group(1) in _OWN_VARIABLES:
            raise Problem(
                f"the build flag {flag}",
                "a variable that the build does not set itself ({})".format(", ".join(sorted(_OWN_VARIABLES))),
                "remove it; max_jobs, the platform row's sm and the CUDA settings have variables of their own",
            )
        variables[match.group(1)] = match.group(2)
    choice = variables.get(nvcc_wrapper.LIST_VARIABLE, nvcc_wrapper.OWN_LIST)
    if choice not in nvcc_wrapper.LISTS:
        raise Problem(
            f"the build flag {nvcc_wrapper.LIST_VARIABLE}={choice}",
            "{} (the device's GPU alone) or {} (upstream's whole list)".format(*nvcc_wrapper.LISTS),
            "correct it",
        )
    return variables


def scripts_folder(request: Request) -> str:
    """Return the folder that pip puts the environment's programs into, such as ninja.

    Raises:
        Problem: the interpreter does not say where its user's programs are.
    """
    if not request.user:
        return os.path.dirname(request.python)
    folder = environment.ask(request.python, _USER_SCRIPTS)
    if not isinstance(folder, str) or not os.path.isabs(folder):
        raise Problem(
            f"{request.python} does not say where the programs of its user site are",
            "the folder that pip install --user puts programs into (jetson_platform_scope is user)",
            f"look at what this prints: {request.python} -m sysconfig",
        )
    return folder


def build_environment(request: Request, jobs: int) -> Dict[str, str]:
    """Return the whole environment of a build; nothing is inherited but who and where the user is.

    Raises:
        Problem: a flag is wrong, or the interpreter does not say where its user's programs are.
    """
    path = [scripts_folder(request), "/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
    inherited = ["HOME", "USER", "LOGNAME"]
    if request.user:
        # between the user's programs and the system's, so that python3 is the one that is built for
        path.insert(1, os.path.dirname(request.python))
        # else the build would look for torch in another site than pip has put it into
        inherited.append("PYTHONUSERBASE")
    flags = parse_flags(request.flags)
    variables = {name: os.environ[name] for name in inherited if name in os.environ}
    variables.update(
        {
            "LC_ALL": "C.UTF-8",
            "LANG": "C.UTF-8",
            "TMPDIR": os.path.join(request.folder, "tmp"),
            "PYTHONUNBUFFERED": "1",
            "MAX_JOBS": str(jobs),
            # no configuration file of pip: constraints and indexes are for installing, not for this
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INPUT": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            request.force_build: "TRUE",
        }
    )
    if request.sm != "cpu":
        path.insert(1, os.path.join(request.cuda_home, "bin"))
        variables.update(
            {
                "CUDA_HOME": request.cuda_home,
                "PYTORCH_NVCC": os.path.join(request.folder, "bin", "nvcc"),
                nvcc_wrapper.NVCC_VARIABLE: os.path.join(request.cuda_home, "bin", "nvcc"),
                nvcc_wrapper.SM_VARIABLE: request.sm,
            }
        )
    variables["PATH"] = os.pathsep.join(path)
    variables.update(flags)
    rpath = RPATH if request.sm == "cpu" else CUDA_RPATH
    variables["LDFLAGS"] = " ".join(part for part in (rpath, flags.get("LDFLAGS", "")) if part)
    return variables


def build_command(request: Request) -> List[str]:
    """Return the command that builds, to be run in the job's folder. Verbose, since progress is read from its log."""
    return [
        request.python,
        "-m",
        "pip",
        "wheel",
        "-v",
        # the older way runs "setup.py clean" after a failure, and nothing would be left to go on with
        "--use-pep517",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--no-cache-dir",
        "-w",
        os.path.join(request.folder, "wheel"),
        os.path.join(request.folder, "src"),
    ]


# ---------------------------------------------------------------- source


def unpack_source(archive: str, sha256: str, folder: str) -> None:
    """Check a packed source and unpack it into <folder>/src, whole or not at all.

    Raises:
        Problem: the file is not the one that was sent, or holds what a source may not hold.
    """
    found = files.sha256_file(archive)
    if found != sha256:
        raise Problem(
            f"{archive} arrived with the sha256 {found}",
            f"sha256 {sha256}",
            "run again; if it stays, check the device's disk and memory",
        )
    partial = os.path.join(folder, "src.partial")
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    try:
        with tarfile.open(archive, "r:") as handle:
            for member in handle:
                _unpack_member(handle, member, partial)
    except (tarfile.TarError, OSError) as error:
        raise Problem(
            f"the source cannot be unpacked into {partial}: {error}",
            "free space and a folder that the connecting user may write",
            f"check df -h {folder} and its owner",
        ) from error
    source = os.path.join(folder, "src")
    shutil.rmtree(source, ignore_errors=True)
    os.replace(partial, source)


def _unpack_member(handle: tarfile.TarFile, member: tarfile.TarInfo, root: str) -> None:
    """Write one member; only plain files and links that stay inside are let through."""
    target = os.path.normpath(os.path.join(root, member.name))
    inside = root + os.sep
    if not target.startswith(inside) or not os.path.realpath(target).startswith(os.path.realpath(root) + os.sep):
        _refuse(member.name)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if member.issym():
        goal = os.path.normpath(os.path.join(os.path.dirname(target), member.linkname))
        if os.path.isabs(member.linkname) or not goal.startswith(inside):
            _refuse(member.name)
        os.symlink(member.linkname, target)
    elif member.isreg():
        stream = handle.extractfile(member)
        if stream is None or os.path.lexists(target):
            _refuse(member.name)
        with stream, open(target, "wb") as output:
            shutil.copyfileobj(stream, output)
        os.chmod(target, 0o755 if member.mode & 0o111 else 0o644)
    else:
        _refuse(member.name)


def _refuse(name: str) -> NoReturn:
    raise Problem(
        f"the source holds '{name}'",
        "plain files and links that stay inside the source",
        "prepare the source again on the controller",
    )


# ---------------------------------------------------------------- state


def read_json(path: str) -> Optional[Dict[str, Any]]:
    """Return the mapping that a JSON file holds, or None where there is none."""
    try:
        with open(path, encoding="utf-8") as handle:
            data = json.load(handle)
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def is_running(folder: str) -> bool:
    """Return whether any process of the job lives, by its lock: process ids come again, locks end with their holder."""
    try:
        descriptor = os.open(os.path.join(folder, "lock"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # shared, so that two who look at the same time do not take each other for the job
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)


def job_state(folder: str) -> str:
    """Return absent, running, done, failed, or dead (ended without a result: killed, or the power went)."""
    if not os.path.isfile(os.path.join(folder, "job.json")):
        return "absent"
    outcome = read_json(os.path.join(folder, "rc.json"))
    if outcome is not None:
        return "done" if outcome.get("rc") == 0 else "failed"
    return "running" if is_running(folder) else "dead"


def has_source(folder: str) -> bool:
    """Return whether the job's source is there, whole."""
    return os.path.isdir(os.path.join(folder, "src"))


def count_objects(log: str) -> Tuple[int, int]:
    """Return how many objects a log says are compiled, and how many there are; 0 for what it doesn't say."""
    steps = _NINJA.findall(log)
    if steps:
        return int(steps[-1][0]), int(steps[-1][1])
    # setuptools names each compiler call before it makes it
    return max(0, len(_COMPILE.findall(log)) - 1), 0


def was_killed(returncode: int, log: str, oom_kills: Optional[int] = None) -> bool:
    """Return whether a build ended because memory ran out.

    Args:
        returncode: of the build.
        log: of the build.
        oom_kills: how many processes the kernel killed for want of memory meanwhile; None where it does not tell. They
            need not be the build's own: they count only where no compiler names another reason.
    """
    if returncode in (137, -9) or _KILLED.search(log):
        return True
    return bool(oom_kills) and not _COMPILER_ERROR.search(_before_pip(log))


def failing_command(log: str) -> Optional[str]:
    """Return the command that made a build fail, or None where the log doesn't tell."""
    match = _FAILED_NINJA.search(log)
    if match:
        return match.group(1).strip()
    match = _FAILED_SETUPTOOLS.search(log)
    if not match:
        return None
    # setuptools names the program only; the call itself stands above
    calls = [call for call in _COMPILE_LINE.findall(log[: match.start()]) if os.path.basename(match.group(1)) in call]
    return calls[-1].strip() if calls else match.group(1).strip()


def read_log(folder: str, limit: int = 4 << 20) -> str:
    """Return the end of a job's log, at most limit bytes."""
    try:
        with open(os.path.join(folder, "log"), "rb") as handle:
            handle.seek(0, os.SEEK_END)
            handle.seek(max(0, handle.tell() - limit))
            return handle.read().decode("utf-8", "replace")
    except OSError:
        return ""


def tail(log: str, lines: int = TAIL_LINES) -> List[str]:
    """Return the last lines of a log that are not empty."""
    return [line.rstrip() for line in log.splitlines() if line.strip()][-lines:]


def poll(folder: str, wait_seconds: float = 0.0, sleep: Any = time.sleep) -> Dict[str, Any]:
    """Return where a job stands.

    Args:
        folder: the job's folder.
        wait_seconds: stay this long for a running job to end; the answer comes as soon as it does.

    Returns:
        {state, objects_done, objects_total, elapsed (s), tail, log (path), jobs, rc}.
    """
    deadline = time.monotonic() + wait_seconds
    state = job_state(folder)
    while state == "running" and time.monotonic() < deadline:
        sleep(min(0.5, max(0.05, deadline - time.monotonic())))
        state = job_state(folder)
    log = read_log(folder)
    done, total = count_objects(log)
    job = read_json(os.path.join(folder, "job.json")) or {}
    outcome = read_json(os.path.join(folder, "rc.json")) or {}
    if state == "done":
        done = max(done, total)
    elapsed = outcome.get("seconds", time.time() - job["started_at"] if job.get("started_at") else 0.0)
    return {
        "state": state,
        "objects_done": done,
        "objects_total": total,
        "elapsed": round(max(0.0, float(elapsed)), 1),
        "tail": tail(log, 5 if state == "running" else TAIL_LINES),
        "log": os.path.join(folder, "log"),
        "jobs": job.get("jobs"),
        "rc": outcome.get("rc"),
    }


class BuildFailed(Problem):
    """A build that failed, with the end of its log."""

    def __init__(self, found: str, expected: str, next_step: str, last: Sequence[str]) -> None:
        super().__init__(found, expected, next_step)
        self.last = list(last)

    def render(self) -> str:
        """Return the message with the last lines of the log before it."""
        return "last lines of the log:\n    {}\n{}".format("\n    ".join(self.last), super().render())


def _before_pip(log: str) -> str:
    """Return a log without pip's repetition of its own command, unless there is nothing else."""
    match = _PIP_NOISE.search(log)
    return log[: match.start()] if match and log[: match.start()].strip() else log


def failure_tail(log: str) -> List[str]:
    """Return the last lines of a failed build's log, without pip's repetition of its own command."""
    return tail(_before_pip(log))


def _kills(folder: str, outcome: Dict[str, Any]) -> Optional[int]:
    """Return how many processes the kernel killed for want of memory during a job, or None where that is not known."""
    if outcome:
        found = outcome.get("oom_kills")
        return None if found is None else int(found)
    # the runner itself is gone: what it wrote down at its start says it, while the kernel still runs
    began = read_json(os.path.join(folder, "pid.json")) or {}
    now = build_runner.oom_kills()
    if began.get("boot_id") != build_runner.boot_id() or began.get("oom_kills") is None or now is None:
        return None
    return max(0, now - int(began["oom_kills"]))


def _more_memory(component: str, job: Dict[str, Any]) -> str:
    """Return what makes a job fit that was killed for want of memory."""
    jobs, each = int(job.get("jobs") or 1), int(job.get("job_memory_mb") or 0)
    if job.get("upstream_list"):
        return f"take {nvcc_wrapper.LIST_VARIABLE}={nvcc_wrapper.UPSTREAM_LIST} out of {component}_build_flags"
    if jobs > 1:
        return f"set {component}_max_jobs: {max(1, jobs // 2)}"
    size = -(-max(2 * each, 4096) // 1024) * 1024
    return f"end what else takes memory on the device, or give the build more swap (wheelhouse_swap_mb: {size})"


def describe_failure(folder: str, component: str) -> BuildFailed:
    """Return what is to be said about a job that failed or died."""
    log = read_log(folder)
    outcome = read_json(os.path.join(folder, "rc.json")) or {}
    job = read_json(os.path.join(folder, "job.json")) or {}
    returncode = int(outcome.get("rc", -1))
    where = "whole log on the device: {}".format(os.path.join(folder, "log"))
    last = failure_tail(log)
    command = failing_command(log) or " ".join(job.get("argv", []))
    kills = _kills(folder, outcome)
    if was_killed(returncode, log, kills):
        counted = f", the kernel counts {kills} killed" if kills else ""
        free = job.get("memory_available_mb")
        return BuildFailed(
            f"the build of {component} was killed for want of memory ({job.get('jobs')} compilers at a time, {free} MB "
            f"and {job.get('swap_mb', 0)} MB of swap free at its start{counted}); command: {command}",
            f"about {job.get('job_memory_mb')} MB for each compiler",
            f"{_more_memory(component, job)}, then run again: it goes on where it stopped. {where}",
            last,
        )
    if not outcome:
        return BuildFailed(
            f"the build of {component} ended without a result, as if killed or cut off from power",
            "a build that ends by itself",
            f"run again: it goes on where it stopped. {where}",
            last,
        )
    return BuildFailed(
        f"the build of {component} failed with exit status {returncode}; command: {command}",
        "exit status 0",
        f"cure what the compiler says, then run again: it goes on where it stopped. {where}",
        last,
    )


# ---------------------------------------------------------------- start


@contextlib.contextmanager
def _launching(folder: str) -> Iterator[None]:
    """Let one process at a time decide about a job."""
    with open(os.path.join(folder, "launch.lock"), "w", encoding="ascii") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def is_finished(request: Request) -> bool:
    """Return whether the job is done and its wheel is still the one that was judged."""
    if job_state(request.folder) != "done":
        return False
    result = read_json(os.path.join(request.folder, "result.json"))
    if result is None:
        return len(_wheels(request.folder)) == 1
    return files.sha256_file(str(result.get("wheel"))) == result.get("sha256")


def start(request: Request, source: Optional[str]) -> Dict[str, Any]:
    """Make sure that a job runs or has run: find it, or start it.

    Args:
        request: what to build.
        source: the packed source on the device, or None where it was not sent yet.

    Returns:
        {state: running, done or needs_source; started: whether this call started it; resumed: whether it found
        something to go on with; upload: where to put the source}.

    Raises:
        Problem: the device lacks what the build needs.
    """
    folder = request.folder
    _refuse_blanks(folder)
    _make_folder(folder)
    with _launching(folder):
        state = job_state(folder)
        answer = {"state": state, "started": False, "resumed": False, "upload": os.path.join(folder, "source.tar")}
        if state == "running" or is_finished(request):
            return answer
        if source is None and not has_source(folder):
            # before a long way over the network: would it start at all?
            check_device(request)
            return dict(answer, state="needs_source")
        check_device(request)
        resumed = has_source(folder)
        if source is not None:
            if not resumed:
                unpack_source(source, request.source_sha256, folder)
            with contextlib.suppress(OSError):
                os.unlink(source)
        _launch(request)
        return dict(answer, state="running", started=True, resumed=resumed)


def _refuse_blanks(folder: str) -> None:
    if re.search(r"\s|[,$'\"]", folder):
        raise Problem(
            f"the build folder {folder!r} has blanks, quotes, commas or a dollar sign in its name",
            "a path that ninja and the compilers take as one word",
            "set jetson_platform_build_root to another folder",
        )


def _make_folder(folder: str) -> None:
    try:
        for name in ("bin", "tmp", "wheel"):
            os.makedirs(os.path.join(folder, name), exist_ok=True)
    except OSError as error:
        raise Problem(
            f"{folder} cannot be made: {error.strerror}",
            "a build folder that the connecting user may write",
            "correct jetson_platform_build_root or the folder's owner",
        ) from error


def check_device(request: Request) -> None:
    """Check that the device has what the build needs.

    Raises:
        Problem: the first thing that is missing.
    """
    if not os.access(request.python, os.X_OK):
        raise Problem(
            f"there is no interpreter {request.python}",
            "the environment that the wheel is for, with torch and the build tools in it",
            "create the environment first (role torch_jetpack)",
        )
    parse_flags(request.flags)
    free_mb = shutil.disk_usage(request.root).free >> 20
    if free_mb < request.disk_mb:
        raise Problem(
            f"{request.root} has {free_mb} MB free",
            f"{request.disk_mb} MB to build {request.component}",
            "make room, or set jetson_platform_build_root to a folder on another disk",
        )
    if request.sm == "cpu":
        return
    nvcc = os.path.join(request.cuda_home, "bin", "nvcc")
    if not os.access(nvcc, os.X_OK):
        raise Problem(
            f"there is no compiler {nvcc}",
            "the CUDA toolkit's nvcc",
            "install the toolkit (role cuda_env), or set the folder that it is in",
        )
    _check_compiler(nvcc, request.sm)
    path = build_environment(request, 1)["PATH"]
    if not shutil.which("ninja", path=path):
        # without ninja torch calls nvcc itself, by a name of its own, and would compile for every GPU in the list
        raise Problem(
            f"there is no ninja in {path.split(os.pathsep)[0]}",
            "ninja in the environment",
            "install the environment's build tools again (role torch_jetpack)",
        )


def _check_compiler(nvcc: str, sm: str) -> None:
    """Check, before anything compiles, that the compiler knows the wanted GPU."""
    try:
        known = nvcc_wrapper.known_gpus(nvcc)
    except OSError as error:
        raise Problem(
            str(error),
            "a compiler that lists its GPUs",
            "install the toolkit again (role cuda_env), or set the folder that it is in",
        ) from error
    if not nvcc_wrapper.is_known(sm, known):
        names = ", ".join(f"sm_{number}" for number in sorted(known, key=int))
        raise Problem(
            f"{nvcc} cannot compile for sm_{sm}; it knows {names}",
            f"a CUDA toolkit that knows sm_{sm}",
            "install the toolkit of the device's own JetPack, or correct the platform row (cuda and sm)",
        )


def running_jobs(root: str) -> List[str]:
    """Return the names of the jobs below a folder that run now."""
    names = sorted(os.listdir(root)) if root and os.path.isdir(root) else []
    return [name for name in names if job_state(os.path.join(root, name)) == "running"]


def _launch(request: Request) -> None:
    """Start the runner of a job, with nothing left that ties it to this process or its connection."""
    folder = request.folder
    memory = swap.free_memory()
    each = compiler_memory_mb(request)
    # not all that the device has: nvpmodel switches some off
    cpus = len(os.sched_getaffinity(0))
    jobs = choose_jobs(memory.available_mb, each, cpus, request.max_jobs, memory.swap_mb)
    _end_leftovers(folder)
    if request.sm != "cpu":
        wrapper = nvcc_wrapper.script(sys.executable)
        files.write_atomic(os.path.join(folder, "bin", "nvcc"), wrapper.encode("utf-8"), 0o755)
    for name in ("rc.json", "result.json", "pid.json"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, name))
    for name in _wheels(folder):
        os.unlink(name)
    runner = os.path.join(folder, "runner.py")
    files.write_atomic(runner, nvcc_wrapper.source_text(build_runner.__name__).encode("utf-8"), 0o644)
    job = {
        "schema": 1,
        "component": request.component,
        "version": request.version,
        "key": request.key,
        "source_sha256": request.source_sha256,
        "sm": request.sm,
        "modules": list(request.modules),
        "argv": build_command(request),
        "cwd": folder,
        "env": build_environment(request, jobs),
        "jobs": jobs,
        "job_memory_mb": each,
        "memory_available_mb": memory.available_mb,
        "swap_mb": memory.swap_mb,
        "upstream_list": takes_upstream_list(request),
        "started_at": time.time(),
    }
    build_runner.write_json(os.path.join(folder, "job.json"), job)
    lock = _take_lock(folder)
    try:
        _spawn([sys.executable, "-IS", runner, folder], os.path.join(folder, "log"), lock)
    finally:
        os.close(lock)


def session_members(session: int) -> List[int]:
    """Return the processes of a session."""
    members = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError, ValueError), open(
            f"/proc/{name}/stat", encoding="utf-8", errors="replace"
        ) as handle:
            fields = handle.read().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in ("Z", "X"):
                members.append(int(name))
    return members


def _end_leftovers(folder: str, patience: float = 10.0) -> None:
    """End compilers that outlived their job, so that two builds never write into one folder."""
    old = read_json(os.path.join(folder, "pid.json"))
    if not old or old.get("boot_id") != build_runner.boot_id() or old.get("session") == os.getsid(0):
        return
    deadline = time.monotonic() + patience
    for number in (signal.SIGTERM, signal.SIGKILL):
        while True:
            members = session_members(int(old["session"]))
            for member in members:
                with contextlib.suppress(OSError):
                    os.kill(member, number)
            if not members or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        deadline += patience


def _take_lock(folder: str) -> int:
    """Return a descriptor that holds the job's lock; those who only look hold it for moments."""
    descriptor = os.open(os.path.join(folder, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    for _attempt in range(100):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            time.sleep(0.05)
    os.close(descriptor)
    raise Problem(
        f"processes of an earlier build still live in {folder}",
        "a job without processes",
        f"look at them with 'fuser -v {folder}/lock'; run again when they are gone",
    )


def _spawn(argv: List[str], log: str, lock: int) -> None:
    """Start a process in a session of its own, as nobody's child, holding the lock and writing to the log."""
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        return
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.chdir(os.path.dirname(log))
        os.umask(0o022)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        kept = 3
        # dup2 gives a descriptor that survives exec; every other one, the connection's too, is closed
        if lock == kept:
            os.set_inheritable(lock, True)
        else:
            os.dup2(lock, kept)
        os.closerange(kept + 1, 65536)
        os.execv(argv[0], argv)
    finally:
        os._exit(127)


# ---------------------------------------------------------------- result


def _wheels(folder: str) -> List[str]:
    """Return the wheels of a job."""
    where = os.path.join(folder, "wheel")
    names = sorted(os.listdir(where)) if os.path.isdir(where) else []
    return [os.path.join(where, name) for name in names if name.endswith(".whl")]


def expectation(request: Request, machine: str) -> inspection.Expectation:
    """Return what a job's wheel must be.

    Raises:
        Problem: the interpreter that it is for does not run.
    """
    python = environment.ask(request.python, _PYTHON_VERSION)
    if not isinstance(python, str):
        raise Problem(
            f"{request.python} does not run",
            "the interpreter that the wheel was built for",
            "create the environment again (role torch_jetpack), then run again",
        )
    return inspection.Expectation(
        machine=machine,
        python=python,
        glibc=".".join(platform.libc_ver()[1].split(".")[:2]),
        sm=request.sm,
        component=request.component,
        version=request.version,
        modules=request.modules,
    )


def result(request: Request, machine: str) -> Dict[str, Any]:
    """Judge the wheel of a job that is done, and write the judgement down.

    Returns:
        {wheel, sha256, size_mb, tags, version, libraries: {name: machine}, cubins: GPU numbers, warnings, needed,
        seconds, log, built_at (UTC)}.

    Raises:
        Problem: the job failed, or the wheel is not what it must be.
    """
    folder = request.folder
    if job_state(folder) != "done":
        raise describe_failure(folder, request.component)
    wheels = _wheels(folder)
    if len(wheels) != 1:
        raise Problem(
            f"the build of {request.component} left {len(wheels)} wheels in {folder}/wheel",
            "one wheel",
            f"remove {folder} and run again",
        )
    path = wheels[0]
    place = os.path.join(folder, "tmp")
    os.makedirs(place, exist_ok=True)
    facts = inspection.read_wheel(path, folder=place)
    verdict = inspection.judge(facts, expectation(request, machine))
    for error in verdict.errors:
        raise Problem(
            error["found"],
            error["expected"],
            "{}. It was built here: look into {} for what the compilers were asked, remove {}, and run again".format(
                error["next"], os.path.join(folder, "log"), folder
            ),
        )
    cubins = {code for one in facts["libraries"].values() for code, row in one["archs"].items() if row["cubins"]}
    _require_exact(request, sorted(cubins))
    outcome = read_json(os.path.join(folder, "rc.json")) or {}
    ended = float(outcome.get("ended_at", time.time()))
    found = {
        "wheel": path,
        "sha256": files.sha256_file(path),
        "size_mb": round(os.path.getsize(path) / 1e6, 1),
        "tags": facts["tags"],
        "version": facts["version"],
        "libraries": {name: one["machine"] for name, one in facts["libraries"].items()},
        "cubins": sorted(cubins),
        "warnings": verdict.warnings,
        "needed": verdict.needed,
        "seconds": outcome.get("seconds"),
        "log": os.path.join(folder, "log"),
        "built_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ended)),
    }
    build_runner.write_json(os.path.join(folder, "result.json"), found)
    return found


def _require_exact(request: Request, cubins: Sequence[str]) -> None:
    """Check that code for no other GPU was compiled; it would mean that some call went past the wrapper."""
    others = [code for code in cubins if code.rstrip("af") != request.sm.rstrip("af")]
    if not others or takes_upstream_list(request):
        return
    raise Problem(
        "the wheel of {} holds code for {}".format(request.component, ", ".join("sm_" + code for code in cubins)),
        f"code for sm_{request.sm} alone",
        "look into {} for the calls that name them: only the compiler that PYTORCH_NVCC names is held to one GPU; or "
        "keep them, by {}={} in {}_build_flags".format(
            os.path.join(request.folder, "log"),
            nvcc_wrapper.LIST_VARIABLE,
            nvcc_wrapper.UPSTREAM_LIST,
            request.component,
        ),
    )


def discard(folder: str) -> None:
    """Remove a job that has ended, whole, once its wheel and its log are somewhere else.

    Raises:
        Problem: it runs, or its files cannot be removed.
    """
    if not os.path.isdir(folder):
        return
    with _launching(folder):
        # not by its lock: the runner holds it for a moment after the result is written
        if job_state(folder) == "running":
            raise Problem(
                f"the build in {folder} is running",
                "a build that has ended",
                "let it end (the next run follows it), or end its processes: fuser -k {}".format(
                    os.path.join(folder, "lock")
                ),
            )
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise Problem(
                f"{folder} cannot be removed: {error}",
                "a build folder that the connecting user may write",
                f"look at its owner (ls -ld {folder}) and at the device's storage (dmesg)",
            ) from error
