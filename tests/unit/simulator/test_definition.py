"""What a fleet file may say, and what a person reads when it says something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulator import definition
from simulator.definition import HostSpec
from simulator.errors import Problem


def write(folder: Path, text: str) -> Path:
    path = folder / "fleet.yml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_default_fleet_has_two_platform_classes() -> None:
    hosts = definition.load(definition.DEFAULT_FILE)
    assert [(host.name, host.l4t, host.cuda) for host in hosts] == [
        ("orin-a", "36.4.7", "12.6"),
        ("orin-b", "36.4.7", "12.6"),
        ("orin-c", "36.3.0", "12.2"),
    ]


def test_a_host_survives_being_written_and_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "hosts:\n  one:\n    l4t: '36.4.7'\n    cuda: null\n    model: Orin Nano\n    compatible: [a, b]\n"
        "    sudo_password: secret\n    from: shot\n    variables: {x: 1}\n",
    )
    host = definition.load(path)[0]
    assert host == HostSpec("one", "36.4.7", None, "Orin Nano", ("a", "b"), "secret", "shot", {"x": 1})
    assert HostSpec.from_dict(host.as_dict()) == host


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("hosts: {}", "names no hosts"),
        ("- a", "names no hosts"),
        ("hosts: [", "is not YAML"),
        ("hosts: {One: {l4t: '36.4.7', cuda: null}}", "host name 'One'"),
        ("hosts: {one: {l4t: 36.4, cuda: null}}", "l4t is 36.4"),
        ("hosts: {one: {l4t: '36.4.7'}}", "cuda is None"),
        ("hosts: {one: {l4t: '36.4.7', cuda: 12.6}}", "cuda is 12.6"),
        ("hosts: {one: {l4t: '36.4.7', cuda: null, sudo_pasword: x}}", "no key named 'sudo_pasword'"),
        ("hosts: {one: {l4t: '36.4.7', cuda: null, sudo_password: 12}}", "sudo_password is 12"),
        ("hosts: {one: {l4t: '36.4.7', cuda: null, variables: 12}}", "variables is 12"),
        ("hosts: {one: {l4t: '36.4.7', cuda: null, compatible: orin}}", "compatible is 'orin'"),
        ("hosts: {one: }", "is not a mapping"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(Problem) as caught:
        definition.load(write(tmp_path, text))
    assert found in caught.value.found
    assert caught.value.expected and caught.value.next_step


def test_a_file_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="No such file"):
        definition.load(tmp_path / "none.yml")


def test_a_misspelt_key_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(Problem) as caught:
        definition.load(write(tmp_path, "hosts: {one: {l4t: '36.4.7', cuda: null, sudo_pasword: x}}"))
    assert caught.value.next_step == "did you mean 'sudo_password'?"


def test_numbered_hosts_are_of_the_default_platform() -> None:
    hosts = definition.numbered(12)
    assert [hosts[0].name, hosts[11].name] == ["orin-01", "orin-12"]
    assert {(host.l4t, host.cuda) for host in hosts} == {("36.4.7", "12.6")}


@pytest.mark.parametrize("count", [0, -1, 201])
def test_a_number_of_hosts_has_bounds(count: int) -> None:
    with pytest.raises(Problem):
        definition.numbered(count)


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a/b", "..", "a" * 41])
def test_a_name_that_would_not_do_is_refused(name: str) -> None:
    with pytest.raises(Problem):
        definition.check_name("fleet", name)
