"""One judge for wheels and for what is installed."""

from __future__ import annotations

import json
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import inspection, state
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

from tests.unit.plugins.wheel_kit import container, entry, make_elf, make_wheel

MODULE = "causal_conv1d_cuda"
FILE = f"{MODULE}.cpython-310-aarch64-linux-gnu.so"
ORIN = inspection.Expectation("aarch64", "3.10", "2.35", "87", "causal_conv1d", "1.6.0", (MODULE,), True)
CPU = ORIN._replace(sm="cpu")
CUBIN = container(entry(87))
OLD_STRING = "_ZN3c105ErrorC1ENS_14SourceLocationESs"
NEW_STRING = "_ZN3c105ErrorC1ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"


def facts(folder: Path, files: dict[str, bytes] | None = None, **more: Any) -> dict[str, Any]:
    """Return the facts of a made-up wheel of causal_conv1d 1.6.0 for an Orin."""
    options = {"name": "causal_conv1d", "version": "1.6.0", "tag": "cp310-cp310-linux_aarch64", **more}
    content = {FILE: make_elf(gpu=CUBIN), "causal_conv1d/__init__.py": b""} if files is None else files
    return inspection.read_wheel(str(make_wheel(folder, files=content, **options)))


def reasons(found: dict[str, Any], wish: inspection.Expectation = ORIN) -> list[str]:
    return [error["reason"] for error in inspection.judge(found, wish).errors]


def test_a_good_wheel_is_accepted(tmp_path: Path) -> None:
    verdict = inspection.judge(facts(tmp_path), ORIN)
    assert verdict == ([], [], [])
    local = facts(tmp_path, version="1.6.0+cu126torch2.5", file_version="1.6.0+cu126torch2.5")
    assert reasons(local) == []
    assert reasons(local, ORIN._replace(version="1.6.0+cu126torch2.5")) == []
    assert len(reasons(local, ORIN._replace(version="1.6.0+cu124"))) == 2


def test_facts_are_plain_data_and_survive_json(tmp_path: Path) -> None:
    found = facts(tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert found["name"] == "causal_conv1d" and found["record"] == []
    assert found["libraries"][FILE]["archs"] == {"87": {"cubins": 1, "ptx": 0, "bytes": 128}}


@pytest.mark.parametrize(
    ("wheel", "reason"),
    [
        ({"version": "1.5.0"}, "by its name it is causal_conv1d 1.5.0"),
        ({"version": "1.5.0", "file_version": "1.6.0"}, "it is causal_conv1d 1.5.0 by its own METADATA"),
        ({"name": "mamba_ssm"}, "by its name it is mamba_ssm 1.6.0"),
        ({"tag": "cp311-cp311-linux_aarch64"}, "by its name it is for cp311-cp311, not for Python 3.10"),
        (
            {"inside_tag": "cp311-cp311-linux_aarch64"},
            "its WHEEL file says cp311-cp311-linux_aarch64 (it is for cp311-cp311, not for Python 3.10)",
        ),
        ({"tag": "cp310-cp310-manylinux_2_38_aarch64"}, "by its name it is for manylinux_2_38_aarch64"),
        ({"inside_tag": "nonsense"}, "its WHEEL file says nonsense"),
    ],
)
def test_names_and_tags(wheel: dict[str, str], reason: str, tmp_path: Path) -> None:
    assert any(said.startswith(reason) for said in reasons(facts(tmp_path, **wheel)))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, f"it holds no extension {MODULE} (it holds no library)"),
        ({FILE: b"text"}, f"{FILE} is no ELF file"),
        ({FILE: make_elf(gpu=CUBIN)[:300]}, f"{FILE} is damaged: "),
        ({FILE: make_elf("x86_64", gpu=CUBIN)}, f"{FILE} is for x86_64, not for aarch64"),
        ({FILE: make_elf(gpu=CUBIN), "lib/libz.so.1": make_elf("x86_64")}, "lib/libz.so.1 is for x86_64"),
        ({FILE: make_elf(gpu=CUBIN, glibc=["GLIBC_2.38"])}, f"{FILE} asks for glibc 2.38, there is 2.35"),
        (
            {FILE: make_elf(gpu=CUBIN, undefined=[OLD_STRING])},
            f"{FILE} passes torch the old (C++98) std::string, torch has the C++11 one",
        ),
        (
            {f"{MODULE}.cpython-311-aarch64-linux-gnu.so": make_elf(gpu=CUBIN)},
            f"{MODULE}.cpython-311-aarch64-linux-gnu.so is an extension for Python 3.11, not for 3.10",
        ),
        (
            {f"{MODULE}.cpython-310-x86_64-linux-gnu.so": make_elf(gpu=CUBIN)},
            f"{MODULE}.cpython-310-x86_64-linux-gnu.so is named for x86_64-linux-gnu",
        ),
        ({f"{MODULE}.pypy39-pp73-aarch64-linux-gnu.so": make_elf(gpu=CUBIN)}, "does not import"),
        ({FILE: make_elf()}, f"{FILE} holds no GPU code at all, not for sm_87 either"),
        (
            {FILE: make_elf(gpu=container(entry(80), entry(90)))},
            f"{FILE} holds code for sm_80, sm_90, not for sm_87",
        ),
        (
            {FILE: make_elf(gpu=container(entry(87, kind=1)))},
            f"{FILE} holds PTX alone (compute_87) and no finished code for sm_87",
        ),
        ({FILE: make_elf(gpu=CUBIN[:-1] + b"\0" * 9)}, None),
        ({FILE: make_elf(gpu=CUBIN + b"rubbish!rubbish!")}, f"{FILE} is damaged: at "),
    ],
)
def test_libraries(files: dict[str, bytes], reason: str | None, tmp_path: Path) -> None:
    said = reasons(facts(tmp_path, files))
    assert said == [] if reason is None else any(reason in one for one in said)


