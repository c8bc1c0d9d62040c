"""The controller's side of a build."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.jetson.mamba.plugins.module_utils.build import build_key
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.modules import build_wheel, component
from ansible_collections.jetson.mamba.plugins.plugin_utils import building, components, sources, supply
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheelhouse import Wheelhouse

from tests.unit.plugins.supply_kit import ORIN, SOURCE, damage, real_wheel, sha256, stock


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
    assert caught.value.built, "another host would fail at it too"
    copy = tmp_path / "orin-a" / "causal_conv1d-abababababab.log"
    assert copy.read_text() == "log of /b/causal_conv1d-abababababab/log"
    assert str(copy) in caught.value.result["msg"] and caught.value.result["msg"].startswith("found: x")


@pytest.mark.parametrize("host", ["../x", "a/b", "/etc", "fe80::1%eth0", ".."])
def test_no_host_name_leads_out_of_the_folder_of_logs(order: building.Order, tmp_path: Path, host: str) -> None:
    fake = FakeDevice(start=[START[1]], poll=[{"state": "failed"}], result=[{"failed": True, "msg": "found: x"}])
    logs = tmp_path / "deep" / "logs"
    with pytest.raises(building.StepFailed):
        building.follow(dataclasses.replace(fake.device(), host=host), order, str(logs))
    (log,) = tmp_path.rglob("*.log")
    assert log.parent.parent == logs


def test_a_build_that_could_not_begin_is_no_failed_build(order: building.Order, tmp_path: Path) -> None:
    """Another host of the class may have the room that this one lacks."""
    fake = FakeDevice(start=[{"failed": True, "msg": "found: 10 MB free"}])
    with pytest.raises(building.StepFailed) as caught:
        building.follow(fake.device(), order, str(tmp_path))
    assert not caught.value.built and fake.calls == ["start"]


# --- into the wheelhouse ---


class Builder(FakeDevice):
    """A device that has built: answers for a build that ends at once, and hands its files out."""

    def __init__(self, wheel: Path, **changes: Any) -> None:
        built = {"wheel": f"/b/{wheel.name}", "sha256": sha256(wheel), "seconds": 80.0, "size_mb": 0.1}
        super().__init__(**{
            "start": [START[1]],
            "poll": [{"state": "done"}],
            "result": [built],
            "discard": [{"changed": False}],
            **changes,
        })
        self.files: dict[str, bytes] = {f"/b/{wheel.name}": wheel.read_bytes()}
        self.fetched: list[str] = []

    def receive(self, remote: str, local: str) -> None:
        self.fetched.append(remote)
        if remote not in self.files:
            raise FileNotFoundError(remote)
        Path(local).write_bytes(self.files[remote])

    def device(self) -> building.Device:
        return dataclasses.replace(super().device(), receive=self.receive)


@pytest.fixture
def wanted(tmp_path: Path) -> building.Order:
    """Return an order with the key that follows from its parts."""
    row = components.component("causal_conv1d", "1.6.0")
    source = sources.SourceArchive(tmp_path / "s.tar", SOURCE, "causal_conv1d-1.6.0.tar.gz", "1.6.0")
    key = build_key(row.name, row.version, SOURCE, ORIN, "87", [])
    return building.Order(row, source, key, {"build_root": "/b", "sm": "87", "build_flags": []})


@pytest.fixture
def house(tmp_path: Path) -> Wheelhouse:
    return Wheelhouse(tmp_path / "wheelhouse")


def build(fake: FakeDevice, order: building.Order, house: Wheelhouse, **more: Any) -> tuple[supply.Supply, bool]:
    logs = str(house.root.parent / "logs")
    return building.build(fake.device(), order, order.wish(ORIN), house, 0.0, logs, "36.4.7", **more)


def locks(house: Wheelhouse) -> list[Path]:
    return [*house.root.glob("*/locks/*.json")]


def test_a_wheel_is_built_fetched_kept_and_the_job_discarded(
    wanted: building.Order, house: Wheelhouse, tmp_path: Path
) -> None:
    held: dict[str, bool] = {}

    class Watching(Builder):
        def run(self, module: str, arguments: dict[str, Any]) -> dict[str, Any]:
            held[arguments["mode"]] = bool(locks(house))
            return super().run(module, arguments)

    wheel = real_wheel(tmp_path / "made")
    fake = Watching(wheel)
    fake.files[f"{wanted.folder}/log"] = b"nvcc ...\n"
    found, compiled = build(fake, wanted, house)
    assert compiled and fake.calls == ["start", "poll", "result", "discard"]
    assert found.path is not None and found.path.read_bytes() == wheel.read_bytes()
    row = house.manifest(ORIN)[wanted.key]
    assert (row["builder"], row["l4t"], row["seconds"], row["origin"]) == ("orin-a", "36.4.7", 80.0, "built on orin-a")
    assert row["source"] == "causal_conv1d-1.6.0.tar.gz" and row["source_sha256"] == SOURCE
    assert (house.folder(ORIN) / row["log"]).read_text() == "nvcc ...\n"
    assert held["start"] and held["poll"] and held["result"], "nobody else builds the same meanwhile"
    assert locks(house) == []
    again = Builder(wheel)
    assert build(again, wanted, house) == (found, False) and again.calls == [] and again.fetched == []


def test_what_was_served_meanwhile_is_not_compiled(
    wanted: building.Order, house: Wheelhouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another controller had the lock, and was done when we got it."""
    real_lock = house.locked

    @contextlib.contextmanager
    def locked(*arguments: Any) -> Iterator[float]:
        stock(house, wanted.wish(ORIN), real_wheel(tmp_path / "theirs", text="theirs"), "other")
        with real_lock(*arguments) as waited:
            yield waited

    monkeypatch.setattr(house, "locked", locked)
    fake = Builder(real_wheel(tmp_path / "made"))
    found, compiled = build(fake, wanted, house)
    assert not compiled and fake.calls == []
    assert found.served is not None and found.served["origin"] == "built on other"


