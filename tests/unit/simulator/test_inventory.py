"""The inventory: variables, passwords, places with awkward names."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from simulator import inventory
from simulator.backend import Host
from simulator.definition import HostSpec
from simulator.errors import Problem


def host(name: str, **wishes: Any) -> Host:
    return Host(HostSpec(name, "36.4.7", "12.6", **wishes), "198.18.0.10", 1, f"fleets/f/hosts/{name}", ("base",))


def jetsons(text: str) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(text)["all"]["children"]["jetsons"]
    return data


def test_later_variables_win_and_hosts_have_their_own() -> None:
    one = host("one", variables={"only": "one"})
    group = jetsons(inventory.render([one], Path("/f"), "proxy", [{"a": 1, "b": 1}, {"b": 2}]))
    assert (group["vars"]["a"], group["vars"]["b"]) == (1, 2)
    assert group["hosts"]["one"] == {"ansible_host": "198.18.0.10", "only": "one"}


def test_a_host_whose_sudo_asks_has_its_answer_unless_the_user_gives_one() -> None:
    asks = host("asks", sudo_password="secret")
    told = host("told", sudo_password="secret", variables={"ansible_become_password": "{{ vaulted }}"})
    hosts = jetsons(inventory.render([asks, told], Path("/f"), "proxy"))["hosts"]
    assert hosts["asks"]["ansible_become_password"] == "secret"
    assert hosts["told"]["ansible_become_password"] == "{{ vaulted }}"


def test_a_place_with_blanks_and_percent_signs_reaches_ssh_whole() -> None:
    arguments = jetsons(inventory.render([], Path("/a b/100%"), "enter NAME %h:%p"))["vars"]["ansible_ssh_common_args"]
    words = shlex.split(arguments)
    assert 'UserKnownHostsFile="/a b/100%%/known_hosts"' in words
    assert inventory.key_file(Path("/a b/100%")) == "/a b/100%%/key"
    assert "ProxyCommand=enter NAME %h:%p" in words


@pytest.mark.parametrize(("text", "found"), [("- 1", "holds a list"), ("a: [", "is not YAML")])
def test_variables_that_are_no_mapping_are_a_problem(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "vars.yml"
    path.write_text(text)
    with pytest.raises(Problem, match=found):
        inventory.read_variables(path)
    with pytest.raises(Problem, match="No such file"):
        inventory.read_variables(tmp_path / "none.yml")


def test_an_empty_file_of_variables_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "vars.yml"
    path.write_text("---\n")
    assert inventory.read_variables(path) == {}
