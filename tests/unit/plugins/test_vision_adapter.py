"""The vision adapter: its files, in real interpreters, and what it hands to mamba's extension (no torch needed)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import files, vision_adapter, vision_payload
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.modules import vision_adapter as module

CORE, OFLEX = vision_adapter.NAMES
PACKAGE = Path(vision_payload.__file__).parent
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))
BACKEND = "def fwd(*a): return ['out', 'x']\ndef bwd(*a): return list('abcdefg')\n"
EXTENSION = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "NAME", NULL, -1, NULL, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit_NAME(void) {
    PyObject *made = PyModule_Create(&module);
    PyModule_AddStringConstant(made, "built_by", "the project");
    return made;
}
"""


class Environment:
    """A venv with the adapter in it."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.site = next(folder.glob("lib/python3*/site-packages"))
        files.ensure_files(vision_adapter.wanted_files(str(self.site)), check=False)

    def run(self, code: str, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        clean["HOME"] = str(self.folder)
        return subprocess.run(
            [str(self.python), "-c", code],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**clean, **more},
            cwd=cwd or self.folder,
        )

    def value(self, code: str, cwd: Path | None = None, **more: str) -> Any:
        """Run code, which prints JSON; anything on stderr is a failure."""
        done = self.run("import json, sys\n" + code, cwd, **more)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    made = Environment(tmp_path / "venv")
    (made.site / "selective_scan_cuda.py").write_text(BACKEND)
    return made


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a real extension module of the core's name."""
    folder = tmp_path_factory.mktemp("extension")
    source = folder / "core.c"
    source.write_text(EXTENSION.replace("NAME", CORE))
    compiler, headers = shutil.which("cc"), sysconfig.get_path("include")
    if compiler is None or not Path(headers, "Python.h").exists():
        pytest.skip("needs a C compiler and Python.h")
    target = folder / f"{CORE}{SUFFIX}"
    subprocess.run([compiler, "-shared", "-fPIC", f"-I{headers}", "-o", target, source], check=True, timeout=120)
    source.unlink()
    return folder


WHO = f"import {CORE} as m\nprint(json.dumps(getattr(m, 'built_by', 'the adapter')))"


@pytest.mark.parametrize("name", vision_adapter.NAMES)
def test_importing_it_imports_no_torch(environment: Environment, name: str) -> None:
    (environment.site / "torch.py").write_text("")
    code = f"import {name}\nprint(json.dumps([n for n in ('torch', 'selective_scan_cuda') if n in sys.modules]))"
    assert environment.value(code) == []


def test_where_torch_is_loaded_the_extension_is_too(environment: Environment) -> None:
    (environment.site / "torch.py").write_text("")
    code = f"import torch, {CORE}\nprint(json.dumps('selective_scan_cuda' in sys.modules))"
    assert environment.value(code) is True


def test_without_mambas_extension_the_import_fails_at_once(environment: Environment) -> None:
    (environment.site / "selective_scan_cuda.py").unlink()
    done = environment.run(f"try:\n    import {OFLEX}\nexcept ImportError as e:\n    print(e, e.name)")
    assert f"found:    there is no selective_scan_cuda to serve {OFLEX}" in done.stdout
    assert done.stdout.rstrip().endswith("selective_scan_cuda")


def test_a_broken_extension_is_explained(environment: Environment) -> None:
    (environment.site / "torch.py").write_text("")
    (environment.site / "selective_scan_cuda.py").write_text("raise ImportError('libc10.so: cannot open')")
    done = environment.run(f"import torch, {CORE}")
    assert done.returncode == 1
    assert "found:    selective_scan_cuda cannot be imported: libc10.so: cannot open" in done.stderr


def test_the_adapter_serves_where_there_is_no_other(environment: Environment) -> None:
    assert environment.value(WHO) == "the adapter"


