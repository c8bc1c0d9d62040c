"""Build jobs: detached, found again, judged."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import build
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

from tests.unit.plugins.wheel_kit import container, entry, make_elf, make_wheel

KEY = "ab" * 32


def request(root: Path, **more: Any) -> build.Request:
    values: dict[str, Any] = {
        "component": "mamba_ssm",
        "version": "2.2.4",
        "key": KEY,
        "source_sha256": "",
        "root": str(root),
        "python": sys.executable,
        "cuda_home": "/nowhere/cuda",
        "sm": "cpu",
        "force_build": "MAMBA_FORCE_BUILD",
        "modules": ("selective_scan_cuda",),
        "job_memory_mb": 1000,
        "disk_mb": 1,
    }
    return build.Request(**{**values, **more})


# ---------------------------------------------------------------- key, jobs, environment


def test_the_key_changes_with_every_input_and_not_with_their_order() -> None:
    base = ("mamba_ssm", "2.2.4", "aa", "class", "87", ["B=1", "A=2"])
    key = build.build_key(*base)
    assert len(key) == 64 and key == build.build_key(*base[:5], ["A=2", "B=1"])
    for place, other in enumerate(["x", "x", "x", "x", "72", ["A=2"]]):
        changed: list[Any] = list(base)
        changed[place] = other
        assert build.build_key(*changed) != key


@pytest.mark.parametrize(
    ("available", "need", "cpus", "setting", "expected"),
    [
        (7000, 2600, 6, 0, 2),
        (1000, 2600, 6, 0, 1),
        (64000, 2600, 8, 0, 8),
        (0, 2600, 8, 0, 1),
        (64000, 2600, 8, 3, 3),
        (1000, 2600, 2, 5, 5),
    ],
)
def test_jobs_follow_memory(available: int, need: int, cpus: int, setting: int, expected: int) -> None:
    assert build.choose_jobs(available, need, cpus, setting) == expected


@pytest.mark.parametrize(("swap_mb", "expected"), [(0, 1), (1000, 1), (2600, 2), (16000, 2)])
def test_swap_carries_one_compiler_more_and_no_second(swap_mb: int, expected: int) -> None:
    assert build.choose_jobs(4000, 2600, 6, 0, swap_mb) == expected


def test_upstreams_list_takes_the_memory_of_its_threads(tmp_path: Path) -> None:
    flags = ("JETSON_MAMBA_ARCHITECTURES=upstream",)
    assert build.compiler_memory_mb(request(tmp_path, sm="87")) == 1000
    assert build.compiler_memory_mb(request(tmp_path, sm="87", flags=flags)) == 4000
    assert build.compiler_memory_mb(request(tmp_path, flags=flags)) == 1000


def test_the_environment_is_the_builds_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONSTRAINT", "/x")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0")
    flags = ("LDFLAGS=-Wl,-z,now", "A_B=c=d")
    job = request(tmp_path, sm="87", cuda_home="/usr/local/cuda-12.6", python="/env/bin/python", flags=flags)
    found = build.build_environment(job, 3)
    assert "PIP_CONSTRAINT" not in found and "TORCH_CUDA_ARCH_LIST" not in found
    assert found["PIP_CONFIG_FILE"] == os.devnull
    assert found["MAMBA_FORCE_BUILD"] == "TRUE" and found["MAX_JOBS"] == "3" and found["A_B"] == "c=d"
    assert found["PATH"].startswith("/env/bin:/usr/local/cuda-12.6/bin:/usr/")
    assert found["PYTORCH_NVCC"] == f"{job.folder}/bin/nvcc"
    assert found["JETSON_MAMBA_NVCC"] == "/usr/local/cuda-12.6/bin/nvcc" and found["JETSON_MAMBA_SM"] == "87"
    assert found["LDFLAGS"] == (
        "-Wl,-rpath,$ORIGIN/torch/lib:$ORIGIN/nvidia/cu13/lib:$ORIGIN/nvidia/cuda_runtime/lib -Wl,-z,now"
    )
    assert found["TMPDIR"].startswith(str(tmp_path))
    plain = build.build_environment(request(tmp_path), 1)
    assert not {"CUDA_HOME", "PYTORCH_NVCC"} & set(plain)
    assert plain["LDFLAGS"] == "-Wl,-rpath,$ORIGIN/torch/lib"


def test_in_the_users_site_the_build_sees_what_pip_puts_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts, cuda = tmp_path / "base" / "bin", tmp_path / "cuda"
    for program in (scripts / "ninja", cuda / "bin" / "nvcc"):
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\necho sm_80\necho sm_87\n")
        program.chmod(0o755)
    monkeypatch.setenv("PYTHONUSERBASE", str(tmp_path / "base"))
    more: dict[str, Any] = {"sm": "87", "cuda_home": str(cuda), "user": True}
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    job = request(tmp_path, python=str(tmp_path / "bin" / "python"), **more)
    found = build.build_environment(job, 1)
    assert found["PATH"].split(":")[:3] == [str(scripts), f"{cuda}/bin", f"{tmp_path}/bin"]
    assert found["PYTHONUSERBASE"] == str(tmp_path / "base")
    build.check_device(job)
    assert "PYTHONUSERBASE" not in build.build_environment(job._replace(user=False), 1)
    with pytest.raises(Problem, match=f"{cuda}/bin/nvcc cannot compile for sm_110; it knows sm_80, sm_87"):
        build.check_device(job._replace(sm="110"))
    (cuda / "bin" / "nvcc").write_text("#!/bin/sh\necho no libraries >&2; exit 1\n")
    with pytest.raises(Problem, match="status 1 and says: no libraries"):
        build.check_device(job)
    (cuda / "bin" / "nvcc").write_text("#!/bin/sh\necho sm_87\n")
    (scripts / "ninja").unlink()
    monkeypatch.setattr(build.shutil, "which", lambda name, path: None)
    with pytest.raises(Problem, match=f"no ninja in {scripts}"):
        build.check_device(job)


def test_an_interpreter_that_does_not_tell_its_users_programs_is_named(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="/bin/false does not say"):
        build.build_environment(request(tmp_path, python="/bin/false", user=True), 1)


@pytest.mark.parametrize(
    "flag",
    [
        *("-O3", "lower=1", "MAX_JOBS=4", "PYTORCH_NVCC=/x", "PATH=/x", "A", "JETSON_MAMBA_SM=90"),
        "JETSON_MAMBA_ARCHITECTURES=all",
    ],
)
def test_flags_that_are_none_are_refused(flag: str) -> None:
    with pytest.raises(Problem):
        build.parse_flags([flag])


def test_the_command_isolates_nothing_and_fetches_nothing(tmp_path: Path) -> None:
    command = build.build_command(request(tmp_path))
    assert {"--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir"} <= set(command)
    assert command[-1] == f"{tmp_path}/mamba_ssm-abababababab/src"


# ---------------------------------------------------------------- logs


def test_progress_is_read_from_ninja_and_from_setuptools() -> None:
    ninja = "  running build_ext\n  [1/12] c++ -c a.cpp\n  [2/12] /x/nvcc -c b.cu\n"
    assert build.count_objects(ninja) == (2, 12)
    plain = "  gcc -pthread -Wall -c a.c -o a.o\n  x86_64-linux-gnu-gcc -c b.c -o b.o\n  gcc -shared a.o b.o\n"
    assert build.count_objects(plain) == (1, 0)
    assert build.count_objects("Processing ./src\n") == (0, 0)


@pytest.mark.parametrize(
    ("returncode", "log"),
    [
        (137, ""),
        (1, "c++: fatal error: Killed signal terminated program cc1plus\n"),
        (1, "nvcc error   : 'cicc' died due to signal 9 (Kill signal)\n"),
        (1, "Killed\nninja: build stopped\n"),
        (1, "c++: internal compiler error: Killed (program cc1plus)\n"),
        (1, "  error: command '/usr/bin/g++' failed with exit code -9\n"),
        (1, "  │ exit code: -9\n  ╰─> [3 lines of output]\n"),
        (1, "cc1plus: out of memory allocating 65536 bytes after a total of 123 bytes\n"),
        (1, "virtual memory exhausted: Cannot allocate memory\n"),
        (1, "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n"),
        (1, "ninja: fatal: posix_spawn: Cannot allocate memory\n"),
        (1, "ptxas fatal   : Memory allocation failure\n"),
    ],
)
def test_want_of_memory_is_recognised(returncode: int, log: str) -> None:
    assert build.was_killed(returncode, log)


@pytest.mark.parametrize(
    "log",
    [
        "error: 'Killed' was not declared in this scope\n",
        "a.cu(3): error: no instance of std::bad_alloc matches\n",
        "a.cpp:1:2: error: stray\n  1 | throw std::bad_alloc();\n",
        "nvcc error   : 'cicc' died due to signal 11 (Invalid memory reference)\n",
        "nvcc fatal   : Unsupported gpu architecture 'compute_53'\n",
    ],
)
def test_an_ordinary_error_is_not_want_of_memory(log: str) -> None:
    assert not build.was_killed(1, log)


def test_the_kernels_count_speaks_where_no_compiler_does() -> None:
    assert build.was_killed(1, "[3/9] nvcc -c a.cu\nninja: build stopped\n", 1)
    assert not build.was_killed(1, "[3/9] nvcc -c a.cu\nninja: build stopped\n", 0)
    # some other program of the machine may be the one that was killed
    assert not build.was_killed(1, "a.cu(3): error: identifier x is undefined\n", 1)


def test_pips_repetitions_are_no_part_of_the_last_lines() -> None:
    log = "a.c:1: error: q\n  error: subprocess-exited-with-error\n  full command: /x\n"
    assert build.failure_tail(log) == ["a.c:1: error: q"]
    assert build.failure_tail("error: subprocess-exited-with-error\n") == ["error: subprocess-exited-with-error"]


def test_the_failing_command_is_found() -> None:
    log = "[1/2] ok\n  FAILED: /x/a.o \n  /x/nvcc -c a.cu -o a.o\n  a.cu(3): error\n"
    assert build.failing_command(log) == "/x/nvcc -c a.cu -o a.o"
    error = "  error: command '/usr/bin/gcc' failed with exit code 1\n"
    assert build.failing_command(error) == "/usr/bin/gcc"
    assert build.failing_command("  gcc -c a.c\n  gcc -O3 -c b.c -o b.o\n" + error) == "gcc -O3 -c b.c -o b.o"
    assert build.failing_command("nothing\n") is None


# ---------------------------------------------------------------- jobs


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A job whose command is a small script; start it with job(script)."""
    wanted = request(tmp_path)
    folder = Path(wanted.folder)
    started: list[Path] = []

    def begin(script: str) -> dict[str, Any]:
        monkeypatch.setattr(build, "build_command", lambda _request: [sys.executable, "-uc", script])
        (folder / "src").mkdir(parents=True, exist_ok=True)
        started.append(folder)
        return build.start(wanted, None)

    yield begin, wanted
    record = build.read_json(str(folder / "pid.json"))
    if record and record["session"] != os.getsid(0):
        for pid in build.session_members(record["session"]):
            os.kill(pid, signal.SIGKILL)