def test_another_controllers_build_is_not_started_a_second_time(
    wanted: building.Order, house: Wheelhouse, tmp_path: Path
) -> None:
    fake = Builder(real_wheel(tmp_path / "made"))
    with house.locked(ORIN, "causal_conv1d", wanted.key, print, 0), pytest.raises(Problem, match="is held by"):
        build(fake, wanted, house)
    assert fake.calls == []


def test_a_wheel_that_arrives_changed_is_not_kept_and_the_job_stays(
    wanted: building.Order, house: Wheelhouse, tmp_path: Path
) -> None:
    wheel = real_wheel(tmp_path / "made")
    fake = Builder(wheel)
    fake.files[f"/b/{wheel.name}"] = wheel.read_bytes()[:-1]
    with pytest.raises(Problem, match="arrived from orin-a with sha256") as caught:
        build(fake, wanted, house)
    assert sha256(wheel) in caught.value.expected and "nothing is compiled anew" in caught.value.next_step
    assert house.manifest(ORIN) == {} and not list(house.root.rglob("*.whl")) and locks(house) == []
    assert "discard" not in fake.calls, "the next run fetches it again"


def test_a_wheel_for_another_machine_is_not_kept(wanted: building.Order, house: Wheelhouse, tmp_path: Path) -> None:
    """setup.py downloaded a ready one: what the device itself let pass."""
    fake = Builder(real_wheel(tmp_path / "made", machine="x86_64"))
    with pytest.raises(Problem, match="x86_64"):
        build(fake, wanted, house)
    assert house.manifest(ORIN) == {} and locks(house) == []


def test_a_faulty_wheel_is_set_aside_before_it_is_built_anew(
    wanted: building.Order, house: Wheelhouse, tmp_path: Path
) -> None:
    damage(house, stock(house, wanted.wish(ORIN), real_wheel(tmp_path / "old", text="old")))
    wheel = real_wheel(tmp_path / "made", text="new")
    at_start: list[Any] = []

    class Watching(Builder):
        def run(self, module: str, arguments: dict[str, Any]) -> dict[str, Any]:
            if arguments["mode"] == "start":
                at_start.append(house.look(ORIN, wanted.key).row)
            return super().run(module, arguments)

    fake = Watching(wheel)
    found, compiled = build(fake, wanted, house)
    assert compiled and at_start == [None]
    assert found.path is not None and found.path.read_bytes() == wheel.read_bytes()
    assert "sha256" in fake.said[0] and "set aside as" in fake.said[0], "said before the hour of compiling"
    assert len([*(house.folder(ORIN) / "aside").glob("*.whl")]) == 1


