"""The import shim, in real interpreters (an empty venv and a made-up torch package)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import files, shim, shim_payload
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

NAMES = ("all_gather_into_tensor", "_all_gather_base", "reduce_scatter_tensor", "_reduce_scatter_base")
WITHOUT = "def is_available():\n    return False\n"


class Environment:
    """A venv with the shim in it; torch is what a test writes there."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site = next(folder.glob("lib/python3*/site-packages"))

    def install(self) -> None:
        """Put the shim's files there."""
        files.ensure_files(shim.wanted_files(str(self.site)), check=False)

    def torch(self, distributed: str, torch: str = "__version__ = '2.5.0a0'\n") -> None:
        """Make a torch package up."""
        package = self.site / "torch" / "distributed"
        package.mkdir(parents=True)
        (self.site / "torch" / "__init__.py").write_text(torch)
        (package / "__init__.py").write_text(distributed)

    def run(self, code: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Run code in a new interpreter of the environment, free of the caller's Python settings."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        command = [str(self.python), *options, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=clean)

    def value(self, code: str) -> object:
        """Run code, which prints JSON, and return what it says; anything on stderr is a failure."""
        done = self.run("import json, sys\n" + code)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    made = Environment(tmp_path / "venv")
    made.install()
    return made


def test_the_names_exist_where_the_build_lacks_them(environment: Environment) -> None:
    environment.torch(WITHOUT)
    code = f"import torch.distributed as d\nprint(json.dumps([callable(getattr(d, n, None)) for n in {NAMES}]))"
    assert environment.value(code) == [True] * 4


def test_without_the_shim_they_do_not(environment: Environment) -> None:
    environment.torch(WITHOUT)
    files.ensure_files(shim.unwanted_files(str(environment.site)), check=False)
    assert environment.value(f"import torch.distributed as d\nprint(json.dumps([hasattr(d, n) for n in {NAMES}]))") == (
        [False] * 4
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_call_explains_itself(environment: Environment, name: str) -> None:
    environment.torch(WITHOUT)
    done = environment.run(f"from torch.distributed import {name}\n{name}(1, group=None)")
    assert done.returncode == 1
    assert f"NotImplementedError: found:    torch.distributed.{name} was called" in done.stderr
    assert "2.5.0a0" in done.stderr
    assert "USE_DISTRIBUTED=1" in done.stderr
    assert str(environment.site / "jetson_mamba_shim.py") in done.stderr


@pytest.mark.parametrize(("there", "added"), [(NAMES[0], NAMES[1]), (NAMES[1], NAMES[0]), (NAMES[3], NAMES[2])])
def test_one_of_a_pair_becomes_the_other(environment: Environment, there: str, added: str) -> None:
    environment.torch(WITHOUT + f"def {there}(*a):\n    return 'real'\n")
    code = f"import torch.distributed as d\nprint(json.dumps([d.{added} is d.{there}, d.{added}(1)]))"
    assert environment.value(code) == [True, "real"]


def test_existing_names_are_never_replaced(environment: Environment) -> None:
    environment.torch("".join(f"{name} = {name!r}\n" for name in NAMES))
    code = f"import torch.distributed as d\nprint(json.dumps([getattr(d, n) for n in {NAMES}]))"
    assert environment.value(code) == list(NAMES)


def test_torch_is_not_imported_at_start_nor_anything_else(environment: Environment) -> None:
    environment.torch(WITHOUT, torch="raise SystemExit('torch was imported')\n")
    code = "import sys; print(*sorted(sys.modules))"
    with_shim = set(environment.run(code).stdout.split())
    files.ensure_files(shim.unwanted_files(str(environment.site)), check=False)
    without = set(environment.run(code).stdout.split())
    # Python 3.13 reads any .pth file, ours as well as another's, through a codec of its own
    assert with_shim - without - {"encodings.utf_8_sig"} == {"jetson_mamba_shim"}


def test_no_torch_no_effect_and_no_error(environment: Environment) -> None:
    done = environment.run("import torch.distributed")
    assert done.stderr.rstrip().endswith("ModuleNotFoundError: No module named 'torch'")
    code = "import importlib.util as u\nprint(json.dumps([u.find_spec('torch'), 'torch' in sys.modules]))"
    assert environment.value(code) == [None, False]


def test_torchs_own_error_is_not_hidden_and_a_second_try_works(environment: Environment) -> None:
    environment.torch("import sys\nif not hasattr(sys, 'ready'):\n    raise ImportError('libcudart is missing')\n")
    done = environment.run("import torch.distributed")
    assert done.stderr.rstrip().endswith("ImportError: libcudart is missing")
    code = (
        "try:\n    import torch.distributed\nexcept ImportError:\n    sys.ready = True\n"
        "import torch.distributed as d\nprint(json.dumps(hasattr(d, '_all_gather_base')))"
    )
    assert environment.value(code) is True


def test_a_failing_shim_does_not_fail_torch(environment: Environment) -> None:
    environment.torch(
        "import sys\nclass Odd(type(sys)):\n    def __setattr__(self, *a):\n        raise RuntimeError('no')\n"
        "sys.modules[__name__].__class__ = Odd\nworks = 1\n"
    )
    assert environment.value("import torch.distributed as d\nprint(json.dumps(d.works))") == 1


def test_a_failing_hook_does_not_show_at_the_start(environment: Environment) -> None:
    (environment.site / "aaa.pth").write_text("import sys; sys.meta_path = tuple(sys.meta_path)\n")
    assert environment.value("print(json.dumps(1))") == 1


def test_torch_imported_by_an_earlier_pth_line(environment: Environment) -> None:
    environment.torch(WITHOUT)
    (environment.site / "aaa.pth").write_text("import torch.distributed\n")
    assert environment.value("import torch\nprint(json.dumps(hasattr(torch.distributed, '_all_gather_base')))") is True


def test_reload_keeps_the_names_and_renews_the_aliases(environment: Environment) -> None:
    environment.torch("import sys\ndef _all_gather_base():\n    return sys.turn\n")
    code = (
        "import importlib\nsys.turn = 1\nimport torch.distributed as d\nfirst = d._all_gather_base\n"
        "importlib.reload(d)\n"
        "print(json.dumps([d._all_gather_base is first, d.all_gather_into_tensor is d._all_gather_base,"
        " hasattr(d, 'reduce_scatter_tensor')]))"
    )
    assert environment.value(code) == [False, True, True]


def test_a_second_import_after_removal_is_completed_too(environment: Environment) -> None:
    environment.torch(WITHOUT)
    code = (
        "import torch.distributed\ndel sys.modules['torch.distributed']\nimport torch.distributed\n"
        "print(json.dumps(hasattr(sys.modules['torch.distributed'], '_all_gather_base')))"
    )
    assert environment.value(code) is True


def test_find_spec_executes_nothing_and_looks_as_ever(environment: Environment) -> None:
    environment.torch("raise RuntimeError('executed')\n")
    code = (
        "import importlib.util as u\ns = u.find_spec('torch.distributed')\n"
        "print(json.dumps(['torch.distributed' in sys.modules, type(s.loader).__name__, s.origin,"
        " s.loader.get_source('torch.distributed')]))"
    )
    origin = str(environment.site / "torch" / "distributed" / "__init__.py")
    assert environment.value(code) == [False, "SourceFileLoader", origin, "raise RuntimeError('executed')\n"]


def test_a_finder_that_asks_the_whole_path_again_does_not_loop(environment: Environment) -> None:
    environment.torch(WITHOUT)
    code = """
import importlib.util, sys
class Nosy:
    asking = False
    def find_spec(self, name, path=None, target=None):
        if self.asking or name != "torch.distributed":
            return None
        self.asking = True
        try:
            return importlib.util.find_spec(name)
        finally:
            self.asking = False
sys.meta_path.insert({position}, Nosy())
import torch.distributed as d
print(json.dumps(hasattr(d, "_all_gather_base")))
"""
    assert environment.value(code.replace("{position}", "0")) is True
    assert environment.value(code.replace("{position}", "1")) is True


def test_a_finder_that_asks_all_others_does_not_loop(environment: Environment) -> None:
    environment.torch(WITHOUT)
    code = """
class Twin:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.distributed":
            specs = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)
            return next((s for s in specs if s is not None), None)
sys.meta_path.insert({position}, Twin())
import torch.distributed as d
print(json.dumps(hasattr(d, "_all_gather_base")))
"""
    assert environment.value(code.replace("{position}", "0")) is True
    assert environment.value(code.replace("{position}", "1")) is True


def test_many_threads_import_at_once(environment: Environment) -> None:
    environment.torch("import time\ntime.sleep(0.05)\n" + WITHOUT)
    code = """
import threading
seen = []
def work():
    import torch.distributed as d
    seen.append(hasattr(d, "_all_gather_base") and hasattr(d, "reduce_scatter_tensor"))
threads = [threading.Thread(target=work) for _ in range(16)]
for t in threads: t.start()
for t in threads: t.join()
print(json.dumps(seen))
"""
    assert environment.value(code) == [True] * 16


def test_the_users_own_start_up_file_still_runs(environment: Environment) -> None:
    environment.torch(WITHOUT)
    own = environment.site / "sitecustomize.py"
    own.write_text("import sys\nsys.mine = 1\n")
    shadowed = environment.run("import sitecustomize; print(sitecustomize.__file__)").stdout.strip() != str(own)
    code = "import torch.distributed as d\nprint(json.dumps([getattr(sys, 'mine', 0), hasattr(d, '_all_gather_base')]))"
    # where the distribution's own sitecustomize.py comes first, the user's does not run, and the shim does
    assert environment.value(code) == [0 if shadowed else 1, True]
    assert own.read_text() == "import sys\nsys.mine = 1\n"


def test_it_works_behind_a_distributions_sitecustomize(environment: Environment, tmp_path: Path) -> None:
    environment.torch(WITHOUT)
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "sitecustomize.py").write_text("import sys\nsys.theirs = 1\n")
    (environment.site / "sitecustomize.py").write_text("raise SystemExit('never')\n")
    # like /usr/lib/python3.X, before site-packages
    (environment.site / "aaa.pth").write_text(f"import sys; sys.path.insert(0, {str(tmp_path / 'first')!r})\n")
    code = "import torch.distributed as d\nprint(json.dumps([sys.theirs, hasattr(d, '_all_gather_base')]))"
    assert environment.value(code) == [1, True]


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10", "3.11", "3.12", "3.13"])
def test_it_works_on_every_python_that_is_here(tmp_path: Path, version: str) -> None:
    # the interpreter itself: a venv's, which is first on the PATH of `make`, has no user site
    python = os.path.realpath(shutil.which(f"python{version}") or "/bin/false")
    probe = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    if subprocess.run(probe, capture_output=True, text=True, check=False).stdout.strip() != version:
        pytest.skip(f"no python{version} on this machine")
    site = tmp_path / "lib" / f"python{version}" / "site-packages"
    (site / "torch" / "distributed").mkdir(parents=True)
    (site / "torch" / "__init__.py").write_text("")
    (site / "torch" / "distributed" / "__init__.py").write_text(WITHOUT)
    files.ensure_files(shim.wanted_files(str(site)), check=False)
    code = f"import torch.distributed as d; print([hasattr(d, n) for n in {NAMES}])"
    user_site = {"PYTHONUSERBASE": str(tmp_path), "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, env=user_site, timeout=60)
    assert (done.stdout, done.stderr) == ("[True, True, True, True]\n", "")


def test_isolated_and_utf8_modes_start_clean(environment: Environment) -> None:
    environment.torch(WITHOUT)
    for option in ("-I", "-E", "-s", "-O", "-X utf8"):
        done = environment.run(
            "import torch.distributed as d; print(hasattr(d, NAME))".replace("NAME", repr(NAMES[0])), *option.split()
        )
        assert (done.stdout, done.stderr) == ("True\n", "")


def test_the_files(tmp_path: Path) -> None:
    wanted = shim.wanted_files("/env/lib/python3.10/site-packages")
    assert list(wanted) == [
        "/env/lib/python3.10/site-packages/jetson_mamba_shim.py",
        "/env/lib/python3.10/site-packages/jetson_mamba_shim.pth",
    ]
    module, pth = wanted.values()
    assert pth == files.FileSpec("import jetson_mamba_shim\n", 0o644)
    assert module.content == Path(shim_payload.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r"^(?:import|from) (\w+)", module.content, re.MULTILINE)) == {"sys", "_thread"}


def test_removal_leaves_nothing(environment: Environment) -> None:
    environment.run("pass")
    assert list(environment.site.rglob("jetson_mamba_shim*.pyc"))
    assert files.ensure_files(shim.unwanted_files(str(environment.site)), check=False)[0]
    assert not list(environment.site.rglob("jetson_mamba_shim*"))
    assert not files.ensure_files(shim.unwanted_files(str(environment.site)), check=False)[0]


def test_the_payload_does_nothing_where_it_is_only_read() -> None:
    assert not any(getattr(finder, "jetson_mamba_shim", False) for finder in sys.meta_path)


def test_the_system_folder_follows_the_version() -> None:
    assert shim.system_site_packages("/e/lib/python3.12/site-packages/") == "/usr/local/lib/python3.12/dist-packages"
    with pytest.raises(Problem, match="no Python version"):
        shim.system_site_packages("/srv/modules")


GUIDE = "# sitecustomize\ntry:\n    import torch\n    torch.distributed.x = 1\nexcept Exception:\n    pass\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (GUIDE, True),
        ("from torch import nn\n", True),
        ("# import torch later\nimport torchless\n", False),
        ("print('import torch')\n", False),
    ],
)
def test_the_guides_file_is_noticed(tmp_path: Path, text: str, found: bool) -> None:
    user_site = tmp_path / "lib" / "python3.10" / "site-packages"
    user_site.mkdir(parents=True)
    (user_site / "sitecustomize.py").write_text(text)
    expected = [str(user_site / "sitecustomize.py")] if found else []
    assert shim.guide_files("/env/lib/python3.10/site-packages", str(tmp_path)) == expected
    assert shim.guide_files(str(user_site), str(tmp_path)) == expected
    assert shim.guide_files("/env/lib/python3.11/site-packages", str(tmp_path)) == []


def test_its_note_names_it() -> None:
    assert "rm /u/sitecustomize.py" in shim.guide_note("/u/sitecustomize.py")