def wait_for(folder: str, *states: str) -> dict[str, Any]:
    for _ in range(100):
        status = build.poll(folder, 0.1)
        if status["state"] in states:
            return status
    raise AssertionError(status)


def test_a_job_runs_detached_and_is_found_again(job: Any, tmp_path: Path) -> None:
    begin, wanted = job
    gate = tmp_path / "gate"
    script = (
        "import os,time\nprint('[1/3] x', flush=True)\n"
        f"while not os.path.exists({str(gate)!r}): time.sleep(.05)\nprint('end')"
    )
    assert begin(script) == {
        "state": "running", "started": True, "resumed": True, "upload": f"{wanted.folder}/source.tar",
    }
    again = begin("raise SystemExit(9)")
    assert again["state"] == "running" and not again["started"]
    record = wait_for_pid(wanted.folder)
    assert os.getsid(record["pid"]) == record["session"] != os.getsid(0)
    assert record["start_ticks"] > 0
    for _ in range(50):
        status = build.poll(wanted.folder)
        if status["objects_total"]:
            break
        time.sleep(0.05)
    assert (status["state"], status["objects_done"], status["objects_total"]) == ("running", 1, 3)
    gate.touch()
    done = wait_for(wanted.folder, "done")
    assert done["objects_done"] == 3 and done["tail"][-1] == "end" and done["rc"] == 0