@pytest.mark.parametrize("where", ["site-packages", "pth", "PYTHONPATH", "cwd", "user site"])
def test_a_projects_own_extension_wins(environment: Environment, extension: Path, where: str) -> None:
    built, folder, more = extension / f"{CORE}{SUFFIX}", environment.folder / "project", {}
    folder.mkdir()
    if where == "site-packages":
        folder = environment.site
    elif where == "pth":  # as an egg or an editable checkout is found: behind site-packages
        (environment.site / "easy-install.pth").write_text(f"{folder}\n")
    elif where == "PYTHONPATH":
        more["PYTHONPATH"] = str(folder)
    elif where == "user site":
        config = environment.folder / "pyvenv.cfg"
        config.write_text(config.read_text().replace("packages = false", "packages = true"))
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        folder = environment.folder / ".local" / "lib" / version / "site-packages"
        folder.mkdir(parents=True)
    shutil.copy(built, folder)
    cwd = folder if where == "cwd" else environment.folder
    assert environment.value(WHO, cwd, **more) == "the project"
    both = f"import {CORE} as a, {OFLEX} as b\nprint(json.dumps([hasattr(a, 'fwd'), hasattr(b, 'fwd')]))"
    assert environment.value(both, cwd, **more) == [False, True]


def test_an_extension_behind_an_editable_finder_wins(environment: Environment, extension: Path) -> None:
    """As setuptools installs editable projects: a finder at the end of sys.meta_path."""
    finder = (
        "import sys\nfrom importlib.util import spec_from_file_location\nclass Finder:\n    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        if name == {CORE!r}:\n            return spec_from_file_location(name, {str(extension)!r}\n"
        f"                + '/{CORE}{SUFFIX}')\nsys.meta_path.append(Finder)\n"
    )
    (environment.site / "__editable___finder.py").write_text(finder)
    (environment.site / "__editable__.scan.pth").write_text("import __editable___finder\n")
    assert environment.value(WHO) == "the project"


def test_an_own_extension_that_does_not_load_is_named(environment: Environment, tmp_path: Path) -> None:
    (tmp_path / f"{CORE}{SUFFIX}").write_bytes(b"not a library")
    (environment.site / "easy-install.pth").write_text(f"{tmp_path}\n")
    done = environment.run(f"import {CORE}")
    assert done.returncode == 1
    assert f"found:    {tmp_path / CORE}{SUFFIX} cannot be loaded" in done.stderr


@pytest.mark.parametrize("other", ["another adapter", "a folder", "another machine"])
def test_what_is_no_extension_does_not_win(environment: Environment, tmp_path: Path, other: str) -> None:
    if other == "another adapter":
        (tmp_path / f"{CORE}.py").write_text(vision_adapter.payload_source())
    elif other == "a folder":
        (tmp_path / CORE).mkdir()
    else:
        (tmp_path / f"{CORE}.cpython-38-riscv64-linux-gnu.so").write_bytes(b"")
    (environment.site / "easy-install.pth").write_text(f"{tmp_path}\n")
    assert environment.value(WHO) == "the adapter"


def test_it_works_from_a_zip_as_on_a_device(tmp_path: Path) -> None:
    """Modules reach a device in a zip file: the payload's text has to be found there."""
    archive = tmp_path / "payload.zip"
    base = "ansible_collections/jetson/mamba/plugins/module_utils/"
    with zipfile.ZipFile(archive, "w") as made:
        for folder in Path(base).parents:
            if folder.name:
                made.writestr(f"{folder}/__init__.py", "")
        made.writestr(base + "__init__.py", "")
        for name in ("vision_adapter", "vision_payload", "errors", "files", "passwords"):
            made.write(PACKAGE / f"{name}.py", f"{base}{name}.py")
    code = (
        f"import sys\nsys.path.insert(0, {str(archive)!r})\n"
        "from ansible_collections.jetson.mamba.plugins.module_utils import vision_adapter\n"
        "sys.stdout.write(vision_adapter.payload_source())"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == (PACKAGE / "vision_payload.py").read_text(), done.stderr


# --- the files ---


def test_present_and_absent(tmp_path: Path) -> None:
    site = str(tmp_path)
    first = module.bring(site, "present", check=True)
    assert first["changed"]
    assert not list(tmp_path.iterdir())
    assert module.bring(site, "present", check=False)["files"] == [f"{site}/{name}.py" for name in (CORE, OFLEX)]
    assert not module.bring(site, "present", check=False)["changed"]
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / f"{CORE}.cpython-310.pyc").write_bytes(b"")
    assert module.bring(site, "absent", check=True)["changed"]
    assert module.bring(site, "absent", check=False)["changed"]
    assert [path.name for path in tmp_path.iterdir()] == ["__pycache__"]
    assert not list((tmp_path / "__pycache__").iterdir())
    assert not module.bring(site, "absent", check=False)["changed"]


