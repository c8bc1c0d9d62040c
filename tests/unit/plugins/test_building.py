"""The controller's side of a build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
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
