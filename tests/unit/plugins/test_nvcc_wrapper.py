"""The compiler that compiles for one GPU only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import nvcc_wrapper

WANTED = ["-gencode", "arch=compute_87,code=sm_87"]


@pytest.mark.parametrize(
    "flags",
    [
        ["-gencode", "arch=compute_53,code=sm_53"],
        ["-gencode=arch=compute_53,code=sm_53"],
        ["--generate-code", "arch=compute_90,code=[sm_90,compute_90]"],
        ["--generate-code=arch=compute_90,code=sm_90"],
        ["-arch", "sm_70"],
        ["-arch=native"],
        ["--gpu-architecture", "compute_70"],
        ["--gpu-architecture=all-major"],
        ["-code", "sm_70,sm_72"],
        ["-code=sm_70"],
        ["--gpu-code", "sm_70"],
        ["--gpu-code=sm_70"],
        ["-gencode", "arch=compute_53,code=sm_53", "-gencode", "arch=compute_87,code=sm_87", "-arch=sm_90"],
    ],
)
def test_every_spelling_is_replaced(flags: list[str]) -> None:
    line = nvcc_wrapper.command(["-O3", *flags, "-c", "a.cu"], "/cuda/bin/nvcc", "87")
    assert line == ["/cuda/bin/nvcc", "-O3", "-c", "a.cu", *WANTED]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-Xcompiler", "-march=armv8-a", "--threads", "4", "--use_fast_math", "-lineinfo", "--ptxas-options=-v"],
        ["-Xcompiler", "-arch", "-o", "-code", "-DX=-arch"],
        ["--compiler-options", "-gencode", "-MD", "-MF", "a.d", "--archive"],
    ],
)
def test_everything_else_stays_where_it_is(arguments: list[str]) -> None:
    assert nvcc_wrapper.drop_architectures(arguments) == arguments


@pytest.mark.parametrize("flag", sorted(nvcc_wrapper._FOREIGN_FLAGS | {"-Xptxas", "-Xnvlink", "-Xcompiler", "-o"}))
def test_what_belongs_to_another_program_is_left_to_it(flag: str) -> None:
    assert nvcc_wrapper.drop_architectures([flag, "-arch=sm_70", "-arch=sm_70"]) == [flag, "-arch=sm_70"]


@pytest.mark.parametrize("question", ["--version", "-V", "--list-gpu-arch", "-h"])
def test_questions_are_passed_on(question: str) -> None:
    assert nvcc_wrapper.command([question], "/nvcc", "87") == ["/nvcc", question]


def test_a_response_file_is_named_on_unless_it_holds_architectures(tmp_path: Path) -> None:
    plain, listed = tmp_path / "plain", tmp_path / "listed"
    plain.write_text("-O3 -DA='b c'\n")
    listed.write_text("-O3 -gencode arch=compute_53,code=sm_53\n-arch=sm_70 '-DA=b c'\n")
    assert nvcc_wrapper.drop_architectures(["-optf", str(plain)]) == ["-optf", str(plain)]
    assert nvcc_wrapper.drop_architectures([f"--options-file={listed}", "x"]) == ["-O3", "-DA=b c", "x"]


@pytest.mark.parametrize("sm", ["", "sm_87", "cpu", "8", "87 -x"])
def test_a_wrong_number_is_refused(sm: str) -> None:
    with pytest.raises(ValueError, match="compute capability"):
        nvcc_wrapper.wanted_flags(sm)


@pytest.fixture
def wrapper(tmp_path: Path) -> Path:
    """The wrapper as it is put on a device."""
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(nvcc_wrapper.script(sys.executable))
    path.chmod(0o755)
    return path


def _run(wrapper: Path, arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run([str(wrapper), *arguments], env=environment, capture_output=True, text=True, check=False)


def test_the_script_becomes_the_real_nvcc(wrapper: Path, tmp_path: Path) -> None:
    fake = tmp_path / "fake nvcc"
    fake.write_text('#!/bin/sh\nfor one in "$@"; do echo "<$one>"; done\necho "{$NVCC_APPEND_FLAGS}"\nexit 7\n')
    fake.chmod(0o755)
    done = _run(
        wrapper,
        ["-gencode", "arch=compute_53,code=sm_53", "-D", "A=x y", "-c", "a.cu"],
        JETSON_MAMBA_NVCC=str(fake),
        JETSON_MAMBA_SM="87",
        NVCC_APPEND_FLAGS="-arch=sm_90 -lineinfo",
    )
    assert done.returncode == 7
    assert done.stdout.splitlines() == [
        "<-D>", "<A=x y>", "<-c>", "<a.cu>", "<-gencode>", "<arch=compute_87,code=sm_87>", "{-lineinfo}",
    ]


def test_the_script_says_what_it_lacks(wrapper: Path) -> None:
    done = _run(wrapper, ["-c", "a.cu"], JETSON_MAMBA_SM="87")
    assert done.returncode == 2
    assert "JETSON_MAMBA_NVCC=''" in done.stderr


@pytest.mark.skipif("JETSON_MAMBA_TEST_NVCC" not in os.environ, reason="needs JETSON_MAMBA_TEST_NVCC=/path/of/nvcc")
def test_a_real_nvcc_compiles_for_one_gpu(wrapper: Path, tmp_path: Path) -> None:
    real = os.environ["JETSON_MAMBA_TEST_NVCC"]
    source, target = tmp_path / "a.cu", tmp_path / "a.o"
    source.write_text("__global__ void twice(float *x) {\n  x[threadIdx.x] *= 2;\n}\n")
    flags = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90)]
    done = _run(wrapper, [*flags, "-c", str(source), "-o", str(target)], JETSON_MAMBA_NVCC=real, JETSON_MAMBA_SM="87")
    assert done.returncode == 0, done.stderr
    # the names of the cubins stand in the fat binary; where there is no cuobjdump, the verbose plan tells
    tool = Path(real).resolve().parent / "cuobjdump"
    if tool.exists():
        command = [str(tool), "--list-elf", str(target)]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    else:
        listed = _run(
            wrapper, [*flags, "--dryrun", "-c", str(source)], JETSON_MAMBA_NVCC=real, JETSON_MAMBA_SM="87"
        ).stderr
    assert "sm_87" in listed
    assert "sm_80" not in listed and "sm_90" not in listed