@pytest.mark.parametrize("name", [f"{MODULE}.so", f"{MODULE}.abi3.so", f"{MODULE}.cpython-310.so"])
def test_names_that_are_imported(name: str, tmp_path: Path) -> None:
    assert reasons(facts(tmp_path, {name: make_elf(gpu=CUBIN, undefined=[NEW_STRING])})) == []


@pytest.mark.parametrize(
    "name",
    [
        "torch/__init__.py",
        "numpy.py",
        "evil.pth",
        f"{MODULE}.pth",
        "causal_conv1d-1.6.0.data/scripts/pip",
        "causal_conv1d-1.6.0.data/data/lib/python3.10/site-packages/torch/__init__.py",
        "causal_conv1d-1.6.0.data/purelib/torch/__init__.py",
        "torch-2.5.0.dist-info2/METADATA",
        "..\\..\\x",
        "causal_conv1d_extra/__init__.py",
    ],
)
def test_a_wheel_brings_its_own_files_alone(name: str, tmp_path: Path) -> None:
    (said,) = reasons(facts(tmp_path, {FILE: make_elf(gpu=CUBIN), name: b"x"}))
    assert said == f"it brings {name}, which is not part of causal_conv1d"


def test_files_of_the_component_are_its_own(tmp_path: Path) -> None:
    data = "causal_conv1d-1.6.0.data/purelib/causal_conv1d/x"
    own = ["causal_conv1d/a/b.py", "causal_conv1d.libs/libgomp.so.1", data]
    assert reasons(facts(tmp_path, {FILE: make_elf(gpu=CUBIN), **dict.fromkeys(own, b"x")})) == []


def test_an_extension_is_found_in_the_site_folder_alone(tmp_path: Path) -> None:
    for folder in ("causal_conv1d", "causal_conv1d-1.6.0.data/platlib/causal_conv1d"):
        said = reasons(facts(tmp_path, {f"{folder}/{FILE}": make_elf(gpu=CUBIN)}))
        assert said == [f"it holds no extension {MODULE} (it holds {FILE})"]
    assert reasons(facts(tmp_path, {f"causal_conv1d-1.6.0.data/platlib/{FILE}": make_elf(gpu=CUBIN)})) == []


@pytest.mark.parametrize("name", ["causal_conv1d/libx.so-real", "causal_conv1d/bin/tool"])
def test_a_library_is_known_by_what_it_is(name: str, tmp_path: Path) -> None:
    good, bad = make_elf(gpu=CUBIN), make_elf("x86_64")
    (said,) = reasons(facts(tmp_path, {FILE: good, name: bad}))
    assert said == f"{name} is for x86_64, not for aarch64"
    assert reasons(facts(tmp_path, {FILE: good, name: make_elf()})) == []


def test_a_library_for_32_bit_processes_is_foreign(tmp_path: Path) -> None:
    small = bytearray(make_elf())
    small[4] = 1
    found = inspection.judge(facts(tmp_path, {FILE: bytes(small)}), CPU).errors[0]
    assert found["reason"] == f"{FILE} is for aarch64 (32-bit), not for aarch64"
    assert "under another name" not in found["next"]


def test_a_class_without_a_gpu_holds_no_gpu_code(tmp_path: Path) -> None:
    assert reasons(facts(tmp_path, {FILE: make_elf()}), CPU) == []
    assert reasons(facts(tmp_path), CPU) == [f"{FILE} holds GPU code for sm_87, this class has no GPU"]
    ptx = facts(tmp_path, {FILE: make_elf(gpu=container(entry(87, kind=1)))})
    assert reasons(ptx, CPU) == [f"{FILE} holds GPU code for sm_87, this class has no GPU"]


