"""The runner against interpreters that behave, crash, hang or are not there."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import smoke_runner as runner
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

FAKE = """#!{python}
import json, os, signal, sys, time
request = json.load(open(sys.argv[2]))
behaviour = json.load(open({behaviour!r}))
open({log!r}, "a").write(json.dumps([request["components"], dict(os.environ), os.getcwd()]) + "\\n")
def emit(**event):
    print(json.dumps(event), flush=True)
for name in request["components"]:
    what = behaviour.get(name, "passed")
    emit(event="start", component=name)
    emit(event="case", component=name, case="fp16 seqlen 67")
    if what == "crash":
        sys.stderr.write("Fatal Python error: Segmentation fault\\n  File \\"kernel.py\\", line 7 in launch\\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "exit":
        sys.exit(3)
    if what == "hang":
        time.sleep(60)
    extra = behaviour.get("extra", {{}}).get(name, {{}})
    status, _, message = what.partition(": ")
    print("a line that is no event", flush=True)
    emit(event="result", component=name, status=status, dtypes=["float32"], shapes_in=[1], shapes_out=[1],
         max_error=0.5, tolerance=1.0, cases=1, failures=[], notes=[], seconds=0.1, message=message, extra=extra)
"""


class Bench:
    """An interpreter that answers as a test tells it to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.behaviour: dict[str, Any] = {}
        self.python = folder / "python"
        self.log = folder / "log"
        text = FAKE.format(python=sys.executable, behaviour=str(folder / "behaviour"), log=str(self.log))
        self.python.write_text(text)
        self.python.chmod(0o755)
        self.scratch = folder / "scratch"
        self.scratch.mkdir()

    def run(self, **settings: Any) -> dict[str, Any]:
        (self.folder / "behaviour").write_text(json.dumps(self.behaviour))
        settings.setdefault("device", "cpu")
        return runner.run(runner.Settings(python=str(self.python), scratch=str(self.scratch), **settings))

    def started(self) -> list[list[str]]:
        return [json.loads(line)[0] for line in self.log.read_text().splitlines()]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def row(report: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [item for item in report["components"] if item["component"] == name]
    return found


def test_all_pass_and_nothing_is_left(bench: Bench) -> None:
    report = bench.run()
    assert report["overall"] == "passed" and report["schema"] == 1
    assert [item["component"] for item in report["components"]] == list(runner.COMPONENTS)
    assert list(bench.scratch.iterdir()) == []


def test_a_cpu_pass_says_that_it_is_one(bench: Bench) -> None:
    report = bench.run()
    assert row(report, "mamba_module")["kernels"] == "cpu"
    assert row(report, "mamba_module")["message"] == "cpu kernels"
    assert row(report, "linkage_selective_scan_cuda")["kernels"] == ""


def test_import_components_each_get_a_fresh_interpreter(bench: Bench) -> None:
    bench.run()
    started = bench.started()
    for name in runner.ALONE:
        assert [name] in started
    assert list(runner.KERNELS) in started


def test_a_crash_costs_one_component_and_the_rest_goes_on_afresh(bench: Bench) -> None:
    bench.behaviour = {"causal_conv1d_update": "crash"}
    report = bench.run()
    crashed = row(report, "causal_conv1d_update")
    assert crashed["status"] == "failed" and report["overall"] == "failed"
    assert crashed["message"].startswith("killed by signal 11 (SIGSEGV) during fp16 seqlen 67: Fatal Python error")
    assert "kernel.py" in crashed["message"]
    assert row(report, "mamba_module")["status"] == "passed"
    assert bench.started()[-1] == list(runner.KERNELS[3:])


def test_two_crashes_in_a_row_and_one_at_the_end(bench: Bench) -> None:
    bench.behaviour = {"selective_scan_fn": "crash", "mamba_inner_fn": "crash", "torchvision_nms": "crash"}
    report = bench.run()
    failed = [item["component"] for item in report["components"] if item["status"] == "failed"]
    assert failed == ["selective_scan_fn", "mamba_inner_fn", "torchvision_nms"]


def test_an_exit_without_a_result_is_a_failure(bench: Bench) -> None:
    bench.behaviour = {"import_mamba_ssm": "exit"}
    report = bench.run()
    assert "ended with status 3" in row(report, "import_mamba_ssm")["message"]


def test_a_hang_ends_at_the_time_out(bench: Bench) -> None:
    bench.behaviour = {"mamba_module": "hang"}
    report = bench.run(timeout=2)
    assert row(report, "mamba_module")["message"] == "no result within 2 s during fp16 seqlen 67"
    assert row(report, "mamba_generation")["status"] == "passed"


def test_mamba_components_are_not_run_where_the_import_failed(bench: Bench) -> None:
    bench.behaviour = {"import_mamba_ssm": "failed: no attribute '_all_gather_base'"}
    report = bench.run()
    assert row(report, "mamba_module")["status"] == "not run"
    assert row(report, "causal_conv1d_fn")["status"] == "passed"
    assert report["overall"] == "failed"


def test_no_gpu_fails_and_kernels_are_not_run(bench: Bench) -> None:
    bench.behaviour = {"device": "failed: no usable GPU"}
    report = bench.run(device="cuda", min_free_mb=1)
    assert report["overall"] == "failed"
    assert {row(report, name)["status"] for name in runner.KERNELS} == {"not run"}


def test_short_memory_is_busy_and_touches_no_gpu(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "available_memory_mb", lambda: 300)
    holder = {"pid": 42, "command": "yolo --serve", "memory_mb": 5000}
    monkeypatch.setattr(runner, "gpu_holders", lambda own: ([holder], 2))
    report = bench.run(device="cuda")
    busy = row(report, "mamba_module")
    assert busy["status"] == "not tested: busy" and report["overall"] == "busy"
    assert "300 MB free, 1024 MB needed" in busy["message"] and "pid 42 (yolo --serve, 5000 MB)" in busy["message"]
    assert report["holders"] == [holder]
    assert not any("device" in names for names in bench.started())


def test_short_gpu_memory_is_busy(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "available_memory_mb", lambda: 9000)
    bench.behaviour = {"extra": {"device": {"gpu": {"free_mb": 100}}}}
    report = bench.run(device="cuda")
    assert row(report, "device")["status"] == "passed"
    assert row(report, "mamba_module")["status"] == "not tested: busy" and report["overall"] == "busy"


def test_failed_for_want_of_memory_counts_as_busy_only_while_memory_is_short(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.behaviour = {"mamba_module": "failed: torch.OutOfMemoryError: CUDA out of memory"}
    answers = iter([9000, 200, 9000, 9000])
    monkeypatch.setattr(runner, "available_memory_mb", lambda: next(answers))
    assert row(bench.run(device="cuda"), "mamba_module")["status"] == "not tested: busy"
    assert row(bench.run(device="cuda"), "mamba_module")["status"] == "failed"


def test_a_failure_outweighs_busy() -> None:
    rows = [runner.make_result("device", "failed", "", "cuda"), runner.make_result("mamba_module", runner.BUSY, "", "")]
    assert runner.overall(rows, ["device", "mamba_module"]) == "failed"


def test_a_subset_never_passes(bench: Bench) -> None:
    report = bench.run(components=("mamba_module",))
    assert report["overall"] == "incomplete"
    assert [item["component"] for item in report["components"]] == ["mamba_module"]


def test_a_run_without_any_kernel_never_passes(bench: Bench) -> None:
    bench.behaviour = dict.fromkeys(runner.KERNELS, "not run: no such thing")
    assert bench.run()["overall"] == "incomplete"


def test_missing_interpreter_is_a_problem() -> None:
    with pytest.raises(Problem, match="no interpreter at /nowhere/python"):
        runner.run(runner.Settings(python="/nowhere/python"))


def test_unknown_component_is_a_problem(bench: Bench) -> None:
    with pytest.raises(Problem, match="unknown component mamba3"):
        bench.run(components=("mamba3",))


def test_children_keep_every_cache_in_the_scratch_folder(bench: Bench) -> None:
    bench.run(components=("import_mamba_ssm",), cuda_home="/usr/local/cuda-12.6")
    _names, environment, folder = json.loads(bench.log.read_text())
    assert folder.startswith(str(bench.scratch)) and environment["TMPDIR"] == folder
    for name in ("TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "XDG_CACHE_HOME", "HF_HOME"):
        assert environment[name].startswith(folder)
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1" and environment["CUDA_HOME"]


def test_shim_that_was_changed_is_named_and_an_absent_one_is_left_to_its_own_component(
    bench: Bench, tmp_path: Path
) -> None:
    shim = tmp_path / "jetson_mamba_shim.py"
    shim.write_text("changed")
    report = bench.run(expected_files={str(shim): "0" * 64, str(tmp_path / "absent.pth"): "0" * 64})
    files = row(report, "installed_files")
    assert files["status"] == "failed" and str(shim) in files["message"] and "absent.pth" not in files["message"]


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    nvcc = tmp_path / "cuda-12.6" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    return nvcc.parent.parent


@pytest.mark.parametrize(("line", "status"), [("export CUDA_HOME={}", "passed"), ("echo welcome", "failed")])
def test_cuda_home_is_what_a_login_shell_has(
    toolkit: Path, tmp_path: Path, line: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".bash_profile").write_text("echo a greeting\n" + line.format(toolkit) + "\n")
    settings = runner.Settings(python=sys.executable, cuda_home=str(toolkit))
    found = runner.test_environment(settings, str(tmp_path))
    assert found["status"] == status
    if status == "failed":
        assert "not set, expected " + str(toolkit) in found["message"]


def test_cuda_home_without_nvcc_fails(toolkit: Path, tmp_path: Path) -> None:
    (toolkit / "bin" / "nvcc").unlink()
    found = runner.test_environment(runner.Settings(python=sys.executable, cuda_home=str(toolkit)), str(tmp_path))
    assert found["status"] == "failed" and "has no bin/nvcc" in found["message"]


def test_holders_are_read_from_open_files(tmp_path: Path) -> None:
    for pid, target in (("10", "/dev/nvhost-gpu"), ("11", "/dev/null"), ("12", "/dev/nvidia0"), ("13", "/dev/nvmap")):
        folder = tmp_path / pid / "fd"
        folder.mkdir(parents=True)
        (folder / "3").symlink_to(target)
        (tmp_path / pid / "cmdline").write_bytes(b"python3\0train.py\0")
        (tmp_path / pid / "status").write_text(f"Name:\tx\nVmRSS:\t {int(pid) * 1024} kB\n")
    holders, hidden = runner.gpu_holders(str(tmp_path), own=(13,))
    assert [item["pid"] for item in holders] == [12, 10] and hidden == 0
    assert holders[0] == {"pid": 12, "command": "python3 train.py", "memory_mb": 12}


def test_memory_available_is_read_in_mb(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable:    2097152 kB\n")
    assert runner.available_memory_mb(str(tmp_path / "meminfo")) == 2048
    assert runner.available_memory_mb(str(tmp_path / "nothing")) is None


def test_killed_by_the_kernel_says_what_that_usually_means() -> None:
    assert "signal 9 (SIGKILL), the kernel's out-of-memory killer" in runner.describe_exit(-9)


def test_failure_message_lists_components_with_reasons_first() -> None:
    rows = [
        runner.make_result("device", "passed", "", "cuda"),
        runner.make_result("mamba_inner_fn", "failed", "backward: TypeError", "cuda"),
    ]
    message = runner.failure_message({"components": rows, "device": "cuda"})
    assert message.splitlines()[:2] == [
        "found:    1 of 2 components failed:",
        "- mamba_inner_fn: backward: TypeError",
    ]


# --- the module --------------------------------------------------------------------------------------------------

MODULE = "ansible_collections.jetson.mamba.plugins.modules.kernel_smoke_tests"


def call_module(bench: Bench, **arguments: Any) -> tuple[int, dict[str, Any]]:
    (bench.folder / "behaviour").write_text(json.dumps(bench.behaviour))
    arguments.setdefault("python", str(bench.python))
    arguments.setdefault("_ansible_remote_tmp", str(bench.scratch))
    given = json.dumps({"ANSIBLE_MODULE_ARGS": {"device": "cpu", **arguments}})
    # core 2.19 and later want to know how the arguments are written
    code = (
        f"import json, sys, ansible.module_utils.basic as b; b._ANSIBLE_ARGS = {given!r}.encode(); "
        "b._ANSIBLE_PROFILE = 'legacy'; "
        f"from {MODULE} import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_module_returns_the_report_and_no_change(bench: Bench) -> None:
    code, result = call_module(bench)
    assert code == 0 and result["changed"] is False and result["report"]["overall"] == "passed"
    assert result["report"]["kind"] == runner.KIND


def test_module_fails_with_reasons_and_report(bench: Bench) -> None:
    bench.behaviour = {"mamba_inner_fn": "failed: backward: TypeError"}
    code, result = call_module(bench)
    assert code == 1 and result["failed"] is True
    assert "- mamba_inner_fn: backward: TypeError" in result["msg"].splitlines()
    assert row(result["report"], "mamba_inner_fn")["status"] == "failed"


def test_module_in_check_mode_runs_nothing_and_passes_nothing(bench: Bench) -> None:
    code, result = call_module(bench, _ansible_check_mode=True)
    assert code == 0 and result["skipped"] is True and "report" not in result
    assert "not run (check mode)" in result["msg"] and not bench.log.exists()


def test_module_names_a_missing_environment(bench: Bench) -> None:
    code, result = call_module(bench, python="/nowhere/bin/python")
    assert code == 1 and "provision this host first" in result["msg"]
    assert stat.S_ISREG(os.stat(bench.python).st_mode)
