"""The compiler that compiles for one GPU only."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import fatbin, nvcc_wrapper

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
    line = nvcc_wrapper.command(["-O3", *flags, "-c", "a.cu"], "/cuda/bin/nvcc", "87", "/nowhere")
    assert line == ["/cuda/bin/nvcc", "-O3", "-c", "a.cu", *WANTED]


def test_link_time_optimisation_gets_the_spelling_that_nvcc_allows_there() -> None:
    line = nvcc_wrapper.command(["-dlto", "-arch=lto_80", "-c", "a.cu"], "/nvcc", "87", "/nowhere")
    assert line == ["/nvcc", "-dlto", "-c", "a.cu", "-arch=sm_87"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-Xcompiler", "-march=armv8-a", "--threads", "4", "--use_fast_math", "-lineinfo", "--ptxas-options=-v"],
        ["-Xcompiler", "-arch", "-o", "-code", "-DX=-arch"],
        ["--compiler-options", "-gencode", "-MD", "-MF", "a.d", "--archive"],
    ],
)
def test_everything_else_stays_where_it_is(arguments: list[str]) -> None:
    assert nvcc_wrapper.drop_architectures(arguments, "/nowhere") == arguments


@pytest.mark.parametrize("flag", ["-Xptxas", "-Xnvlink", "-Xcompiler", "-o", "-I", "-D", "--linker-options", "-MF"])
def test_what_belongs_to_another_option_is_left_to_it(flag: str) -> None:
    assert nvcc_wrapper.drop_architectures([flag, "-arch=sm_70", "-arch=sm_70"], "/nowhere") == [flag, "-arch=sm_70"]


def test_a_question_to_another_program_is_none_to_nvcc() -> None:
    line = nvcc_wrapper.command(["-Xcompiler", "-V", "-arch=sm_70", "-c", "a.cu"], "/nvcc", "87", "/nowhere")
    assert line == ["/nvcc", "-Xcompiler", "-V", "-c", "a.cu", *WANTED]


@pytest.mark.parametrize("question", ["--version", "-V", "--list-gpu-arch", "-h"])
def test_questions_are_passed_on(question: str) -> None:
    assert nvcc_wrapper.command([question], "/nvcc", "87", "/nowhere") == ["/nvcc", question]


def test_an_option_file_is_named_on_unless_it_holds_architectures(tmp_path: Path) -> None:
    plain, listed, outer = tmp_path / "plain", tmp_path / "listed", tmp_path / "outer"
    plain.write_text("-O3 -DA='b c'\n")
    text = """-O3 -gencode "arch=compute_53, code=sm_53"\n-arch=sm_70 -DQ='x "-DA=b c"  -DB=\\"\n"""
    listed.write_text(text)
    outer.write_text(f"-lineinfo --options-file {listed} -G")
    assert nvcc_wrapper.drop_architectures(["-optf", str(plain)], str(tmp_path)) == ["-optf", str(plain)]
    flag, rest = nvcc_wrapper.drop_architectures(["-optf", f"{plain},{listed}"], str(tmp_path))
    assert flag == "-optf" and rest.split(",")[0] == str(plain)
    cut = Path(rest.split(",")[1])
    # nvcc's own quoting is kept byte for byte: single quotes mean nothing to it
    assert cut.read_text() == """-O3 -DQ='x "-DA=b c"  -DB=\\"\n"""
    assert listed.read_text() == text
    flag, whole, last = nvcc_wrapper.drop_architectures([f"--options-file={outer}", "x"], str(tmp_path))
    assert (flag, last) == ("--options-file", "x")
    assert Path(whole).read_text() == f"-lineinfo --options-file {cut} -G\n"
    assert not list(tmp_path.glob("*.options.*"))


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("-lineinfo  -Xptxas -v", "-lineinfo  -Xptxas -v"),
        ("-arch=sm_90 -lineinfo", "-lineinfo"),
        ('-DX="a b"  -gencode "arch=compute_53, code=sm_53" -DY=\\"z\\"', '-DX="a b"  -DY=\\"z\\"'),
        ("-Xcompiler -arch=x -code\tsm_80,sm_90\n-O3", "-Xcompiler -arch=x -O3"),
        ('"-arch=native"', ""),
    ],
)
def test_text_that_nvcc_splits_itself_is_cut_and_not_quoted_anew(text: str, rest: str) -> None:
    assert nvcc_wrapper.cut_text(text, "/nowhere") == rest