def test_an_older_adapter_is_replaced(tmp_path: Path) -> None:
    (tmp_path / f"{CORE}.py").write_text("JETSON_MAMBA_VISION_ADAPTER = 1\n")
    assert module.bring(str(tmp_path), "present", check=False)["changed"]
    assert (tmp_path / f"{CORE}.py").read_text() == vision_adapter.payload_source()


def test_somebody_elses_module_stays(tmp_path: Path) -> None:
    mine = tmp_path / f"{CORE}.py"
    mine.write_text("import selective_scan_cuda\n")
    for state in ("present", "absent"):
        result = module.bring(str(tmp_path), state, check=False)
        assert mine.read_text() == "import selective_scan_cuda\n"
        assert str(mine) not in result["files"]  # type: ignore[operator]
        assert str(mine) in str(result["notes"])


@pytest.mark.parametrize(
    ("name", "noted"),
    [
        (f"{CORE}.cpython-310-aarch64-linux-gnu.so", True),
        (f"{OFLEX}.abi3.so", True),
        (f"{CORE}.so", True),
        (f"{CORE}_extra.cpython-310-aarch64-linux-gnu.so", False),
        ("selective_scan_cuda.cpython-310-aarch64-linux-gnu.so", False),
    ],
)
def test_a_built_extension_is_noted(tmp_path: Path, name: str, noted: bool) -> None:
    (tmp_path / name).write_bytes(b"")
    notes = module.bring(str(tmp_path), "present", check=False)["notes"]
    assert (name in str(notes)) is noted