def test_a_build_without_a_log_is_kept_all_the_same(wanted: building.Order, house: Wheelhouse, tmp_path: Path) -> None:
    found, _compiled = build(Builder(real_wheel(tmp_path / "made")), wanted, house)
    assert found.row is not None and found.row["log"] is None


def test_a_failed_build_leaves_the_wheelhouse_free(wanted: building.Order, house: Wheelhouse, tmp_path: Path) -> None:
    wheel = real_wheel(tmp_path / "made")
    for failing in ({"start": [{"failed": True, "msg": "full"}]}, {"result": [{"failed": True, "msg": "ptxas"}]}):
        fake = Builder(wheel, **failing)
        with pytest.raises(building.StepFailed) as caught:
            build(fake, wanted, house)
        assert caught.value.built is ("result" in failing)
        assert locks(house) == [] and house.manifest(ORIN) == {} and "discard" not in fake.calls


def test_a_lost_builder_leaves_the_wheelhouse_free(wanted: building.Order, house: Wheelhouse, tmp_path: Path) -> None:
    fake = Builder(real_wheel(tmp_path / "made"), poll=[Lost("gone")])
    with pytest.raises(Lost):
        build(fake, wanted, house, sleep=lambda _seconds: None)
    assert locks(house) == []


def test_a_damaged_manifest_stops_before_the_compiler(
    wanted: building.Order, house: Wheelhouse, tmp_path: Path
) -> None:
    house.folder(ORIN).mkdir(parents=True)
    (house.folder(ORIN) / "manifest.json").write_text("{")
    fake = Builder(real_wheel(tmp_path / "made"))
    with pytest.raises(Problem, match="cannot be read"):
        build(fake, wanted, house)
    assert fake.calls == []


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
    spec = {name: row for name, row in build_wheel.argument_spec().items() if name not in build_wheel.ON_CONTROLLER}
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
    for name in ("wheelhouse", "transfer"):
        assert arguments[name] == "{{ jetson_platform_plan." + name + " }}"


def test_a_builder_builds_what_was_chosen_as_it_was_planned() -> None:
    path = Path(__file__).parents[3] / "roles/wheelhouse/tasks/build.yml"
    (block,) = [task for task in yaml.safe_load(path.read_text()) if "block" in task]
    (task,) = [task for task in block["block"] if "jetson.mamba.build_wheel" in task]
    arguments = task["jetson.mamba.build_wheel"]
    assert set(arguments) <= set(build_wheel.argument_spec())
    assert arguments["patch_root"] == "{{ jetson_platform_plan.artefacts.patch_root }}"
    for name in ("version", "source", "companions", "build_flags", "class_id"):
        assert arguments[name] == "{{ item." + name + " }}", "of the job, not of the builder's own wish"


@pytest.mark.parametrize("module", [build_wheel, component])
def test_modules_take_what_a_source_is_patched_with(module: Any) -> None:
    spec, documented = module.argument_spec(), yaml.safe_load(module.DOCUMENTATION)["options"]
    assert {"patch_root", "companions", "scope"} <= set(spec) and set(spec) == set(documented)
    for name, option in spec.items():
        assert option["type"] == documented[name]["type"] and option.get("default") == documented[name].get("default")


def test_swap_is_made_before_a_build_and_removed_also_after_a_failure() -> None:
    path = Path(__file__).parents[3] / "roles/wheelhouse/tasks/build.yml"
    tasks = yaml.safe_load(path.read_text())
    asked = next(task for task in tasks if "jetson.mamba.build_swap" in task)
    (block,) = [task for task in tasks if "block" in task]
    made, _built = block["block"]
    (removed,) = block["always"]
    wish = "jetson.mamba.build_swap"
    assert asked["check_mode"] is True and "become" not in asked and tasks.index(asked) < tasks.index(block)
    assert made[wish] == asked[wish] and made["become"] is True and removed["become"] is True
    assert (removed[wish]["path"], removed[wish]["state"]) == (made[wish]["path"], "absent")
    # while another run's build goes on under it, it stays
    assert removed[wish]["build_root"] == made[wish]["build_root"] == "{{ jetson_platform_plan.paths.build }}"