def test_an_option_file_that_is_absent_is_said(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        nvcc_wrapper.command(["-optf", str(tmp_path / "absent"), "-c", "a.cu"], "/nvcc", "87", str(tmp_path))


def test_upstreams_list_is_kept_as_far_as_this_nvcc_knows_it() -> None:
    pairs = [f"arch=compute_{sm},code=sm_{sm}" for sm in ("53", "80", "90a")]
    line = nvcc_wrapper.command(
        ["-gencode", pairs[0], "-gencode", pairs[1], f"--generate-code={pairs[2]}", "-c", "a.cu"],
        "/nvcc", "110", "/nowhere", {"80", "90", "110"},
    )
    assert line == [
        "/nvcc", "-gencode", pairs[1], f"--generate-code={pairs[2]}", "-c", "a.cu",
        "-gencode", "arch=compute_110,code=sm_110",
    ]
    again = nvcc_wrapper.command(["-gencode", pairs[1]], "/nvcc", "80", "/nowhere", {"80"})
    assert again == ["/nvcc", "-gencode", pairs[1]]


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


def _stand_in(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_gpus_that_an_nvcc_knows_are_asked_of_itself(tmp_path: Path) -> None:
    asked = _stand_in(tmp_path / "nvcc", '[ "$*" = --list-gpu-code ] && printf "sm_75\\nsm_87\\nsm_110\\n"')
    assert nvcc_wrapper.known_gpus(asked) == {"75", "87", "110"}
    assert nvcc_wrapper.is_known("110f", {"110"}) and not nvcc_wrapper.is_known("11", {"110"})
    with pytest.raises(OSError, match="status 3 and says: no licence"):
        nvcc_wrapper.known_gpus(_stand_in(tmp_path / "nvcc", "echo no licence >&2; exit 3"))
    with pytest.raises(OSError, match="says: nothing"):
        nvcc_wrapper.known_gpus(_stand_in(tmp_path / "nvcc", "exit 0"))


def test_upstreams_list_is_a_setting_of_the_script(wrapper: Path, tmp_path: Path) -> None:
    real = _stand_in(tmp_path / "real", 'case $1 in --list-gpu-code) echo sm_80;; *) printf "<%s>" "$@";; esac')
    flags = ["-gencode=arch=compute_53,code=sm_53", "-gencode=arch=compute_80,code=sm_80"]
    variables = {"JETSON_MAMBA_NVCC": real, "JETSON_MAMBA_SM": "80"}
    assert _run(wrapper, flags, **variables, JETSON_MAMBA_ARCHITECTURES="upstream").stdout == f"<{flags[1]}>"
    assert "<-gencode><arch" in _run(wrapper, flags, **variables, JETSON_MAMBA_ARCHITECTURES="own").stdout


def test_a_signal_reaches_the_compiler_and_its_death_the_caller(wrapper: Path, tmp_path: Path) -> None:
    real = _stand_in(tmp_path / "real", "kill -TERM $$; sleep 10")
    assert _run(wrapper, ["-c", "a.cu"], JETSON_MAMBA_NVCC=real, JETSON_MAMBA_SM="87").returncode == -15


needs_nvcc = pytest.mark.skipif(
    "JETSON_MAMBA_TEST_NVCC" not in os.environ, reason="needs JETSON_MAMBA_TEST_NVCC=/path/of/nvcc"
)
SOURCE = "__global__ void twice(float *x) {\n  x[threadIdx.x] *= 2;\n}\n"


def _compile(wrapper: Path, folder: Path, flags: list[str], sm: str, **variables: str) -> dict[str, int]:
    """Compile a small file; returns {GPU: cubins} and {"ptx GPU": texts} of the object."""
    source, target = folder / "a.cu", folder / "a.o"
    source.write_text(SOURCE)
    done = _run(
        wrapper, [*flags, "-c", str(source), "-o", str(target)],
        JETSON_MAMBA_NVCC=os.environ["JETSON_MAMBA_TEST_NVCC"], JETSON_MAMBA_SM=sm, TMPDIR=str(folder), **variables,
    )
    assert done.returncode == 0, done.stderr
    library = folder / "a.so"
    subprocess.run(["gcc", "-shared", "-o", str(library), str(target)], check=True, capture_output=True)
    found: dict[str, int] = {}
    for code, row in fatbin.architectures(str(library)).items():
        found.update({name: row[kind] for name, kind in ((code, "cubins"), (f"ptx {code}", "ptx")) if row[kind]})
    return found


@needs_nvcc
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["-gencode=arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=[sm_90,compute_90]"],
        ["--generate-code=arch=compute_80,code=sm_80", "--generate-code", 'arch=compute_90,code="sm_90,compute_90"'],
        ["-gencode", "arch=compute_90a , code=sm_90a"],
        ["-arch=all"],
        ["-arch", "all-major"],
        ["-arch=native"],
        ["--gpu-architecture=compute_80", "--gpu-code=sm_80,compute_80", "-code", "sm_90"],
        ["-arch=sm_80", "-gencode=arch=compute_90,code=sm_90"],
        ["-arch=sm_110f"],
    ],
)
def test_a_real_nvcc_compiles_for_one_gpu(wrapper: Path, tmp_path: Path, flags: list[str]) -> None:
    assert _compile(wrapper, tmp_path, flags, "87") == {"87": 1}