def test_code_for_one_gpus_own_instructions_runs_there(tmp_path: Path) -> None:
    thor = ORIN._replace(sm="110")
    assert reasons(facts(tmp_path, {FILE: make_elf(gpu=container(entry(110, flags=0x200011)))}), thor) == []


def test_many_other_gpus_are_a_warning_with_their_bytes(tmp_path: Path) -> None:
    others = [entry(number, payload=1_000_000 - 64) for number in (53, 62, 72, 90)]
    verdict = inspection.judge(facts(tmp_path, {FILE: make_elf(gpu=container(entry(87), *others))}), ORIN)
    assert verdict.errors == []
    assert verdict.warnings == [
        "it holds GPU code for 4 other GPUs too (sm_53, sm_62, sm_72, sm_90), which costs 4.0 MB"
    ]


def test_needed_is_what_nobody_brings(tmp_path: Path) -> None:
    needed = [
        *("libc10.so", "libtorch_cuda.so", "libc.so.6", "libm.so.6", "ld-linux-aarch64.so.1", "libstdc++.so.6"),
        *("libcudart.so.12", "libinside-1f2e.so.1", "libopenblas.so.0"),
    ]
    files = {
        FILE: make_elf(gpu=CUBIN, needed=needed),
        "causal_conv1d.libs/libinside.so": make_elf(soname="libinside-1f2e.so.1", needed=[]),
    }
    found = facts(tmp_path, files)
    assert inspection.judge(found, ORIN).needed == ["libcudart.so.12", "libopenblas.so.0"]
    given = inspection.judge(found, ORIN, {"libc10.so", "libopenblas.so.0"}).needed
    assert given == ["libcudart.so.12", "libtorch_cuda.so"]


# ---------------------------------------------------------------- RECORD


def test_record_and_members_agree(tmp_path: Path) -> None:
    def damage(change: Any) -> list[str]:
        return facts(tmp_path, record=change)["record"]

    own = "causal_conv1d-1.6.0.dist-info"
    assert damage(lambda text: text.replace("__init__.py,sha256=", "__init__.py,sha256=x")) == [
        "causal_conv1d/__init__.py differs from its RECORD hash"
    ]
    assert damage(lambda text: text.replace("causal_conv1d/__init__.py", "causal_conv1d/gone.py")) == [
        "causal_conv1d/__init__.py is not in RECORD",
        "causal_conv1d/gone.py is in RECORD, not in the wheel",
    ]
    assert damage(lambda text: text.replace(f"{FILE},sha256=", f"{FILE},md5=")) == [
        f"{FILE} has no hash in RECORD that can be trusted (md5)"
    ]
    assert damage(lambda text: "") == [
        f"{name} is not in RECORD"
        for name in sorted([FILE, "causal_conv1d/__init__.py", f"{own}/METADATA", f"{own}/WHEEL"])
    ]
    assert damage(lambda text: text + "a,b\n") == ["RECORD has a line that is not path,hash,size: a,b"]
    changed = facts(tmp_path, record=lambda text: text.replace("__init__.py,sha256=", "__init__.py,sha256=x"))
    assert reasons(changed) == ["causal_conv1d/__init__.py differs from its RECORD hash"]


def test_members_that_lead_out_or_come_twice(tmp_path: Path) -> None:
    found = facts(tmp_path, {FILE: make_elf(gpu=CUBIN), "../evil.pth": b"import os"})
    assert found["record"] == ["../evil.pth: leads out of the site folder"]
    path = make_wheel(tmp_path)
    with pytest.warns(UserWarning), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("thing/__init__.py", b"value = 2\n")
    assert any("holds it twice" in line for line in inspection.read_wheel(str(path))["record"])


def test_without_record(tmp_path: Path) -> None:
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing-1.0.dist-info/WHEEL", "Tag: py3-none-any\n")
        archive.writestr("thing-1.0.dist-info/METADATA", "Name: thing\nVersion: 1.0\n")
    assert inspection.read_wheel(str(path))["record"] == ["RECORD is missing"]


# ---------------------------------------------------------------- archives that are none