def wait_for_pid(folder: str) -> dict[str, Any]:
    for _ in range(100):
        record = build.read_json(os.path.join(folder, "pid.json"))
        if record:
            return record
        time.sleep(0.05)
    raise AssertionError("no pid.json")


def test_the_caller_is_not_kept_waiting(tmp_path: Path) -> None:
    """What starts a job ends at once, and so do the pipes that its caller reads: an SSH session would hang on them."""
    folder = tmp_path / "mamba_ssm-abababababab"
    (folder / "src").mkdir(parents=True)
    code = (
        "import sys\n"
        "from ansible_collections.jetson.mamba.plugins.module_utils import build\n"
        "from test_build import request\n"
        "from pathlib import Path\n"
        "build.build_command = lambda _r: [sys.executable, '-c', 'import time; time.sleep(3)']\n"
        f"print(build.start(request(Path({str(tmp_path)!r})), None)['state'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(Path(__file__).parent)])}
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "running"
    assert time.monotonic() - began < 2.5
    assert build.job_state(str(folder)) == "running"
    wait_for(str(folder), "done")


def test_a_job_that_died_is_started_again_and_its_leftovers_are_ended(job: Any) -> None:
    begin, wanted = job
    compiler = "subprocess.Popen([sys.executable,'-c','import time; time.sleep(60)'])"
    begin(f"import subprocess,sys,time\n{compiler}\ntime.sleep(60)")
    record = wait_for_pid(wanted.folder)
    for _ in range(100):
        if len(build.session_members(record["session"])) >= 3:
            break
        time.sleep(0.05)
    leftovers = build.session_members(record["session"])
    assert len(leftovers) == 3
    os.kill(record["pid"], signal.SIGKILL)
    child = next(pid for pid in leftovers if pid != record["pid"])
    assert build.job_state(wanted.folder) == "running", "pip still lives"
    os.kill(child, signal.SIGKILL)
    for _ in range(50):
        if build.job_state(wanted.folder) == "dead":
            break
        time.sleep(0.05)
    assert build.job_state(wanted.folder) == "dead"
    assert "without a result" in build.describe_failure(wanted.folder, "mamba_ssm").found
    Path(wanted.folder, "src", "object.o").touch()
    assert begin("print('second')")["started"]
    wait_for(wanted.folder, "done")
    assert build.session_members(record["session"]) == []
    assert Path(wanted.folder, "src", "object.o").exists()


def test_a_failed_job_says_what_failed_and_is_tried_again(job: Any) -> None:
    begin, wanted = job
    begin("for n in range(60): print('line', n)\nprint('FAILED: a.o\\n/x/nvcc -c a.cu')\nraise SystemExit(1)")
    assert wait_for(wanted.folder, "failed")["rc"] == 1
    problem = build.describe_failure(wanted.folder, "mamba_ssm")
    assert "command: /x/nvcc -c a.cu" in problem.found and "line 59" not in problem.found
    assert "line 59\n" in problem.render() and "line 10\n" not in problem.render()
    assert f"{wanted.folder}/log" in problem.next_step
    with pytest.raises(Problem, match="exit status 1"):
        build.result(wanted, "x86_64")
    assert begin("pass")["started"]


def test_a_killed_compiler_is_answered_with_what_helps(job: Any) -> None:
    begin, wanted = job
    begin("import os\nos.kill(os.getpid(), 9)")
    assert wait_for(wanted.folder, "failed")["rc"] == 137
    problem = build.describe_failure(wanted.folder, "mamba_ssm")
    assert "want of memory" in problem.found and "about 1000 MB for each" in problem.expected
    path = Path(wanted.folder, "job.json")
    data = json.loads(path.read_text())
    for more, advice in [
        ({"jobs": 6}, "mamba_ssm_max_jobs: 3,"),
        ({"jobs": 1}, "wheelhouse_swap_mb: 4096"),
        ({"jobs": 1, "job_memory_mb": 2600}, "wheelhouse_swap_mb: 6144"),
        ({"upstream_list": True}, "JETSON_MAMBA_ARCHITECTURES=upstream out of mamba_ssm_build_flags"),
    ]:
        path.write_text(json.dumps({**data, **more}))
        assert advice in build.describe_failure(wanted.folder, "mamba_ssm").next_step


HUNGRY = """
#include <tuple>
#include <utility>
template <int N> struct item { int value[N % 7 + 1]; };
template <std::size_t... I> auto all(std::index_sequence<I...>) { return std::make_tuple(item<I>{}...); }
int main() { return std::get<3>(all(std::make_index_sequence<3000>{})).value[0]; }
"""


@pytest.fixture
def small_group() -> Any:
    """A memory control group of 120 MB below this process's own; skipped out loud where none can be made."""
    above = build.build_runner.memory_groups()
    if not above:
        pytest.skip("this machine shows no memory control group")
    group = Path(above[0], f"jetson-mamba-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory control group can be made here: {error}")
    try:
        limits = [group / name for name in ("memory.max", "memory.limit_in_bytes")]
        limit = next(filter(Path.exists, limits), None)
        if limit is None:
            pytest.skip(f"{group} has no memory controller")
        limit.write_text(str(120 << 20))
        for name in ("memory.swap.max", "memory.memsw.limit_in_bytes"):
            if (group / name).exists():
                (group / name).write_text("0" if name == "memory.swap.max" else str(120 << 20))
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        for _ in range(100):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.05)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_compiler_that_the_kernel_kills_is_recognised(small_group: Path, tmp_path: Path) -> None:
    """For real: a job in a control group whose memory the compiler does not fit into."""
    wanted = request(tmp_path)
    folder = Path(wanted.folder)
    (folder / "src").mkdir(parents=True)
    (folder / "hungry.cpp").write_text(HUNGRY)
    code = (
        "from test_build import request\n"
        "from ansible_collections.jetson.mamba.plugins.module_utils import build\n"
        "from pathlib import Path\n"
        f"Path({str(small_group / 'cgroup.procs')!r}).write_text('0')\n"
        "build.build_command = lambda _r: ['g++', '-c', 'hungry.cpp', '-o', 'hungry.o']\n"
        f"build.start(request(Path({str(tmp_path)!r})), None)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(Path(__file__).parent)])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    for _ in range(6):
        status = build.poll(wanted.folder, 10)
        if status["state"] != "running":
            break
    assert status["state"] == "failed" and status["rc"] == 1, status
    job, outcome = (build.read_json(str(folder / name)) or {} for name in ("job.json", "rc.json"))
    assert 0 < job["memory_available_mb"] <= 120 and job["jobs"] == 1
    assert outcome["oom_kills"] >= 1
    problem = build.describe_failure(wanted.folder, "mamba_ssm")
    assert "killed for want of memory (1 compilers at a time" in problem.found
    assert "the kernel counts 1 killed); command: g++ -c hungry.cpp" in problem.found
    assert "wheelhouse_swap_mb: 4096" in problem.next_step and f"{folder}/log" in problem.next_step
    # the same counter alone, without what g++ says, names the reason too
    (folder / "log").write_text("[1/1] g++ -c hungry.cpp\n")
    assert "want of memory" in build.describe_failure(wanted.folder, "mamba_ssm").found


@pytest.mark.parametrize("began", [0, None])
def test_a_job_whose_runner_was_killed_too_is_explained_by_the_kernels_count(
    job: Any, monkeypatch: pytest.MonkeyPatch, began: int | None
) -> None:
    _begin, wanted = job
    folder = Path(wanted.folder)
    folder.mkdir(parents=True)
    (folder / "job.json").write_text('{"jobs": 2, "argv": ["pip"]}')
    record = {"boot_id": build.build_runner.boot_id(), "oom_kills": began, "session": os.getsid(0)}
    (folder / "pid.json").write_text(json.dumps(record))
    monkeypatch.setattr(build.build_runner, "oom_kills", lambda: 2)
    said = build.describe_failure(wanted.folder, "mamba_ssm").found
    assert ("want of memory" in said) == (began is not None)


def _tree(top: Path, cgroup: str, mounts: str, files: dict[str, str]) -> str:
    (top / "self").mkdir()
    (top / "self" / "cgroup").write_text(cgroup)
    (top / "self" / "mountinfo").write_text(mounts)
    for name, text in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    return str(top)


def test_the_kernels_count_is_read_from_either_kind_of_group_or_from_the_whole_machine(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    new, old, none = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    proc = _tree(
        new, "0::/user/job\n", f"30 2 0:1 / {new}/fs rw - cgroup2 cgroup2 rw\n",
        {"fs/user/job/memory.events": "oom 9\noom_kill 3\n", "vmstat": "oom_kill 8\n"},
    )
    assert build.build_runner.oom_kills(proc) == 3
    assert build.build_runner.memory_groups(proc) == [f"{new}/fs/user/job", f"{new}/fs/user", f"{new}/fs"]
    proc = _tree(
        old, "4:cpu:/x\n3:memory:/docker/1\n0::/\n",
        f"30 2 0:1 / {old}/cpu rw - cgroup cgroup rw,cpu\n31 2 0:1 /docker/1 {old}/fs rw - cgroup cgroup rw,memory\n",
        {"fs/memory.oom_control": "oom_kill_disable 0\noom_kill 4\n"},
    )
    assert build.build_runner.oom_kills(proc) == 4
    assert build.build_runner.oom_kills(_tree(none, "0::/\n", "", {"vmstat": "nr 1\noom_kill 8\n"})) == 8
    assert build.build_runner.oom_kills(str(tmp_path / "nowhere")) is None


def test_without_a_source_it_is_asked_for(tmp_path: Path) -> None:
    answer = build.start(request(tmp_path), None)
    assert answer["state"] == "needs_source" and not answer["started"]
    assert answer["upload"] == f"{tmp_path}/mamba_ssm-abababababab/source.tar"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"python": "/no/python"}, "no interpreter /no/python"),
        ({"sm": "87"}, "no compiler /nowhere/cuda/bin/nvcc"),
        ({"disk_mb": 1 << 40}, "MB free"),
        ({"flags": ("-O3",)}, "build flag"),
    ],
)
def test_what_a_device_lacks_is_said_first(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(Problem, match=message):
        build.start(request(tmp_path, **more), None)


def test_a_folder_with_blanks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="blanks"):
        build.start(request(tmp_path / "a b"), None)


