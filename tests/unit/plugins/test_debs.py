"""Debian packages as data: what is missing, where apt looks, which changes are refused."""

from __future__ import annotations

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils import apt_root, debs
from ansible_collections.jetson.mamba.plugins.module_utils.debs import Change, Simulation
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem

STATUS = """\
Package: libc6
Status: install ok installed
Architecture: arm64
Multi-Arch: same
Installed-Size: 12000
Version: 2.35-0ubuntu3.8
Depends: libgcc-s1
Conffiles:
 /etc/ld.so.conf.d/aarch64-linux-gnu.conf d4e7a7b88a71b5ffd9e2644e71a0cfab
Description: GNU C Library

Package: libc6
Status: install ok installed
Architecture: armhf
Version: 2.35-0ubuntu3.8

Package: mawk
Status: hold ok triggers-pending
Architecture: arm64
Version: 1.3.4
Provides: awk, mawk-like (= 2.0)

Package: gone
Status: deinstall ok config-files
Architecture: arm64
Version: 1.0

Package: nvidia-l4t-core
Status: install ok installed
Architecture: arm64
Version: 36.4.7-20250918154033
"""


def rows(text: str = STATUS) -> list[debs.Row]:
    return list(debs.stanzas(text))


def lacking(*names: str, text: str = STATUS) -> list[str]:
    return [row["name"] for row in debs.missing([debs.parse_wish(name) for name in names], rows(text), "arm64")]


def test_a_control_file_is_read_with_its_continuations() -> None:
    first = rows()[0]
    assert first["package"] == "libc6"
    assert first["conffiles"].startswith("\n /etc/ld.so.conf.d")
    assert len(rows()) == 5


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("libc6", True),
        ("libc6:armhf", True),
        ("libc6:i386", False),
        ("libc6=2.35-0ubuntu3.8", True),
        ("libc6=2.36", False),
        ("awk", True),
        ("mawk-like=2.0", True),
        ("mawk-like=1.0", False),
        ("gone", False),
        ("g++", False),
    ],
)
def test_what_is_missing(name: str, there: bool) -> None:
    assert lacking(name) == ([] if there else [name])


def test_a_package_of_another_architecture_does_not_count() -> None:
    assert lacking("zlib1g", text="Package: zlib1g\nStatus: install ok installed\nArchitecture: armhf\nVersion: 1\n")
    assert not lacking("zlib1g", text="Package: zlib1g\nStatus: install ok installed\nArchitecture: all\nVersion: 1\n")


@pytest.mark.parametrize("name", ["", "-y", "g++-", "../x.deb", "Foo", "a b", "python3.*", "task^", "libc6=", "x=1;rm"])
def test_what_is_no_name_is_refused(name: str) -> None:
    """With a minus at its end a name would ask apt to remove the package."""
    with pytest.raises(Problem):
        debs.parse_wish(name)


def test_what_dpkg_left_unfinished() -> None:
    assert debs.broken(rows(), ["tmp.i"]) == []
    assert debs.broken(rows(), ["0001"]) == ["dpkg was interrupted"]
    half = STATUS.replace("install ok installed", "install ok half-configured", 1)
    assert debs.broken(rows(half)) == ["libc6 is half-configured"]
    assert debs.broken(rows(STATUS.replace("install ok", "install reinstreq", 1))) == ["libc6 is reinstreq"]


def test_devices_with_the_same_packages_are_the_same() -> None:
    text = debs.canonical_status(rows())
    turned = "\n\n".join(reversed(STATUS.strip().split("\n\n"))).replace("GNU C Library", "another text")
    assert debs.canonical_status(rows(turned)) == text
    assert debs.canonical_status(rows(STATUS.replace("triggers-pending", "installed"))) == text
    assert debs.canonical_status(rows(STATUS.replace("36.4.7", "36.4.8"))) != text
    assert "Conffiles" not in text
    assert "gone" not in text
    assert "Installed-Size: 12000" in text  # apt tells two builds of one version apart by it
    assert [row["package"] for row in debs.stanzas(text) if row["status"].startswith("hold")] == ["mawk"]
    assert debs.held(debs.stanzas(text)) == ["mawk"]


