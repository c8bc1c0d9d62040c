"""Tables and files from plans and reports, and the callback that collects them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible import context
from ansible_collections.jetson.mamba.plugins.callback import fleet_report
from ansible_collections.jetson.mamba.plugins.plugin_utils import report as text

PLAN: dict[str, Any] = {
    "schema": 1,
    "outcomes": ["causal_conv1d", "mamba_ssm"],
    "problems": [],
    "work": [
        {
            "outcome": "causal_conv1d",
            "what": "build 1.6.0",
            "reason": "no wheel in the wheelhouse",
            "minutes": 12.4,
            "disk_mb": 900,
        },
        {"outcome": "mamba_ssm", "what": "", "reason": "2.2.3 found, 2.2.4 wanted", "minutes": 0.5, "disk_mb": 60},
    ],
}
IDLE = {"schema": 1, "outcomes": [], "problems": [], "work": []}


def component(name: str, status: str, **more: Any) -> dict[str, Any]:
    return {"component": name, "status": status, "device": "cpu", "dtypes": [], "seconds": 0.0, "message": "", **more}


def verification(overall: str = "passed", **more: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": fleet_report.REPORT_KIND,
        "overall": overall,
        "device": "cpu",
        "kernels": "cpu",
        "seed": 7,
        "versions": {"torch": "2.13.0+cpu", "mamba_ssm": "2.2.4"},
        "components": [
            component("import_mamba_ssm", "passed", seconds=3.21),
            component(
                "mamba_module",
                "passed",
                dtypes=["float32", "bfloat16"],
                shapes_in=[67, 32],
                shapes_out=[67, 32],
                max_error=0.00244140625,
                tolerance=0.05197,
                seconds=0.6,
                kernels="cpu",
            ),
            component("mamba2_module", "not run", message="Triton kernels need a GPU"),
            component("torchvision_nms", "not run", message="not wanted"),
            component("selective_state_update", "not run", message="Triton kernels need a GPU"),
        ],
        **more,
    }


def test_plan_table_is_compact_and_complete() -> None:
    lines = text.plan_table({"orin1": PLAN, "orin2": IDLE, "orin3": IDLE})
    assert lines == [
        "PLAN",
        "  host   outcome        min  MB   reason",
        "  orin1  causal_conv1d  12   900  build 1.6.0: no wheel in the wheelhouse",
        "         mamba_ssm      0.5  60   2.2.3 found, 2.2.4 wanted",
        "         together       13   960",
        "  no work: orin2, orin3",
    ]


def job(component: str = "mamba_ssm", hosts: Sequence[str] = ("orin1",), **more: Any) -> dict[str, Any]:
    versions = {"mamba_ssm": "2.2.4", "causal_conv1d": "1.6.0"}
    return {
        "component": component,
        "version": versions[component],
        "minutes": 25,
        "disk_mb": 700,
        "hosts": list(hosts),
        "reasons": [],
        **more,
    }


def test_plan_names_who_builds_what_for_whom_and_where_wheels_come_from() -> None:
    choices: dict[str, Any] = {
        "orin1": {"builds": [job(hosts=["orin1", "orin2"])], "waits": {"mamba_ssm": "built on orin1"}},
        "orin2": {"builds": [], "waits": {"mamba_ssm": "built on orin1", "causal_conv1d": "folder /archive"}},
    }
    assert text.plan_table({"orin1": dict(PLAN, work=PLAN["work"][1:]), "orin2": PLAN}, choices) == [
        "PLAN",
        "  host   outcome        min  MB   reason",
        "  orin1  mamba_ssm      0.5  60   2.2.3 found, 2.2.4 wanted; wheel built on orin1",
        "         wheelhouse     25   700  build: mamba_ssm 2.2.4 for orin1, orin2",
        "         together       26   760",
        "  orin2  causal_conv1d  12   900  build 1.6.0: no wheel in the wheelhouse; wheel folder /archive",
        "         mamba_ssm      0.5  60   2.2.3 found, 2.2.4 wanted; wheel built on orin1",
        "         together       13   960",
    ]


def test_plan_says_why_something_is_built_anew() -> None:
    reasons = ["wheelhouse: x.whl has sha256 0, the manifest says 1", "folder /a: no wheel"]
    lines = text.plan_table({"orin1": IDLE}, {"orin1": {"builds": [job(reasons=reasons)]}})
    assert lines[-1].endswith("for orin1; wheelhouse: x.whl has sha256 0, the manifest says 1; folder /a: no wheel")


def test_plan_of_a_large_fleet_counts_the_hosts_that_wait() -> None:
    (line,) = text.plan_table({"a": IDLE}, {"a": {"builds": [job(hosts=[f"h{number}" for number in range(20)])]}})[2:]
    assert line.endswith("for h0, h1, h2 and 17 more")
    (line,) = text.plan_table({"a": IDLE}, {"a": {"builds": [job(hosts=["x", "y", "z"])]}})[2:]
    assert line.endswith("for x, y, z")


def test_plan_names_each_platform_class_as_the_wheelhouse_takes_it() -> None:
    one, other = dict(IDLE, class_id="aarch64-sm87"), dict(IDLE, class_id="aarch64-cu12.2-sm87\x1b[2J")
    plans = {**{f"a{number}": one for number in range(5)}, "b": other}
    assert text.plan_table(plans)[-2:] == [
        "  class aarch64-cu12.2-sm87: b",
        "  class aarch64-sm87: a0, a1, a2 and 2 more",
    ]


def test_plan_of_a_large_idle_fleet_stays_one_line() -> None:
    (line,) = text.plan_table({f"h{number:03}": IDLE for number in range(500)})[1:]
    assert line.endswith("h006, h007 and 492 more")


def test_plan_of_a_dedicated_builder() -> None:
    big = dict(PLAN, builder_only=True, work=PLAN["work"][:1])
    choices: dict[str, Any] = {"big": {"builds": [], "waits": {}}, "orin1": {"builds": [], "waits": {}}}
    plans = {"big": big, "orin1": IDLE}
    assert text.plan_table(plans, choices) == ["PLAN", "  no work: big, orin1"], "not needed, so it is left alone"
    choices["big"]["builds"] = [job("causal_conv1d"), job()]
    lines = text.plan_table(plans, choices)
    assert lines[2].startswith("  big   causal_conv1d") and lines[-1] == "  no work: orin1"
    assert [line.split()[0] for line in lines[3:6]] == ["wheelhouse", "wheelhouse", "together"]


def test_a_host_whose_environment_is_there_and_that_builds_is_no_idle_one() -> None:
    lines = text.plan_table({"a": dict(IDLE, outcomes=["activation"])}, {"a": {"builds": [job()]}})
    assert not any("no work" in line for line in lines) and "  a     wheelhouse  25   700" in lines[2]


def test_plan_without_choices_is_what_it_was() -> None:
    useless: list[Any] = [None, {}, {"orin1": {}}, {"another": {"builds": [job()]}}]
    for choices in useless:
        assert text.plan_table({"orin1": PLAN}, choices) == text.plan_table({"orin1": PLAN})


def test_hostile_choice_prints_no_escape() -> None:
    bad = "x\x1b[2J\n"
    choice = {"builds": [job(hosts=[bad], reasons=[bad], version=bad)], "waits": {"mamba_ssm": bad}}
    lines = text.plan_table({"orin1": PLAN}, {"orin1": choice})
    assert "\x1b" not in "".join(lines) and not any("\n" in line for line in lines)


def test_plan_with_only_an_activation_is_work() -> None:
    lines = text.plan_table({"orin1": dict(IDLE, outcomes=["activation"])})
    assert lines[-1] == "  orin1  activation  0    0   prepared earlier"


def test_plan_of_a_host_that_may_not_run_says_so() -> None:
    lines = text.plan_table({"orin1": dict(IDLE, problems=[{"found": "x"}])})
    assert "  orin1: 1 problem(s) found; see the task's message" in lines


def test_verification_table_as_the_guide_has_it() -> None:
    dash = text.UNICODE.not_run
    assert text.verification_table("orin1", verification(), text.UNICODE) == [
        "orin1 · PASSED · device cpu · cpu kernels, no GPU was tested",
        "  torch 2.13.0+cpu, mamba_ssm 2.2.4, seed 7",
        "     component               status   dtype      shapes               error / allowed    time   kernels",
        "  ✓  import_mamba_ssm        passed                                                      3.2 s",
        "  ✓  mamba_module            passed   fp32 bf16  (67, 32) → (67, 32)  2.4e-03 / 5.2e-02  0.6 s  cpu kernels",
        f"  {dash}  mamba2_module           not run                                                     0.0 s",
        f"  {dash}  torchvision_nms         not run                                                     0.0 s",
        f"  {dash}  selective_state_update  not run                                                     0.0 s",
        "  not run: mamba2_module, selective_state_update: Triton kernels need a GPU",
        "  not run: torchvision_nms: not wanted",
    ]


def test_failures_come_before_what_was_not_run() -> None:
    report = verification("failed")
    report["components"].append(component("device", "failed", message="no GPU"))
    lines = text.verification_table("orin1", report, text.ASCII)
    assert lines[0].startswith("orin1 | FAILED")
    assert lines.index("  failed: device: no GPU") < lines.index("  not run: torchvision_nms: not wanted")
    assert "".join(lines).isascii()


def test_marks_fit_the_terminal() -> None:
    assert text.marks_for("utf-8") is text.UNICODE
    assert text.marks_for("ISO-8859-1") is text.ASCII
    assert text.marks_for(None) is text.ASCII
    assert text.marks_for("no-such-encoding") is text.ASCII


@pytest.mark.parametrize(
    "hostile",
    [
        "a\x1b[31mb\x1b[0m",
        "a\x1b]0;title\x07b",
        "a\x9b31mb",
        "a\x1bPq\x1b\\b",
        "a\x08\x00b",
        "a\u202eb",
        "a\u200bb",
    ],
)
def test_device_text_cannot_steer_the_terminal(hostile: str) -> None:
    assert text.clean(hostile) == "ab"


def test_lines_of_a_message_become_one() -> None:
    assert text.clean("one\r\n two\ttwo") == "one two two"


def test_hostile_report_prints_no_escape() -> None:
    report = verification()
    report["versions"] = {"torch": "\x1b[2J1"}
    report["components"][0].update(component="x\x1b[1m", message="\x1b]8;;y\x07", dtypes=["\x1b[3mz"], status="failed")
    assert "\x1b" not in "".join(text.verification_table("h\x1b[0m", report, text.UNICODE))


@pytest.mark.parametrize(
    ("outcome", "state", "words"),
    [
        (text.Outcome(verification()), "passed", "2 passed, 3 not run; cpu kernels"),
        (text.Outcome(verification("failed"), failed_at="Prove"), "failed", "2 passed"),
        (text.Outcome(verification("busy")), "busy", ""),
        (text.Outcome(verification("nonsense")), "incomplete", ""),
        (text.Outcome(), "not verified", "no verification was run"),
        (text.Outcome(check_mode=True), "not verified", "check mode runs no tests"),
        (text.Outcome(builder=True), "builder", "builds for other hosts, is not tested"),
        (text.Outcome(builder=True, check_mode=True), "builder", "is not tested"),
        (text.Outcome(builder=True, failed_at="Build"), "not verified", "failed before verification"),
        (text.Outcome(failed_at="Build"), "not verified", "failed before verification at task 'Build'"),
        (text.Outcome(unreachable_at="Survey"), "not verified", "could not be reached at task 'Survey'"),
        (text.Outcome(verification(), failed_at="Switch", failed_after=True), "failed", "this failed: Switch"),
        (text.Outcome(verification(components=[])), "incomplete", "no component"),
        (text.Outcome(verification(components=[component("device", "passed")])), "incomplete", "1 passed"),
    ],
)
def test_state_of_a_host(outcome: text.Outcome, state: str, words: str) -> None:
    found, sentence = text.host_state(outcome)
    assert found == state and words in sentence


def test_fleet_summary_lists_every_host_and_counts() -> None:
    outcomes = {"orin1": text.Outcome(verification()), "orin2": text.Outcome(unreachable_at="Survey")}
    assert text.fleet_summary(outcomes, text.ASCII) == [
        "FLEET",
        "  +  orin1  passed        2 passed, 3 not run; cpu kernels",
        "  X  orin2  not verified  could not be reached at task 'Survey'",
        "  2 host(s): 1 passed, 1 not verified",
    ]


def test_wrapped_values_become_plain() -> None:
    class Tagged(str):
        pass

    found = text.plain({Tagged("a"): (Tagged("b"), True, 1, None, 0.5)})
    assert found == {"a": ["b", True, 1, None, 0.5]}
    assert type(next(iter(found))) is str and type(found["a"][0]) is str


# --- the callback ------------------------------------------------------------------------------------------------


class OldResult:
    """A task result as ansible-core before 2.19 has it."""

    def __init__(self, host: str, task: str, result: dict[str, Any]) -> None:
        self._host = SimpleNamespace(get_name=lambda: host)
        self._task = SimpleNamespace(get_name=lambda: task)
        self._result = result


class NewResult:
    """The same since 2.19: properties, and the old names warn."""

    def __init__(self, host: str, task: str, result: dict[str, Any]) -> None:
        self._parts = (SimpleNamespace(get_name=lambda: host), SimpleNamespace(get_name=lambda: task), result)

    host = property(lambda self: self._parts[0])
    task = property(lambda self: self._parts[1])
    result = property(lambda self: self._parts[2])

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} is deprecated")


class Stats:
    def __init__(self, hosts: list[str], failures: Sequence[str] = (), dark: Sequence[str] = ()) -> None:
        self.processed = dict.fromkeys(hosts, 1)
        self.failures = dict.fromkeys(failures, 1)
        self.dark = dict.fromkeys(dark, 1)


class Said:
    def __init__(self) -> None:
        self.shown: list[str] = []
        self.warnings: list[str] = []

    def display(self, message: str) -> None:
        self.shown += message.split("\n")

    def warning(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def callback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fleet_report.CallbackModule:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JETSON_MAMBA_REPORTS", raising=False)
    monkeypatch.setattr(context, "CLIARGS", {"check": False})
    made = fleet_report.CallbackModule()
    made._display = Said()
    return made


def shown(callback: fleet_report.CallbackModule) -> str:
    assert callback._display.warnings == []
    return "\n".join(callback._display.shown)


@pytest.mark.parametrize("kind", [OldResult, NewResult])
def test_plan_is_printed_once_when_the_next_task_starts(callback: fleet_report.CallbackModule, kind: Any) -> None:
    callback.v2_runner_on_ok(kind("b", "Plan", {"jetson_mamba_plan": PLAN, "purpose": "provision"}))
    callback.v2_runner_on_ok(kind("a", "Plan", {"jetson_mamba_plan": IDLE}))
    assert shown(callback) == ""
    callback.v2_playbook_on_task_start(None)
    callback.v2_playbook_on_task_start(None)
    assert shown(callback).count("PLAN") == 1
    assert "no work: a" in shown(callback) and "b     causal_conv1d" in shown(callback)


def chosen(kind: Any, host: str, hosts: Any, action: str = fleet_report.BUILDERS) -> Any:
    """Return the result of the task that chooses builders."""
    made = kind(host, "Choose", {"hosts": hosts})
    task = SimpleNamespace(get_name=lambda: "Choose", action=action)
    if kind is OldResult:
        made._task = task
    else:
        made._parts = (made._parts[0], task, made._parts[2])
    return made


def task(action: str) -> Any:
    return SimpleNamespace(action=action, get_name=lambda: action)


@pytest.mark.parametrize("kind", [OldResult, NewResult])
def test_plan_waits_for_the_choice_of_builders(callback: fleet_report.CallbackModule, kind: Any) -> None:
    callback.v2_runner_on_ok(kind("a", "Plan", {"jetson_mamba_plan": PLAN}))
    for action in ("set_fact", "include_role", "include_tasks"):
        callback.v2_playbook_on_task_start(task(f"ansible.builtin.{action}"))
    callback.v2_playbook_on_task_start(task(fleet_report.BUILDERS))
    assert shown(callback) == ""
    callback.v2_runner_on_ok(chosen(kind, "a", {"a": {"builds": [job()], "waits": {"mamba_ssm": "built on a"}}}))
    callback.v2_playbook_on_task_start(task("ansible.builtin.fail"))
    assert shown(callback) == ""
    callback.v2_playbook_on_play_start(None)
    callback.v2_playbook_on_task_start(task("ansible.builtin.apt"))
    assert shown(callback).count("PLAN") == 1
    assert "build: mamba_ssm 2.2.4 for orin1" in shown(callback) and "wheel built on a" in shown(callback)


def test_plan_is_printed_before_the_first_work_where_no_play_ends(callback: fleet_report.CallbackModule) -> None:
    callback.v2_runner_on_ok(NewResult("a", "Plan", {"jetson_mamba_plan": PLAN}))
    callback.v2_playbook_on_task_start(task("ansible.builtin.set_fact"))
    assert shown(callback) == ""
    callback.v2_playbook_on_task_start(task("jetson.mamba.fetch_artefacts"))
    assert shown(callback).count("PLAN") == 1


def test_plan_is_printed_where_the_choice_fails_for_all(callback: fleet_report.CallbackModule) -> None:
    callback.v2_runner_on_ok(NewResult("a", "Plan", {"jetson_mamba_plan": PLAN}))
    callback.v2_playbook_on_task_start(task(fleet_report.BUILDERS))
    callback.v2_runner_on_failed(chosen(NewResult, "a", None))
    callback.v2_playbook_on_stats(Stats(["a"], failures=["a"]))
    assert shown(callback).count("PLAN") == 1 and "failed before verification at task 'Choose'" in shown(callback)


def test_hosts_in_another_tasks_result_choose_nobody(callback: fleet_report.CallbackModule) -> None:
    callback.v2_runner_on_ok(NewResult("a", "Plan", {"jetson_mamba_plan": PLAN}))
    callback.v2_runner_on_ok(chosen(NewResult, "a", {"a": {"builds": [job()]}}, "ansible.builtin.debug"))
    callback.v2_playbook_on_play_start(None)
    assert "build: mamba_ssm" not in shown(callback)


def test_plan_of_a_run_that_only_verifies_is_not_printed(callback: fleet_report.CallbackModule) -> None:
    callback.v2_runner_on_ok(NewResult("a", "Plan", {"jetson_mamba_plan": PLAN, "purpose": "verify"}))
    callback.v2_playbook_on_task_start(None)
    assert shown(callback) == ""


def test_a_run_of_something_else_says_and_writes_nothing(callback: fleet_report.CallbackModule, tmp_path: Path) -> None:
    callback.v2_runner_on_ok(NewResult("a", "Ping", {"ping": "pong", "report": {"kind": "another"}}))
    callback.v2_runner_on_failed(NewResult("a", "Fail", {"msg": "no"}))
    callback.v2_playbook_on_stats(Stats(["a", "b"], failures=["a"]))
    assert shown(callback) == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [OldResult, NewResult])
def test_whole_fleet_at_the_end(callback: fleet_report.CallbackModule, kind: Any, tmp_path: Path) -> None:
    callback.v2_runner_on_unreachable(kind("lost", "Survey", {"unreachable": True}))
    callback.v2_runner_on_failed(kind("broken", "Build", {"msg": "no memory"}))
    callback.v2_runner_on_ok(kind("good", "Prove", {"report": verification()}))
    callback.v2_runner_on_failed(kind("bad", "Prove", {"msg": "x", "report": verification("failed")}))
    callback.v2_runner_on_ok(kind("late", "Prove", {"report": verification()}))
    callback.v2_runner_on_failed(kind("late", "Switch", {"msg": "disk full"}))
    hosts = ["good", "bad", "broken", "late", "localhost", "idle"]
    callback.v2_playbook_on_stats(Stats(hosts, failures=["bad", "broken", "late"], dark=["lost"]))
    (folder,) = (tmp_path / "reports").iterdir()
    fleet = json.loads((folder / "fleet.json").read_text())["hosts"]
    assert {name: data["state"] for name, data in fleet.items()} == {
        "bad": "failed",
        "broken": "not verified",
        "good": "passed",
        "idle": "not verified",
        "late": "failed",
        "lost": "not verified",
    }
    assert "failed before verification at task 'Build'" in shown(callback)
    assert "after verification this failed: Switch" in shown(callback)
    assert f"reports: reports/{folder.name}" in shown(callback)


@pytest.mark.parametrize("kind", [OldResult, NewResult])
def test_the_task_that_makes_a_failed_verification_fail_is_not_blamed(
    callback: fleet_report.CallbackModule, kind: Any, tmp_path: Path
) -> None:
    failed = verification("failed")
    failed["components"].append(component("device", "failed", message="no GPU"))
    callback.v2_runner_on_ok(kind("bad", "Prove the kernels", {"report": failed}))
    callback.v2_runner_on_failed(kind("bad", "Require that no component failed", {"msg": "x"}))
    callback.v2_playbook_on_stats(Stats(["bad"], failures=["bad"]))
    assert "bad  failed  2 passed, 1 failed, 3 not run; cpu kernels\n" in shown(callback)
    (folder,) = (tmp_path / "reports").iterdir()
    fleet = json.loads((folder / "fleet.json").read_text())["hosts"]
    assert fleet["bad"]["state"] == "failed" and "after verification" not in fleet["bad"]["summary"]


def test_rescued_failure_is_none(callback: fleet_report.CallbackModule) -> None:
    callback.v2_runner_on_failed(NewResult("a", "Try", {"msg": "x"}))
    callback.v2_runner_on_ok(NewResult("a", "Prove", {"report": verification()}))
    callback.v2_playbook_on_stats(Stats(["a"]))
    assert "a  passed" in shown(callback)


def test_ignored_failure_is_none(callback: fleet_report.CallbackModule) -> None:
    callback.v2_runner_on_ok(NewResult("a", "Prove", {"report": verification()}))
    callback.v2_runner_on_failed(NewResult("a", "Try", {"msg": "x"}), ignore_errors=True)
    callback.v2_playbook_on_stats(Stats(["a"]))
    assert "a  passed" in shown(callback)


def test_check_mode_writes_no_file_and_passes_nothing(
    callback: fleet_report.CallbackModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "CLIARGS", {"check": True})
    callback.v2_runner_on_ok(NewResult("a", "Plan", {"jetson_mamba_plan": PLAN}))
    callback.v2_playbook_on_stats(Stats(["a"]))
    assert "not verified  check mode runs no tests" in shown(callback) and list(tmp_path.iterdir()) == []


def test_other_folder_by_environment(
    callback: fleet_report.CallbackModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JETSON_MAMBA_REPORTS", str(tmp_path / "elsewhere"))
    for _ in range(2):
        callback.v2_runner_on_ok(NewResult("a", "Prove", {"report": verification()}))
        callback.v2_playbook_on_stats(Stats(["a"]))
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2


def test_an_error_of_ours_is_said_and_does_not_end_the_run(
    callback: fleet_report.CallbackModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JETSON_MAMBA_REPORTS", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    callback.v2_runner_on_ok(NewResult("a", "Prove", {"report": verification()}))
    callback.v2_playbook_on_stats(Stats(["a"]))
    assert any("a  passed" in line for line in callback._display.shown)
    assert len(callback._display.warnings) == 1 and "fleet report: " in callback._display.warnings[0]


def test_rescued_failure_does_not_explain_why_nothing_was_verified(callback: fleet_report.CallbackModule) -> None:
    callback.v2_runner_on_ok(NewResult("a", "Plan", {"jetson_mamba_plan": IDLE}))
    callback.v2_runner_on_failed(NewResult("a", "Try", {"msg": "x"}))
    callback.v2_playbook_on_stats(Stats(["a"]))
    assert "a  not verified  no verification was run" in shown(callback)