def test_no_whole_wheel(tmp_path: Path) -> None:
    path = make_wheel(tmp_path)
    whole = path.read_bytes()
    for data in (b"", b"<html>", whole[:-30], whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(Problem, match="no whole wheel"):
            inspection.read_wheel(str(path))
    # a bit that flipped inside a member
    place = whole.index(b"thing/__init__.py") + len("thing/__init__.py") + 2
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    with pytest.raises(Problem, match="no whole wheel"):
        inspection.read_wheel(str(path))
    with pytest.raises(Problem, match="no whole wheel"):
        inspection.read_wheel(str(tmp_path / "absent.whl"))


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "_TEXT_LIMIT", 1 << 20)
    path = make_wheel(tmp_path, files={"bomb.so": bytes(4 << 20)})
    with pytest.raises(Problem, match="it claims 4 MB in 0 MB"):
        inspection.read_wheel(str(path))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a", "a")
    with pytest.raises(Problem, match="which no wheel uses"):
        inspection.read_wheel(str(path))


def test_two_wheels_in_one(tmp_path: Path) -> None:
    path = make_wheel(tmp_path, files={"other-1.0.dist-info/METADATA": b"Name: other\nVersion: 1.0\n"})
    with pytest.raises(Problem, match=r"several \.dist-info folders"):
        inspection.read_wheel(str(path))


# ---------------------------------------------------------------- what is installed


def install(site: Path, files: dict[str, bytes], **more: Any) -> None:
    """Unpack a made-up wheel into a site folder."""
    site.mkdir(parents=True, exist_ok=True)
    options = {"name": "causal_conv1d", "version": "1.6.0", "tag": "cp310-cp310-linux_aarch64", **more}
    with zipfile.ZipFile(make_wheel(site.parent, files=files, **options)) as archive:
        archive.extractall(site)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        (FILE, make_elf(gpu=CUBIN), None),
        (FILE, make_elf("x86_64"), f"{FILE} is for x86_64, not for aarch64"),
        (FILE, make_elf(gpu=container(entry(80), entry(90))), f"{FILE} holds code for sm_80, sm_90, not for sm_87"),
        ("other.so", make_elf(), f"it holds no extension {MODULE} (it holds other.so)"),
        (FILE, make_elf(gpu=CUBIN, glibc=["GLIBC_2.38"]), f"{FILE} asks for glibc 2.38, there is 2.35"),
        (FILE, make_elf(gpu=CUBIN)[:900], f"{FILE} is damaged: "),
    ],
)
def test_the_same_judge_sees_what_is_installed(name: str, data: bytes, reason: str | None, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install(site, {name: data})
    found = inspection.read_installed(str(site), "causal-conv1d", [MODULE])
    assert found is not None and (found["name"], found["version"]) == ("causal_conv1d", "1.6.0")
    said = inspection.judge_installed(json.loads(json.dumps(found)), ORIN)
    assert said is None if reason is None else str(said).startswith(reason)


def test_an_extension_without_metadata_is_seen_too(tmp_path: Path) -> None:
    assert inspection.read_installed(str(tmp_path), "causal_conv1d", [MODULE]) is None
    (tmp_path / FILE).write_bytes(make_elf("x86_64"))
    found = inspection.read_installed(str(tmp_path), "causal_conv1d", [MODULE])
    assert found is not None and inspection.judge_installed(found, ORIN) == f"{FILE} is for x86_64, not for aarch64"


def test_what_was_not_surveyed_is_not_judged() -> None:
    assert inspection.judge_installed({}, ORIN) is None
    assert inspection.judge_installed({"name": "x", "version": "1"}, ORIN) == "it is x 1 by its own METADATA"


def test_another_version_is_another_thing(tmp_path: Path) -> None:
    install(tmp_path / "site", {FILE: make_elf(gpu=CUBIN)}, version="1.5.0")
    found = inspection.read_installed(str(tmp_path / "site"), "causal_conv1d", [MODULE])
    assert found is not None and "1.5.0" in str(inspection.judge_installed(found, ORIN))


def test_the_survey_reports_each_environment_quickly(tmp_path: Path) -> None:
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    good = tmp_path / "envs/good/lib" / python / "site-packages"
    install(good, {FILE: b""})
    (good / FILE).write_bytes(make_elf(gpu=container(*[entry(87, payload=1 << 20)] * 50)))
    (tmp_path / "envs/bare/lib" / python / "site-packages").mkdir(parents=True)
    wanted = [{"package": "causal_conv1d", "modules": [MODULE]}, {"package": "mamba_ssm", "modules": ["x"]}]
    began = time.monotonic()
    venvs = state.read_environments(str(tmp_path), "aarch64", [], [], wanted)["venvs"]
    assert time.monotonic() - began < 2
    assert venvs["bare"]["inspection"] == {} and list(venvs["good"]["inspection"]) == ["causal_conv1d"]
    library = venvs["good"]["inspection"]["causal_conv1d"]["libraries"][FILE]
    assert library["archs"]["87"]["cubins"] == 50 and library["machine"] == "aarch64"
    assert inspection.judge_installed(venvs["good"]["inspection"]["causal_conv1d"], ORIN) is None