# ---------------------------------------------------------------- source


def _tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> str:
    import hashlib

    with tarfile.open(path, "w") as handle:
        for member, content in members:
            member.size = len(content)
            handle.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_a_source_is_unpacked_whole_or_not_at_all(tmp_path: Path) -> None:
    archive = tmp_path / "s.tar"
    digest = _tar(archive, (_info("a/b.py"), b"x"), (_info("l", tarfile.SYMTYPE, "a/b.py"), b""))
    with pytest.raises(Problem, match="arrived with"):
        build.unpack_source(str(archive), "0" * 64, str(tmp_path))
    assert not (tmp_path / "src").exists()
    build.unpack_source(str(archive), digest, str(tmp_path))
    assert (tmp_path / "src/a/b.py").read_text() == "x" and (tmp_path / "src/l").read_text() == "x"


@pytest.mark.parametrize(
    "members",
    [
        [(_info("../evil"), b"x")],
        [(_info("/evil-8812"), b"x")],
        [(_info("l", tarfile.SYMTYPE, "../../evil"), b"")],
        [(_info("l", tarfile.SYMTYPE, "/etc"), b""), (_info("l/evil"), b"x")],
        [(_info("f", tarfile.FIFOTYPE), b"")],
    ],
)
def test_nothing_leads_out_of_a_source(members: list[tuple[tarfile.TarInfo, bytes]], tmp_path: Path) -> None:
    inner = tmp_path / "job"
    inner.mkdir()
    digest = _tar(inner / "s.tar", *members)
    with pytest.raises(Problem, match="the source holds"):
        build.unpack_source(str(inner / "s.tar"), digest, str(inner))
    assert not list(tmp_path.rglob("evil*")) and not (inner / "src").exists()


