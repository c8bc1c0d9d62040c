"""The parts of the smoke tests that need no torch, and the script as a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import smoke_components as components

SCRIPT = components.__file__


def write_elf(path: Path, machine: int) -> Path:
    path.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 3, machine) + bytes(44))
    return path


def run_trial(name: str, component: Any, **request: Any) -> dict[str, Any]:
    events: list[dict[str, Any]] = []
    asked = components.Request({"components": [name], "device": "cpu", **request})
    kept = components.COMPONENTS
    components.COMPONENTS = {name: component}
    try:
        return components.run_component(name, asked, events.append)
    finally:
        components.COMPONENTS = kept


def run_script(tmp_path: Path, names: list[str], **environment: str) -> tuple[int, list[dict[str, Any]]]:
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"components": names, "device": "cpu"}))
    done = subprocess.run(
        [sys.executable, SCRIPT, str(request)], capture_output=True, env={**os.environ, **environment}, check=False
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("machine", "found", "words"),
    [("x86_64", 183, "is for AArch64, expected x86-64"), ("aarch64", 62, "is for x86-64, expected AArch64")],
)
def test_wrong_machine_names_file_and_both_machines(tmp_path: Path, machine: str, found: int, words: str) -> None:
    path = str(write_elf(tmp_path / "a.so", found))
    assert components.wrong_machine(path, machine) == f"{path} {words}"


def test_right_machine_is_silent(tmp_path: Path) -> None:
    assert components.wrong_machine(str(write_elf(tmp_path / "a.so", 183)), "aarch64") is None


def test_text_in_place_of_a_library_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.so"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "no ELF file, expected x86-64" in str(components.wrong_machine(str(path), "x86_64"))


def test_extension_of_another_machine_is_found_though_python_would_not(tmp_path: Path) -> None:
    foreign = tmp_path / "selective_scan_cuda.cpython-310-aarch64-linux-gnu.so"
    foreign.write_bytes(b"")
    (tmp_path / "selective_scan_cuda_core.py").write_bytes(b"")
    assert components.extension_files("selective_scan_cuda", [str(tmp_path), "/nowhere"]) == [str(foreign)]


def test_linkage_names_the_foreign_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = 183 if os.uname().machine == "x86_64" else 62
    path = write_elf(tmp_path / "selective_scan_cuda.cpython-39-other.so", other)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = run_trial("linkage", components.linkage("selective_scan_cuda"))
    assert result["status"] == "failed"
    assert str(path) in result["message"] and "ModuleNotFoundError" in result["message"]


def test_linkage_refuses_an_interpreter_that_has_torch_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", object())
    result = run_trial("linkage", components.linkage("json"))
    assert result["status"] == "failed" and "torch was imported when the interpreter started" in result["message"]


def make_distribution(folder: Path, name: str, files: dict[str, bytes]) -> None:
    lines = []
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
        digest = components.base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(content)}")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text("\n".join([*lines, f"{info.name}/RECORD,,", f"{name}/x.pyc,,"]) + "\n")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_distribution(tmp_path, "causal_conv1d", {"causal_conv1d/__init__.py": b"one", "causal_conv1d/two.py": b"two"})
    make_distribution(tmp_path, "mamba_ssm", {"mamba_ssm/__init__.py": b"three"})
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_untouched_files_pass_and_are_counted(installed: Path) -> None:
    result = run_trial("installed_files", components.installed_files)
    assert (result["status"], result["cases"]) == ("passed", 3)
    assert result["extra"]["versions"]["mamba_ssm"] == "1.0"


def test_one_changed_byte_is_named(installed: Path) -> None:
    (installed / "causal_conv1d" / "two.py").write_bytes(b"twO")
    result = run_trial("installed_files", components.installed_files)
    assert result["status"] == "failed"
    assert "causal_conv1d/two.py differs from its RECORD" in result["message"]


def test_missing_file_and_missing_package_are_named(installed: Path) -> None:
    (installed / "mamba_ssm" / "__init__.py").unlink()
    result = run_trial(
        "installed_files", components.installed_files, distributions=["causal_conv1d", "mamba_ssm", "not_there_at_all"]
    )
    assert "mamba_ssm/__init__.py: No such file" in result["message"]
    assert "not_there_at_all is not installed" in result["message"]


def test_no_shared_object_is_a_failure_not_a_pass(installed: Path) -> None:
    result = run_trial("binary_machine", components.binary_machine)
    assert result["status"] == "failed" and "no shared object" in result["message"]


def test_a_component_without_a_single_case_has_not_passed() -> None:
    result = run_trial("nothing", lambda trial: trial.notes.append("fp16 not run: no such dtype"))
    assert (result["status"], result["message"]) == ("not run", "fp16 not run: no such dtype")


def test_cases_go_on_after_a_failure_and_name_their_phase() -> None:
    seen = []

    def component(trial: components.Trial) -> None:
        def breaks() -> None:
            trial.phase = "backward"
            raise TypeError("causal_conv1d_bwd(): incompatible function arguments. The following are supported: x")

        trial.case("seqlen 67", "float32", breaks)
        trial.case("seqlen 67", "float16", lambda: seen.append(trial.phase))

    result = run_trial("two", component)
    assert seen == ["forward"] and result["cases"] == 2 and result["status"] == "failed"
    assert result["message"].startswith("fp32 seqlen 67: backward: TypeError: causal_conv1d_bwd(): incompatible")
    assert "The following" not in result["message"] and "is the patch" in result["message"]


def test_the_same_failure_in_three_dtypes_is_told_once() -> None:
    lines = ["fp32 a: forward: x: y", "fp16 a: forward: x: y", "no RECORD", "1: b", "2: c"]
    assert components.summarise(lines) == "fp32 a, fp16 a: forward: x: y; no RECORD; 1: b; and 1 more"


def test_fast_path_must_have_been_called() -> None:
    watch = components.Watch(components.Trial(components.Request({"components": []}), lambda event: None, "x"))
    watch.calls["selective_scan_cuda.fwd"] = 1
    watch.demand("forward", "selective_scan_cuda.fwd")
    with pytest.raises(components.Mismatch, match=r"the fast path did not run: causal_conv1d_cuda\.causal_conv1d_fwd"):
        watch.demand("forward", *components.MAMBA_FORWARD)


def test_calls_are_counted_and_the_extensions_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, points in components.ENTRY_POINTS.items():
        (tmp_path / f"{name}.py").write_text("".join(f"def {point}(*a): return a\n" for point in points))
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = components.load("causal_conv1d_cuda")
    original = module.causal_conv1d_fwd
    calls: dict[str, int] = {}
    with components.counted(calls):
        assert module.causal_conv1d_fwd(1, 2) == (1, 2)
    assert calls == {"causal_conv1d_cuda.causal_conv1d_fwd": 1} and module.causal_conv1d_fwd is original
    for name in components.ENTRY_POINTS:
        sys.modules.pop(name, None)


def test_smallest_tile_is_chosen() -> None:
    class Config:
        def __init__(self, **kwargs: int) -> None:
            self.kwargs = kwargs

    small, large = Config(BLOCK_SIZE_M=32, BLOCK_SIZE_N=64, other=9), Config(BLOCK_SIZE_M=128, BLOCK_SIZE_N=256)
    assert min([large, small], key=components._tile) is small


def test_script_keeps_events_apart_from_what_libraries_print(tmp_path: Path) -> None:
    (tmp_path / "causal_conv1d_cuda.py").write_text("print('a banner on standard output')\n")
    code, events = run_script(tmp_path, ["linkage_causal_conv1d_cuda"], PYTHONPATH=str(tmp_path))
    assert code == 0
    assert [event["event"] for event in events] == ["start", "result"]
    assert events[1]["status"] == "passed"


def test_script_reports_a_missing_torch_as_a_failure(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libc10.so: cannot open shared object file')\n")
    _code, events = run_script(tmp_path, ["torch_distributed_names", "device"], PYTHONPATH=str(tmp_path))
    results = [event for event in events if event["event"] == "result"]
    assert [row["status"] for row in results] == ["failed", "failed"]
    assert "libc10.so" in results[0]["message"]


def test_script_names_the_missing_distributed_names(tmp_path: Path) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("from torch import distributed\n")
    (package / "distributed.py").write_text("def all_gather_into_tensor(): pass\ndef reduce_scatter_tensor(): pass\n")
    _code, events = run_script(tmp_path, ["torch_distributed_names"], PYTHONPATH=str(tmp_path))
    assert "no _all_gather_base, _reduce_scatter_base: the shim is missing" in events[-1]["message"]


def test_top_of_the_script_imports_the_standard_library_only() -> None:
    lines = Path(SCRIPT).read_text(encoding="utf-8").splitlines()
    imports = [line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))]
    assert set(imports) <= set(sys.stdlib_module_names)