def test_an_environment_that_is_not_there(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    assert module.bring(missing, "present", check=True)["changed"]
    with pytest.raises(Problem, match="there is no folder"):
        module.bring(missing, "present", check=False)
    assert not module.bring(missing, "absent", check=False)["changed"]


# --- what is handed on ---


class Tensor:
    """As much of a tensor as the adapter asks about."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str = "float32", last: int = 1) -> None:
        self.name, self.shape, self.dtype, self.last = name, shape, dtype, last

    def __repr__(self) -> str:
        return f"{self.name}:{self.dtype}{list(self.shape)}"

    def dim(self) -> int:
        return len(self.shape)

    def stride(self, _dim: int) -> int:
        return self.last

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def is_contiguous(self) -> bool:
        return self.last == 1

    def contiguous(self) -> Tensor:
        return Tensor(self.name + "!", self.shape, self.dtype)

    def to(self, dtype: str) -> Tensor:
        return Tensor(self.name, self.shape, dtype, self.last)

    def unsqueeze(self, dim: int) -> Tensor:
        return Tensor(self.name, (*self.shape[:dim], 1, *self.shape[dim:]), self.dtype)

    def squeeze(self, dim: int) -> Tensor:
        return Tensor(self.name, self.shape[:dim] + self.shape[dim + 1 :], self.dtype)


class Torch:
    float32, float16, bfloat16 = "float32", "float16", "bfloat16"

    class no_grad:
        def __enter__(self) -> None: ...

        def __exit__(self, *_error: object) -> None: ...


class Scan:
    """mamba's extension, by its positional arguments."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def fwd(self, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any, softplus: bool) -> list[Any]:
        self.calls.append(f"{u} {delta} {A} {B} {C} {D} z={z} {bias} {softplus}")
        return [Tensor("out", u.shape, u.dtype), "x"]

    def bwd(self, *given: Any) -> list[Any]:
        assert len(given) == 14
        u, delta, A, B, C, D, z, bias, dout, x, out, dz, softplus, recompute = given
        self.calls.append(f"{D} z={z} {bias} {dout} x={x and x.name} out={out} dz={dz} {softplus} {recompute}")
        made = [Tensor("d" + t.name, t.shape, t.dtype) if t is not None else None for t in (u, delta, A, B, C, D, bias)]
        return [*made, "more"]


@pytest.fixture
def scan(monkeypatch: pytest.MonkeyPatch) -> Scan:
    made = Scan()
    monkeypatch.setattr(vision_payload, "_backend", lambda: (Torch, made))
    return made


def given(dtype: str = "float32", projection: tuple[int, ...] = (2, 1, 3, 5)) -> list[Any]:
    """Return u, delta, A, B, C, D and delta_bias."""
    u, delta = (Tensor(name, (2, 4, 5), dtype) for name in ("u", "delta"))
    b, c = (Tensor(name, projection, dtype) for name in "BC")
    return [u, delta, Tensor("A", (4, 3)), b, c, Tensor("D", (4,)), Tensor("bias", (4,))]


def test_delta_bias_is_not_taken_for_z(scan: Scan) -> None:
    out, x = vision_payload.fwd(*given(), True, 1)
    assert scan.calls == [
        "u:float32[2, 4, 5] delta:float32[2, 4, 5] A:float32[4, 3] B:float32[2, 1, 3, 5] C:float32[2, 1, 3, 5] "
        "D:float32[4] z=None bias:float32[4] True"
    ]
    assert (str(out), x) == ("out:float32[2, 4, 5]", "x")


@pytest.mark.parametrize(
    ("dtype", "oflex", "expected"),
    [
        ("float16", (), "float16"),
        ("float16", (1, False), "float16"),
        ("float16", (1, True), "float32"),
        ("bfloat16", (1, True), "float32"),
        ("float32", (1, False), "float32"),
    ],
)
def test_the_output_dtype_follows_oflex(scan: Scan, dtype: str, oflex: tuple[Any, ...], expected: str) -> None:
    assert vision_payload.fwd(*given(dtype), True, *oflex)[0].dtype == expected


def test_backward_gives_seven_in_the_inputs_dtypes(scan: Scan) -> None:
    dout, x = Tensor("dout", (2, 4, 5), "float32"), Tensor("x", (2, 4, 1, 6))
    grads = vision_payload.bwd(*given("float16"), dout, x, True, 1)
    assert scan.calls == ["D:float32[4] z=None bias:float32[4] dout:float32[2, 4, 5] x=x out=None dz=None True False"]
    assert [grad.dtype for grad in grads] == [
        *("float16", "float16", "float32", "float16", "float16", "float32", "float32"),
    ]


def test_what_was_not_given_has_no_gradient(scan: Scan) -> None:
    arguments = [*given()[:5], None, None]
    grads = vision_payload.bwd(*arguments, Tensor("dout", (2, 4, 5)), Tensor("x", (1,)), False, 1)
    assert grads[5:] == [None, None]


@pytest.mark.parametrize("projection", [(2, 3, 5), (4, 3), (2, 2, 3, 5)])
def test_shapes_of_b_and_c_come_back(scan: Scan, projection: tuple[int, ...]) -> None:
    grads = vision_payload.bwd(*given("float16", projection), Tensor("dout", (2, 4, 5), "float16"), None, True, 1)
    assert [grad.shape for grad in grads[3:5]] == [projection] * 2


def test_rows_are_made_contiguous(scan: Scan) -> None:
    arguments = given()
    arguments[0] = Tensor("u", (2, 4, 5), last=4)
    vision_payload.fwd(*arguments, True, 1)
    assert scan.calls[0].startswith("u!:")


def test_double_is_refused_with_the_remedy(scan: Scan) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)u of the selective scan is float64.*float32 is needed"):
        vision_payload.fwd(*given("float64"), True, 1)