@needs_nvcc
@pytest.mark.parametrize("flags", [["-dlto", "-arch=lto_80"], ["-rdc=true", "-gencode", "arch=compute_80,code=lto_80"]])
def test_a_real_nvcc_optimises_at_link_time_for_one_gpu(wrapper: Path, tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "a.cu").write_text(SOURCE)
    done = _run(
        wrapper, [*flags, "--dryrun", "-c", str(tmp_path / "a.cu")],
        JETSON_MAMBA_NVCC=os.environ["JETSON_MAMBA_TEST_NVCC"], JETSON_MAMBA_SM="87",
    )
    assert done.returncode == 0, done.stderr
    assert "_87" in done.stderr and "_80" not in done.stderr


@needs_nvcc
def test_a_real_nvcc_reads_no_other_gpu_from_its_variables_and_files(wrapper: Path, tmp_path: Path) -> None:
    options = tmp_path / "options"
    options.write_text('-gencode arch=compute_80,code=sm_80 "-DA=b c"\n-arch=sm_90\n')
    found = _compile(
        wrapper, tmp_path, ["-optf", str(options)], "110f",
        NVCC_PREPEND_FLAGS='-gencode "arch=compute_80,code=sm_80" -DX="a b"', NVCC_APPEND_FLAGS="-arch=sm_90",
    )
    assert found == {"110": 1} or found == {"110f": 1}


@needs_nvcc
def test_a_real_nvcc_splits_what_is_cut_as_before(wrapper: Path, tmp_path: Path) -> None:
    """The macros come to the same with and without an architecture beside them."""
    texts = ['-DX="a b" -DY=1', "-DX=a\\ b", "-DX='\"a b\"'", "-DX=a\\\\b", '"-DX=a b"']
    (tmp_path / "a.cu").write_text(SOURCE)
    for number, text in enumerate(texts):
        said = []
        for more in ("", " -arch=sm_80"):
            options = tmp_path / f"options{number}"
            options.write_text(text + more)
            done = _run(
                wrapper, ["--dryrun", "-E", str(tmp_path / "a.cu"), "-optf", str(options)],
                JETSON_MAMBA_NVCC=os.environ["JETSON_MAMBA_TEST_NVCC"], JETSON_MAMBA_SM="87", TMPDIR=str(tmp_path),
            )
            assert done.returncode == 0, done.stderr
            said.append(re.findall(r'-D\s*"?X=.*?(?= -D__CUDACC)', done.stderr))
        assert said[0] == said[1] != [], text


@needs_nvcc
def test_a_real_nvcc_compiles_upstreams_list_without_what_it_does_not_know(wrapper: Path, tmp_path: Path) -> None:
    flags = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (19, 80, 90)]
    found = _compile(wrapper, tmp_path, flags, "87", JETSON_MAMBA_ARCHITECTURES="upstream")
    assert found == {"80": 1, "87": 1, "90": 1}