def test_both_formats_of_sources_become_one() -> None:
    found = debs.parse_sources(
        "# a comment\n"
        "deb-src http://a/ jammy main\n"
        "deb [arch=arm64,armhf signed-by=/k/a.gpg trusted=yes lang+=de] http://a/ jammy main  universe # here\n"
        "deb https://b/cuda/ /\n"
    )
    assert found == [
        {
            "Types": "deb",
            "URIs": "http://a/",
            "Suites": "jammy",
            "Components": "main universe",
            "Architectures": "arm64 armhf",
            "Signed-By": "/k/a.gpg",
            "Trusted": "yes",
            "Languages-Add": "de",
        },
        {"Types": "deb", "URIs": "https://b/cuda/", "Suites": "/"},
    ]
    key = "-----BEGIN PGP PUBLIC KEY BLOCK-----"
    deb822 = debs.parse_sources(
        "Types: deb deb-src\nURIs: http://a/\nSuites: noble\nComponents: main\nSigned-By: /k/b.asc, /k/c.gpg\n\n"
        "Types: deb\nURIs: http://off/\nSuites: x\nEnabled: no\n\n"
        f"Types: deb\nURIs: http://c/\nSuites: ./\nSigned-By:\n {key}\n .\n"
    )
    assert [row["URIs"] for row in deb822] == ["http://a/", "http://c/"]
    assert deb822[0]["Types"] == "deb"
    assert debs.keyrings(deb822[0]) == ["/k/b.asc", "/k/c.gpg"]
    assert debs.keyrings(deb822[1]) == []
    moved = debs.with_keyrings(deb822[0], {"/k/b.asc": "/root/0.asc"})
    assert moved["Signed-By"] == "/root/0.asc /k/c.gpg"
    text = debs.render_sources([moved, deb822[1]])
    assert f"Signed-By: \n {key}\n .\n" in text
    assert debs.parse_deb822(text)[0]["Targets"] == "Packages"


def test_a_place_on_the_device_is_no_source_for_the_controller() -> None:
    remote, dropped = debs.split_remote(debs.parse_one_line("deb file:///var/cuda-repo /\ndeb https://a/ x main\n"))
    assert [row["URIs"] for row in remote] == ["https://a/"]
    assert dropped == ["file:///var/cuda-repo (reached on the device only)"]


PRINTED = """\
Reading package lists...
Inst libc6 [2.35-0ubuntu3.8] (2.35-0ubuntu3.9 Ubuntu:22.04/jammy-updates [arm64]) [libc-bin:arm64 ]
Inst libc6:armhf [2.35-0ubuntu3.8] (2.35-0ubuntu3.9 Ubuntu:22.04/jammy-updates [armhf])
Inst own (1:1.0  [all])
Remv less [590] [x:arm64 ]
Conf own (1:1.0  [all])
"""


def test_a_simulation_is_read() -> None:
    simulation = apt_root.parse_simulation(PRINTED)
    assert simulation.install == [
        Change("libc6", "arm64", "2.35-0ubuntu3.8", "2.35-0ubuntu3.9"),
        Change("libc6", "armhf", "2.35-0ubuntu3.8", "2.35-0ubuntu3.9"),
        Change("own", "all", "", "1:1.0"),
    ]
    assert simulation.remove == [Change("less", "", "590", "")]


def test_uris_are_read() -> None:
    digest = "ab" * 32
    found = apt_root.parse_uris(
        f"NOTE: x\n'http://a/g%2b%2b_1_arm64.deb' g++_4%3a12.2.0-3_arm64.deb 1356 SHA256:{digest}\n"
        "'http://a/old_1_all.deb' old_1_all.deb 5 MD5Sum:d41d8cd98f00b204e9800998ecf8427e\n"
    )
    assert found[0] == ("http://a/g%2b%2b_1_arm64.deb", "g++", "4:12.2.0-3", "arm64", 1356, digest)
    assert found[1].sha256 == ""


def by_number(one: str, other: str) -> bool:
    return float(one) < float(other)


@pytest.mark.parametrize(
    ("install", "remove", "named"),
    [
        ([Change("nvidia-l4t-core", "arm64", "1", "2")], [], "nvidia-l4t-core 1 -> 2 (part of L4T)"),
        ([Change("nvidia-l4t-new", "arm64", "", "2")], [], "nvidia-l4t-new 2 (part of L4T)"),
        ([Change("kept", "arm64", "1", "2")], [], "kept 1 -> 2 (held)"),
        ([Change("libc6", "arm64", "2", "1")], [], "libc6 2 -> 1 (a downgrade)"),
        ([], [Change("less", "", "590", "")], "less 590 removed"),
    ],
)
def test_changes_that_nobody_asked_for_are_refused(install: list[Change], remove: list[Change], named: str) -> None:
    fine = Change("g++", "arm64", "", "1")
    with pytest.raises(Problem) as caught:
        debs.judge(Simulation([fine, *install], remove), ["kept"], by_number)
    assert caught.value.found.endswith(": " + named)


def test_installing_and_upgrading_is_allowed() -> None:
    changes = [
        Change("g++", "arm64", "", "1"),
        Change("libc6", "arm64", "1", "2"),
        Change("nvidia-cuda", "all", "", "1"),
    ]
    debs.judge(Simulation(changes, []), ["kept"], by_number)


def versions(one: str, sign: str, other: str) -> bool:
    return {">=": float(one) >= float(other), "=": one == other, "<<": float(one) < float(other)}[sign]