# ---------------------------------------------------------------- wheel

ABI = "cp{}{}".format(*sys.version_info[:2])


def _finished(folder: Path, gpu: bytes = b"", machine: str = "aarch64", version: str = "2.2.4", **more: Any) -> Path:
    """Make a job that is done, with a wheel for this interpreter that says it is for aarch64."""
    soabi = f"cpython-{ABI[2:]}-aarch64-linux-gnu"
    wheel = folder / "wheel"
    wheel.mkdir(parents=True)
    (folder / "job.json").write_text("{}")
    (folder / "rc.json").write_text(json.dumps({"rc": 0, "seconds": 5.0, "ended_at": 1700000000}))
    files = {f"selective_scan_cuda.{soabi}.so": make_elf(machine, glibc=["GLIBC_2.17"], gpu=gpu)}
    return make_wheel(wheel, "mamba_ssm", version, f"{ABI}-{ABI}-linux_aarch64", files=files, **more)


def test_a_finished_job_is_kept_until_its_wheel_changes(tmp_path: Path) -> None:
    wanted = request(tmp_path)
    folder = Path(wanted.folder)
    path = _finished(folder)
    found = build.result(wanted, "aarch64")
    assert found["seconds"] == 5.0 and found["built_at"] == "2023-11-14T22:13:20Z" and found["cubins"] == []
    assert found["tags"] == [f"{ABI}-{ABI}-linux_aarch64"] and found["version"] == "2.2.4"
    assert list(found["libraries"].values()) == ["aarch64"] and len(found["sha256"]) == 64
    assert json.loads((folder / "result.json").read_text()) == found
    assert not list((folder / "tmp").iterdir())
    assert build.is_finished(wanted)
    assert build.start(wanted, None) == {
        "state": "done", "started": False, "resumed": False, "upload": f"{folder}/source.tar",
    }
    with open(path, "ab") as handle:
        handle.write(b"x")
    assert not build.is_finished(wanted)
    assert build.start(wanted, None)["state"] == "needs_source"


