"""The controller's side of a build."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.jetson.mamba.plugins.modules import build_wheel, component
from ansible_collections.jetson.mamba.plugins.plugin_utils import building, components, sources


class Lost(Exception):
    """The connection is gone."""


class FakeDevice:
    """Answers from a script: {mode: [answer, …]}; the last answer stays."""

    def __init__(self, **answers: list[Any]) -> None:
        self.answers = answers
        self.calls: list[str] = []
        self.sent: list[tuple[str, str]] = []
        self.said: list[str] = []

    def run(self, _module: str, arguments: dict[str, Any]) -> dict[str, Any]:
        mode = arguments["mode"]
        self.calls.append(mode + ("+source" if arguments.get("source_tar") else ""))
        answers = self.answers[mode]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)

    def device(self) -> building.Device:
        return building.Device(
            "orin-a",
            self.run,
            lambda local, remote: self.sent.append((local, remote)),
            lambda remote, local: Path(local).write_text(f"log of {remote}"),
            self.said.append,
            (Lost,),
        )


@pytest.fixture
def order(tmp_path: Path) -> building.Order:
    source = sources.SourceArchive(tmp_path / "s.tar", "aa", "somewhere", "1.6.0")
    row = components.component("causal_conv1d", "1.6.0")
    return building.Order(row, source, "ab" * 32, {"build_root": "/b", "sm": "cpu"})


def running(done: int, elapsed: float) -> dict[str, Any]:
    return {"state": "running", "objects_done": done, "objects_total": 12, "elapsed": elapsed}


START = [{"state": "needs_source", "started": False, "resumed": False, "upload": "/b/source.tar"},
         {"state": "running", "started": True, "resumed": False, "upload": "/b/source.tar"}]
RESULT = [{"wheel": "/b/x.whl", "sha256": "cc", "seconds": 80.0, "size_mb": 29.5}]


def test_a_build_is_sent_followed_and_told_of(order: building.Order, tmp_path: Path) -> None:
    fake = FakeDevice(start=[*START], poll=[running(3, 80.2), {"state": "done"}], result=[*RESULT])
    built, compiled = building.follow(fake.device(), order, str(tmp_path))
    assert fake.calls == ["start", "start+source", "poll", "poll", "result"]
    assert fake.sent == [(str(tmp_path / "s.tar"), "/b/source.tar")]
    assert fake.said[1] == "orin-a | causal_conv1d: 3/12 objects, 1m20s elapsed"
    assert compiled and built["wheel"] == "/b/x.whl"


def test_a_finished_build_is_neither_sent_nor_announced(order: building.Order, tmp_path: Path) -> None:
    start = {**START[1], "state": "done", "started": False}
    fake = FakeDevice(start=[start], poll=[{"state": "done"}], result=[*RESULT])
    assert building.follow(fake.device(), order, str(tmp_path))[1] is False
    assert fake.said == [] and fake.sent == []


def test_a_lost_connection_does_not_end_it(order: building.Order, tmp_path: Path) -> None:
    fake = FakeDevice(start=[START[1]], poll=[Lost("gone"), Lost("gone"), {"state": "done"}], result=[*RESULT])
    slept: list[float] = []
    building.follow(fake.device(), order, str(tmp_path), sleep=slept.append)
    assert len(slept) == 2
    assert [line for line in fake.said if "connection lost" in line] == [
        "orin-a | connection lost (gone); the build goes on, trying again"
    ]
    gone = FakeDevice(start=[START[1]], poll=[Lost("gone")], result=[*RESULT])
    with pytest.raises(Lost):
        building.follow(gone.device(), order, str(tmp_path), sleep=slept.append)


def test_a_failure_brings_the_log(order: building.Order, tmp_path: Path) -> None:
    fake = FakeDevice(start=[START[1]], poll=[{"state": "failed"}], result=[{"failed": True, "msg": "found: x"}])
    with pytest.raises(building.StepFailed) as caught:
        building.follow(fake.device(), order, str(tmp_path))
    copy = tmp_path / "orin-a" / "causal_conv1d-abababababab.log"
    assert copy.read_text() == "log of /b/causal_conv1d-abababababab/log"
    assert str(copy) in caught.value.result["msg"] and caught.value.result["msg"].startswith("found: x")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59, "59s"), (80, "1m20s"), (7500, "2h05m")])
def test_durations(seconds: float, text: str) -> None:
    assert building.duration(seconds) == text


def test_the_key_follows_the_patches_of_the_source(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "causal_conv1d").mkdir(parents=True)
    (tree / "setup.py").write_text("one\n")
    (tree / "causal_conv1d" / "__init__.py").write_text('__version__ = "1.6.0"\n')
    series = tmp_path / "patches" / "causal_conv1d" / "1.6.0"
    series.mkdir(parents=True)
    (series / "0001-two.patch").write_text("--- a/setup.py\n+++ b/setup.py\n@@ -1 +1 @@\n-one\n+two\n")
    before, after = (hashlib.sha256(text).hexdigest() for text in (b"one\n", b"two\n"))
    (series / "series.yml").write_text(
        'schema: 1\npackage: causal_conv1d\nversion: "1.6.0"\npatches:\n'
        f"  - {{file: 0001-two.patch, target: setup.py, sha256_before: {before}, sha256_after: {after},\n"
        '     applies_to: source, why: a test, upstream: none, until: null, when: {mamba_ssm: ">=2.2"}}\n'
    )
    options = {
        "component": "causal_conv1d", "version": "1.6.0", "source": {"kind": "tree", "path": str(tree)},
        "cache": str(tmp_path / "cache"), "class_id": "c", "sm": "cpu", "build_root": "/b", "python": "/p",
        "scope": "user", "cuda_home": "",
    }
    plain = building.make_order(options)
    patch_root = str(tmp_path / "patches")
    patched = building.make_order({**options, "patch_root": patch_root, "companions": {"mamba_ssm": "2.2.4"}})
    assert patched.key != plain.key and patched.source.sha256 != plain.source.sha256
    older = building.make_order({**options, "patch_root": patch_root, "companions": {"mamba_ssm": "2.1"}})
    assert older.key == plain.key
    spec = build_wheel.argument_spec()
    arguments = {**{name: option.get("default") for name, option in spec.items()}, **plain.arguments}
    assert set(plain.arguments) <= set(spec) and build_wheel.make_request(arguments).user
    assert not build_wheel.make_request({**arguments, "scope": "venv"}).user


@pytest.mark.parametrize("role", ["causal_conv1d", "mamba_ssm"])
def test_roles_build_with_the_patches_that_were_planned(role: str) -> None:
    path = Path(__file__).parents[3] / "roles" / role / "tasks" / "main.yml"
    arguments = yaml.safe_load(path.read_text())[0]["jetson.mamba.component"]
    assert arguments["patch_root"] == "{{ jetson_platform_plan.artefacts.patch_root }}"
    assert arguments["companions"] == "{{ jetson_platform_plan.versions }}"
    assert set(arguments) <= set(component.argument_spec())


@pytest.mark.parametrize("module", [build_wheel, component])
def test_modules_take_what_a_source_is_patched_with(module: Any) -> None:
    spec, documented = module.argument_spec(), yaml.safe_load(module.DOCUMENTATION)["options"]
    assert {"patch_root", "companions", "scope"} <= set(spec) and set(spec) == set(documented)
    for name, option in spec.items():
        assert option["type"] == documented[name]["type"] and option.get("default") == documented[name].get("default")
