"""Versions, spellings of one version, wheel names and what they fit."""

from __future__ import annotations

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import versions
from ansible_collections.jetson.mamba.plugins.module_utils.versions import Target

FILE = "2.5.0a0+872d972e41.nv24.08.17622132"
TORCH = "2.5.0a0+872d972e41.nv24.08"
PIP = "2.5.0a0+872d972e41.nv24.8"
ORIN = Target("aarch64", "3.10", "2.35")


@pytest.mark.parametrize("first", [FILE, TORCH, PIP])
@pytest.mark.parametrize("second", [FILE, TORCH, PIP])
def test_nvidias_three_spellings_are_one_version(first: str, second: str) -> None:
    assert versions.same_version(first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1.0", "1.0.0"),
        ("1.0-1", "1.0.post1"),
        ("1.0.0RC1", "1rc1"),
        ("v2.2.4", "2.2.4"),
        ("0.20.0a0+AFC54F7", "0.20.0a0+afc54f7"),
        ("1!1.0", "1!1"),
        ("not a version", "not a version"),
    ],
)
def test_same(first: str, second: str) -> None:
    assert versions.same_version(first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("2.5.0a0+872d972e41.nv24.08", "2.5.0a0+872d972e41"),
        ("2.5.0a0+872d972e41.nv24.08", "2.5.0a0+872d972e41.nv24.09"),
        ("2.5.0a0+872d972e41.nv24.08", "2.5.0a0+3bcc3cddb5.nv24.08.17622132"),
        ("2.5.0a0+872d972e41.nv24.08", "2.5.0a0+872d972e41.nv24.08.1"),
        ("2.5.0a0+872d972e41.nv24.08.17622132", "2.5.0a0+872d972e41.nv24.08.17622133"),
        ("2.13.0+cpu", "2.13.0"),
        ("2.13.0+cpu", "2.13.0+cpu.17622132"),
        ("2.5.0a0", "2.5.0"),
        ("1.5.0.post8", "1.5.0"),
        ("1.10", "1.1"),
        ("1.0.dev1", "1.0"),
        ("1!1.0", "1.0"),
        ("nonsense", "1.0"),
    ],
)
def test_not_the_same(first: str, second: str) -> None:
    assert not versions.same_version(first, second)
    assert not versions.same_version(second, first)


@pytest.mark.parametrize(
    ("version", "shown"), [(FILE, PIP), (TORCH, PIP), (PIP, PIP), ("2.13.0+cpu", "2.13.0+cpu"), ("1.0", "1.0")]
)
def test_pip_spelling(version: str, shown: str) -> None:
    assert versions.pip_spelling(version) == shown


@pytest.mark.parametrize(
    ("torch", "torchvision"),
    [("2.5.0a0+872d972e41.nv24.8", "0.20.*"), ("2.4.0a0", "0.19.*"), ("2.13.0+cpu", "0.28.*"), ("1.13.1", None)],
)
def test_matching_torchvision(torch: str, torchvision: str | None) -> None:
    assert versions.matching_torchvision(torch) == torchvision


def test_parse_wheel_name() -> None:
    parts = versions.parse_wheel_name(f"torch-{FILE}-cp310-cp310-linux_aarch64.whl")
    assert (parts.name, parts.version, parts.platforms) == ("torch", FILE, ["linux_aarch64"])
    assert versions.parse_wheel_name("a-1-2build-py2.py3-none-any.whl").build == "2build"
    for name in ("a-1.tar.gz", "a-1-py3-none.whl", "a--py3-none-any.whl"):
        with pytest.raises(ValueError, match="not a wheel"):
            versions.parse_wheel_name(name)


@pytest.mark.parametrize(
    "filename",
    [
        "torch-2.5.0-cp310-cp310-linux_aarch64.whl",
        "a-1-cp310-cp310-manylinux_2_17_aarch64.manylinux2014_aarch64.whl",
        "a-1-cp310-cp310-manylinux_2_35_aarch64.whl",
        "a-1-cp38-abi3-manylinux_2_28_aarch64.whl",
        "a-1-cp310-none-linux_aarch64.whl",
        "a-1-py2.py3-none-any.whl",
        "a-1-py3-none-manylinux2014_aarch64.whl",
        "a-1-py310-none-any.whl",
    ],
)
def test_fits(filename: str) -> None:
    assert versions.tag_mismatch(versions.parse_wheel_name(filename), ORIN) is None


@pytest.mark.parametrize(
    ("filename", "reason"),
    [
        ("a-1-cp311-cp311-linux_aarch64.whl", "cp311"),
        ("a-1-cp310-cp310-linux_x86_64.whl", "linux_x86_64"),
        ("a-1-cp310-cp310-manylinux_2_36_aarch64.whl", "manylinux_2_36"),
        ("a-1-cp310-cp310-manylinux2010_aarch64.whl", "manylinux2010"),
        ("a-1-cp310-cp310-macosx_11_0_arm64.whl", "macosx"),
        ("a-1-cp311-abi3-manylinux_2_17_aarch64.whl", "cp311-abi3"),
        ("a-1-cp39-cp39-linux_aarch64.whl", "cp39"),
        ("a-1-py2-none-any.whl", "py2"),
        ("a-1-py311-none-any.whl", "py311"),
        ("a-1-pp310-pypy310_pp73-linux_aarch64.whl", "pp310"),
    ],
)
def test_does_not_fit(filename: str, reason: str) -> None:
    assert reason in str(versions.tag_mismatch(versions.parse_wheel_name(filename), ORIN))


def test_tags_agree_with_packaging() -> None:
    tags = pytest.importorskip("packaging.tags")
    for machine, glibc in (("x86_64", "2.36"), ("aarch64", "2.35")):
        target = Target(machine, "3.10", glibc)
        fitting = set(tags.cpython_tags((3, 10), ["cp310"], versions.platform_tags(machine, glibc)))
        fitting |= set(tags.compatible_tags((3, 10), "cp310", versions.platform_tags(machine, glibc)))
        for tag in fitting:
            name = versions.parse_wheel_name(f"a-1-{tag.interpreter}-{tag.abi}-{tag.platform}.whl")
            assert versions.tag_mismatch(name, target) is None, tag


def test_target_from_dict() -> None:
    assert Target.from_dict({"machine": "aarch64", "python": "3.10.12", "glibc": "2.35"}) == ORIN
    assert ORIN.abi == "cp310"
    with pytest.raises(ValueError, match="glibc"):
        Target.from_dict({"machine": "aarch64", "python": "3.10"})
    with pytest.raises(ValueError, match="python"):
        Target.from_dict({"machine": "aarch64", "python": "three", "glibc": "2.35"})