@pytest.mark.parametrize(
    ("wheel", "sm", "message"),
    [
        ({"machine": "x86_64", "inside_tag": f"{ABI}-{ABI}-linux_x86_64"}, "cpu", "WHEEL file says .* is for x86_64"),
        ({"version": "2.2.5"}, "cpu", "by its name it is mamba_ssm 2.2.5"),
        ({"record": lambda text: text.replace("sha256=", "sha256=x")}, "cpu", "differs from its RECORD hash"),
        ({"gpu": container(entry(72), entry(90, flags=0x100011))}, "87", "code for sm_72, sm_90a, not for sm_87"),
        ({"gpu": container(entry(87))}, "cpu", "this class has no GPU"),
        ({}, "87", "no GPU code at all"),
    ],
)
def test_a_wheel_that_does_not_fit_is_refused(wheel: dict[str, Any], sm: str, message: str, tmp_path: Path) -> None:
    wanted = request(tmp_path, sm=sm)
    _finished(Path(wanted.folder), **wheel)
    with pytest.raises(Problem, match=message) as refusal:
        build.result(wanted, "aarch64")
    assert f"{wanted.folder}/log" in refusal.value.next_step
    assert not Path(wanted.folder, "result.json").exists()


def test_code_for_the_gpu_is_listed_without_the_toolkit(tmp_path: Path) -> None:
    wanted = request(tmp_path, sm="87")
    _finished(Path(wanted.folder), gpu=container(entry(87), entry(90, flags=0x100011)))
    with pytest.raises(Problem, match="holds code for sm_87, sm_90a") as caught:
        build.result(wanted, "aarch64")
    assert caught.value.expected == "code for sm_87 alone"
    assert f"{wanted.folder}/log" in caught.value.next_step and "PYTORCH_NVCC" in caught.value.next_step
    assert "JETSON_MAMBA_ARCHITECTURES=upstream in mamba_ssm_build_flags" in caught.value.next_step
    found = build.result(wanted._replace(flags=("JETSON_MAMBA_ARCHITECTURES=upstream",)), "aarch64")
    assert found["cubins"] == ["87", "90a"] and "sm_90a" in found["warnings"][0] and found["needed"] == []


def test_an_interpreter_that_is_gone_is_named(tmp_path: Path) -> None:
    wanted = request(tmp_path, python="/nowhere/python")
    _finished(Path(wanted.folder))
    with pytest.raises(Problem, match="/nowhere/python does not run"):
        build.result(wanted, "aarch64")


def test_a_job_is_discarded_whole_unless_it_runs(job: Any, tmp_path: Path) -> None:
    begin, wanted = job
    gate = tmp_path / "gate"
    begin(f"import os,time\nwhile not os.path.exists({str(gate)!r}): time.sleep(.05)")
    with pytest.raises(Problem, match="is running"):
        build.discard(wanted.folder)
    gate.touch()
    wait_for(wanted.folder, "done")
    build.discard(wanted.folder)
    assert not os.path.exists(wanted.folder)
    build.discard(wanted.folder)