@pytest.mark.parametrize(
    ("offered", "expected"),
    [
        ("", ["g++"]),
        (
            "Package: g++\nVersion: 2\nDepends: gcc (>= 2), cpp | fancy (= 3)\n",
            ["gcc (>= 2), which g++ needs", "cpp or fancy (= 3), which g++ needs"],
        ),
        (
            "Package: g++\nVersion: 2\nDepends: gcc (>= 2)\n\nPackage: gcc\nVersion: 1\n",
            ["gcc (>= 2), which g++ needs"],
        ),
        (
            "Package: g++\nVersion: 2\nDepends: gcc\n\nPackage: gcc\nVersion: 1\nDepends: deep\n",
            ["deep, which gcc needs"],
        ),
        (
            "Package: g++\nVersion: 2\nPre-Depends: base (>= 1.5)\nDepends: made\n\n"
            "Package: x\nVersion: 1\nProvides: made\n",
            [],
        ),
        ("Package: g++\nVersion: 2\nDepends: base (>= 3) | base (<< 2), g++:any\n", []),
    ],
)
def test_what_a_folder_lacks_is_named(offered: str, expected: list[str]) -> None:
    there = rows("Package: base\nStatus: install ok installed\nArchitecture: arm64\nVersion: 1.9\n")
    wishes = [debs.parse_wish("g++")]
    assert debs.unmet(wishes, rows(offered), there, versions) == expected


def test_apts_refusal_is_short() -> None:
    printed = (
        "Reading package lists...\nThe following packages have unmet dependencies:\n a : Depends: b but it is not\n"
        "     and more\nUntil here\n"
    )
    assert apt_root.refusal(printed, "E: Unable to correct problems\nE: Unable to correct problems\n") == (
        "The following packages have unmet dependencies:\n a : Depends: b but it is not\n     and more\n"
        "Unable to correct problems"
    )
    assert apt_root.refusal("", "weird\n") == "weird"


# ---------------------------------------------------------------- what apt-get prints


def test_architectures_origins_and_what_is_broken_meanwhile_are_read_over() -> None:
    printed = (
        "Reading package lists...\nNOTE: This is only a simulation!\n"
        "Inst libc6:armhf [2.35] (2.36 Ubuntu:22.04/jammy-updates, Ubuntu:22.04/jammy-security [armhf]) []\n"
        "Inst nvidia-l4t-core:arm64 [36.4] (36.5 local-deb [arm64]) [gcc:arm64 on nvidia-l4t-core:arm64] [gcc:arm64 ]\n"
        "Inst new (1:2.0-1~x local [all])\nRemv old:armhf [1.0] [dependent:armhf ]\nPurg older [0.1]\n"
        "Conf new (1:2.0-1~x local [all])\nInstalled nothing\n"
    )
    simulation = apt_root.parse_simulation(printed)
    assert simulation.install == [
        Change("libc6", "armhf", "2.35", "2.36"),
        Change("nvidia-l4t-core", "arm64", "36.4", "36.5"),
        Change("new", "all", "", "1:2.0-1~x"),
    ]
    assert [(change.name, change.old, change.new) for change in simulation.remove] == [
        ("old", "1.0", ""),
        ("older", "0.1", ""),
    ]
    assert [change.name for change in simulation.configure] == ["new"]


@pytest.mark.parametrize(
    "line",
    [
        "Inst nvidia-l4t-core",
        "Inst nvidia-l4t-core [36.4]",
        "Inst nvidia-l4t-core (36.5 [arm64)",
        "Inst nvidia-l4t-core [36.4] (36.5 x [arm64]) and more",
        "Remv ",
        "Remv nvidia-l4t-core (36.4)",
        "Purg a b",
        "Conf gcc broken",
    ],
)
def test_a_change_that_cannot_be_read_is_refused_with_its_line(line: str) -> None:
    with pytest.raises(Problem) as caught:
        apt_root.parse_simulation("Inst gcc (12 local [arm64])\n" + line + "\n")
    assert repr(line.rstrip()) in caught.value.found or repr(line) in caught.value.found


def test_files_that_cannot_be_read_are_refused_with_their_line() -> None:
    line = "'http://a/g%2b%2b.deb' g++_4%3a12_arm64.deb 3 SHA256:{}".format("A" * 64)
    assert apt_root.parse_uris(f"Reading…\n{line}\n") == [
        apt_root.Uri("http://a/g%2b%2b.deb", "g++", "4:12", "arm64", 3, "a" * 64)
    ]
    assert apt_root.parse_uris("'http://a/x' x_1_all.deb 3 MD5Sum:00\n")[0].sha256 == ""
    for odd in ("'http://bob:pw@a/x' x_1.deb 3", "'http://a/x' x_1_all.deb three", "'http://a/x"):
        with pytest.raises(Problem, match="not understood") as caught:
            apt_root.parse_uris(odd)
        assert "pw" not in caught.value.found


def test_a_part_of_l4t_is_known_with_its_architecture_too() -> None:
    for name, frozen in (("nvidia-l4t-core:arm64", True), ("nvidia-l4t-core", True), ("nvidia-l4tx", False)):
        assert debs.is_frozen(name) is frozen
        refused = [Change(name, "arm64", "", "2")]
        if frozen:
            with pytest.raises(Problem, match="part of L4T"):
                debs.judge(Simulation(refused, []), [], lambda one, other: one < other)
            with pytest.raises(Problem, match="part of L4T"):
                debs.judge(Simulation([], [], refused), [], lambda one, other: one < other)
        else:
            debs.judge(Simulation(refused, [], refused), [], lambda one, other: one < other)
