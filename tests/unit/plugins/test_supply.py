"""Where a wheel comes from: a real wheelhouse, real small wheels, a folder of somebody's."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.module_utils.errors import Problem
from ansible_collections.jetson.mamba.plugins.plugin_utils import supply
from ansible_collections.jetson.mamba.plugins.plugin_utils.wheelhouse import Wheelhouse

from tests.unit.plugins.supply_kit import (
    CPU,
    ORIN,
    SOURCE,
    damage,
    plan_of,
    real_wheel,
    sha256,
    stock,
    stock_imported,
    wish,
)


@pytest.fixture
def house(tmp_path: Path) -> Wheelhouse:
    return Wheelhouse(tmp_path / "wheelhouse")


def find(house: Wheelhouse, *sources: Any, wanted: supply.Wish | None = None, dry: bool = False) -> Any:
    """Return (what was found, what was said)."""
    said: list[str] = []
    options = supply.complete({"path": str(house.root), "sources": list(sources), "patience_minutes": 0.01})
    cache = str(house.root.parent / "cache")
    return supply.find(house, wanted or wish(), options, cache, said.append, dry=dry), said


def locks(house: Wheelhouse) -> list[str]:
    return [path.name for path in house.root.glob("*/locks/*.json")]


# --- options and wishes ---


def test_options_are_completed_and_checked() -> None:
    assert supply.complete({"path": "/w", "build": False}) == {**supply.DEFAULTS, "path": "/w", "build": False}
    for wrong, found in (
        ({}, "names no path"),
        ({"path": ""}, "names no path"),
        ({"path": "wheels"}, "path is wheels"),
        ({"path": "/w", "sauces": []}, "sau"),
    ):
        with pytest.raises(Problem, match=found):
            supply.complete(wrong)


def test_a_wish_is_what_the_plan_says(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "house", CPU)
    plan["components"]["mamba_ssm"]["build_flags"] = ["A=1"]
    wanted = supply.Wish.of_plan(plan, "mamba_ssm")
    assert (wanted.component, wanted.project, wanted.version, wanted.sm) == ("mamba_ssm", "mamba-ssm", "2.2.4", "cpu")
    assert wanted.key == plan["components"]["mamba_ssm"]["key"] and wanted.flags == ("A=1",)


# --- at hand ---


def test_nothing_is_at_hand_in_an_empty_wheelhouse(house: Wheelhouse) -> None:
    assert supply.at_hand(house, wish()) == supply.Supply()
    assert supply.Supply().served is None
    assert not house.root.exists(), "asking makes no folder"


def test_a_build_of_the_same_inputs_is_at_hand_whole(house: Wheelhouse, tmp_path: Path) -> None:
    wheel = real_wheel(tmp_path)
    stock(house, wish(), wheel)
    found = supply.at_hand(house, wish())
    assert found.path is not None and found.path.read_bytes() == wheel.read_bytes()
    assert not found.faulty and found.reasons == ()
    assert found.served == {
        "component": "causal_conv1d",
        "version": "1.6.0",
        "filename": wheel.name,
        "sha256": sha256(wheel),
        "size": wheel.stat().st_size,
        "origin": "built on orin-z",
        "needed": [],
        "path": str(found.path),
    }
    assert json.dumps(found.served), "plain data"


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (wish(source="6" * 64), "its source changed"),
        (wish(flags=["A=1"]), "other flags (A=1 wanted, built with none)"),
        (wish(version="1.6.1"), "version 1.6.1 wanted, 1.6.0"),
        (wish("mamba_ssm"), None),
        (wish(class_id=ORIN.replace("sm87", "sm72")), None),
    ],
)
def test_another_wheel_serves_no_wish_and_the_difference_is_told(
    house: Wheelhouse, tmp_path: Path, wanted: supply.Wish, why: str | None
) -> None:
    stock(house, wish(), real_wheel(tmp_path))
    found = supply.at_hand(house, wanted)
    assert found.path is None and found.row is None and not found.faulty
    assert [why in reason for reason in found.reasons] == [True] if why else found.reasons == ()


def test_a_wheel_that_changed_is_faulty_and_its_checksums_are_told(house: Wheelhouse, tmp_path: Path) -> None:
    row = stock(house, wish(), real_wheel(tmp_path))
    path = damage(house, row)
    found = supply.at_hand(house, wish())
    assert found.path is None and found.served is None and found.faulty
    (reason,) = found.reasons
    assert reason.startswith("wheelhouse: ") and row["sha256"] in reason and sha256(path) in reason


def test_a_wheel_that_is_gone_is_faulty(house: Wheelhouse, tmp_path: Path) -> None:
    house.path_of(stock(house, wish(), real_wheel(tmp_path))).unlink()
    found = supply.at_hand(house, wish())
    assert found.path is None and found.faulty and "cannot be read" in found.reasons[0]


def test_a_row_whose_inputs_make_another_key_is_faulty(house: Wheelhouse, tmp_path: Path) -> None:
    stock(house, wish(), real_wheel(tmp_path))
    manifest = house.folder(ORIN) / "manifest.json"
    manifest.write_text(manifest.read_text().replace(SOURCE, "7" * 64))
    found = supply.at_hand(house, wish())
    assert found.path is None and found.faulty and "recorded inputs" in found.reasons[0]


def test_an_imported_wheel_serves_whatever_the_key(house: Wheelhouse, tmp_path: Path) -> None:
    row = stock_imported(house, wish(), real_wheel(tmp_path))
    for wanted in (wish(), wish(source="6" * 64)):
        assert supply.at_hand(house, wanted).path == house.path_of(row)
    assert supply.at_hand(house, wish(version="1.6.1")).path is None
    assert supply.at_hand(house, wish(class_id=ORIN.replace("2.35", "2.34"))).path is None


def test_an_own_build_is_preferred_to_an_imported_wheel(house: Wheelhouse, tmp_path: Path) -> None:
    own = stock(house, wish(), real_wheel(tmp_path, text="own"))
    imported = stock_imported(house, wish(), real_wheel(tmp_path / "theirs", text="theirs"))
    assert supply.at_hand(house, wish()).path == house.path_of(own)
    assert supply.at_hand(house, wish(source="6" * 64)).path == house.path_of(imported)
    damage(house, own)
    found = supply.at_hand(house, wish())
    assert found.path == house.path_of(imported), "a damaged build hides no wheel that can be used"
    assert found.faulty and own["sha256"] in found.reasons[0], "that it was damaged is not passed over in silence"
    assert find(house, dry=True)[0].path == found.path and house.look(ORIN, own["key"]).row == own
    found, said = find(house)
    assert found.path == house.path_of(imported) and "set aside as" in said[0]
    assert house.look(ORIN, own["key"]).row is None


def test_what_others_built_serves_nobody_who_wants_a_special_build(house: Wheelhouse, tmp_path: Path) -> None:
    stock_imported(house, wish(), real_wheel(tmp_path))
    real_wheel(tmp_path / "archive")
    special = wish(flags=["A=1"], special="causal_conv1d_build_flags is set")
    found, said = find(house, {"folder": str(tmp_path / "archive")}, wanted=special)
    assert found.path is None and not found.faulty and said == []
    assert [" is not used: causal_conv1d_build_flags is set" in reason for reason in found.reasons] == [True, False]
    assert "imported causal_conv1d-1.6.0-cp310" in found.reasons[0] and "not asked" in found.reasons[1]
    assert "take back what the reason names" in supply.nowhere(special, house, found).next_step
    row = stock(house, special, real_wheel(tmp_path / "own", text="own"))
    assert find(house, wanted=special)[0].path == house.path_of(row), "a build of the same inputs always serves"


def test_the_next_wheel_that_others_built_serves_where_the_newest_cannot(house: Wheelhouse, tmp_path: Path) -> None:
    first, second = (
        stock_imported(house, wish(), real_wheel(tmp_path / text, text=text)) for text in ("first", "second")
    )
    damage(house, first)
    assert supply.at_hand(house, wish()).path == house.path_of(second)
    damage(house, second)
    assert len(supply.at_hand(house, wish()).broken) == 2


def test_what_rotted_in_silence_is_found_before_it_is_sent(house: Wheelhouse, tmp_path: Path) -> None:
    row = stock(house, wish(), real_wheel(tmp_path))
    before = house.path_of(row).stat()
    os.utime(damage(house, row), ns=(before.st_atime_ns, before.st_mtime_ns))
    assert supply.at_hand(house, wish()).path, "a plan asks often, and trusts size and time"
    found, _said = find(house)
    assert found.path is None and found.faulty and row["sha256"] in found.reasons[0]
    assert supply.at_hand(house, wish()).faulty, "and whoever builds now does not trust them either"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"key": None}, "has no key"),
        ({"key": "f" * 64}, "says ffffffffffff"),
        ({"sha256": 5}, "wrong sha256 (5)"),
        ({"sha256": "../x"}, "wrong sha256"),
        ({"filename": ["x"]}, "wrong filename"),
        ({"filename": "../../x.whl"}, "wrong filename"),
        ({"flags": "A=B"}, "wrong flags"),
        ({"needed": [1]}, "wrong needed"),
        ({"size": "many"}, "wrong size"),
        (None, "has no component"),
    ],
)
@pytest.mark.parametrize("imported", [False, True])
def test_a_damaged_row_is_a_fault_with_words(
    house: Wheelhouse, tmp_path: Path, changes: dict[str, Any] | None, reason: str, imported: bool
) -> None:
    wheel = real_wheel(tmp_path)
    row = stock_imported(house, wish(), wheel) if imported else stock(house, wish(), wheel)
    manifest = house.folder(ORIN) / "manifest.json"
    data = json.loads(manifest.read_text())
    data["wheels"] = {row["key"]: "text" if changes is None else {**row, **changes}}
    manifest.write_text(json.dumps(data))
    for wanted in (wish(), wish(source="6" * 64), wish(version="1.6.1")):
        found = supply.at_hand(house, wanted)
        assert found.path is None
    assert reason in str(house.look(ORIN, row["key"]).fault)
    assert reason in str(house.verify()[0].fault)
    assert list(house.rows()) == [], "set aside, so that a build has its place"


def test_what_an_older_release_left_out_of_a_row_is_none(house: Wheelhouse, tmp_path: Path) -> None:
    row = stock_imported(house, wish(), real_wheel(tmp_path))
    manifest = house.folder(ORIN) / "manifest.json"
    data = json.loads(manifest.read_text())
    for name in ("needed", "size", "source_sha256", "builder"):
        del data["wheels"][row["key"]][name]
    manifest.write_text(json.dumps(data))
    found = supply.at_hand(house, wish())
    assert found.row is not None and found.row["source_sha256"] is None
    assert found.served is not None and found.served["needed"] == [] and found.served["size"] == row["size"]


SERIES = """schema: 1
package: mamba_ssm
version: "2.2.4"
patches:
  - file: 0001-x.patch
    target: csrc/x.cu
    sha256_before: "{before}"
    sha256_after: "{after}"
    applies_to: {kind}
    why: it does not compile
    upstream: none
    until: null
"""


@pytest.mark.parametrize(
    ("flags", "kind", "special"),
    [
        ([], "python", None),
        ([], None, None),
        (["A=1"], None, "mamba_ssm_build_flags is set"),
        ([], "source", "0001-x.patch is compiled in"),
    ],
)
def test_what_makes_a_build_special(
    tmp_path: Path, flags: list[str], kind: str | None, special: str | None
) -> None:
    folder = tmp_path / "mamba_ssm" / "2.2.4"
    if kind:
        folder.mkdir(parents=True)
        (folder / "series.yml").write_text(SERIES.format(before="1" * 64, after="2" * 64, kind=kind))
        (folder / "0001-x.patch").write_text("--- a/csrc/x.cu\n+++ b/csrc/x.cu\n@@ -1 +1 @@\n-a\n+b\n")
    assert supply.find_special("mamba_ssm", "2.2.4", flags, str(tmp_path), {}) == special


def test_an_imported_wheel_that_changed_is_faulty(house: Wheelhouse, tmp_path: Path) -> None:
    row = stock_imported(house, wish(), real_wheel(tmp_path))
    damage(house, row)
    found = supply.at_hand(house, wish())
    assert found.path is None and found.faulty and found.row == row and row["sha256"] in found.reasons[0]
    said: list[str] = []
    supply.discard(house, wish(), found, said.append)
    assert supply.at_hand(house, wish()) == supply.Supply(), "set aside under its own key"
    (aside,) = (house.folder(ORIN) / "aside").glob("*.whl")
    assert str(aside) in said[0]


def test_a_damaged_manifest_is_a_problem_before_anything_is_compiled(house: Wheelhouse, tmp_path: Path) -> None:
    stock(house, wish(), real_wheel(tmp_path))
    (house.folder(ORIN) / "manifest.json").write_text("{")
    with pytest.raises(Problem, match=r"manifest\.json cannot be read"):
        supply.at_hand(house, wish())


# --- other sources ---


def test_a_folder_is_asked_once_and_what_it_has_is_kept(house: Wheelhouse, tmp_path: Path) -> None:
    wheel = real_wheel(tmp_path / "archive")
    found, said = find(house, {"folder": str(tmp_path / "archive")})
    assert found.path is not None and found.path.is_relative_to(house.root) and found.promised is None
    assert found.served["origin"] == f"folder {tmp_path / 'archive'}" and found.row["source_sha256"] is None
    assert f"{wheel.name}: taken from folder {tmp_path / 'archive'}" in said
    assert locks(house) == [] and wheel.exists(), "the lock is given back, the user's file stays"
    again, said = find(house, {"folder": "/is/not/asked"})
    assert again.path == found.path and said == []


def test_the_wheelhouse_comes_before_other_sources(house: Wheelhouse, tmp_path: Path) -> None:
    stock(house, wish(), real_wheel(tmp_path, text="own"))
    real_wheel(tmp_path / "archive", text="theirs")
    found, _said = find(house, {"folder": str(tmp_path / "archive")})
    assert found.served["origin"] == "built on orin-z"


def test_sources_are_asked_in_the_users_order(house: Wheelhouse, tmp_path: Path) -> None:
    for name in ("second", "first"):
        real_wheel(tmp_path / name, text=name)
    found, _said = find(house, *({"folder": str(tmp_path / name)} for name in ("absent", "first", "second")))
    assert found.served["sha256"] == sha256(next((tmp_path / "first").iterdir()))


def test_check_mode_promises_and_keeps_nothing(house: Wheelhouse, tmp_path: Path) -> None:
    real_wheel(tmp_path / "archive")
    found, _said = find(house, {"folder": str(tmp_path / "archive")}, dry=True)
    assert found.promised == f"folder {tmp_path / 'archive'}" and found.path is None and found.served is None
    assert not house.root.exists()


def test_check_mode_sets_nothing_aside(house: Wheelhouse, tmp_path: Path) -> None:
    damage(house, stock(house, wish(), real_wheel(tmp_path)))
    before = sorted(house.root.rglob("*"))
    real_wheel(tmp_path / "archive")
    found, _said = find(house, {"folder": str(tmp_path / "archive")}, dry=True)
    assert found.promised and found.faulty and "sha256" in found.reasons[0]
    assert sorted(house.root.rglob("*")) == before


def test_a_trap_wheel_of_a_source_is_passed_over_with_its_reason(house: Wheelhouse, tmp_path: Path) -> None:
    real_wheel(tmp_path / "trap", machine="x86_64")
    found, said = find(house, {"folder": str(tmp_path / "trap")})
    assert found.path is None and not list(house.root.rglob("*.whl"))
    assert any("x86_64" in reason and "trap" in reason for reason in found.reasons)
    assert any("x86_64" in line for line in said)
    real_wheel(tmp_path / "good")
    found, _said = find(house, {"folder": str(tmp_path / "trap")}, {"folder": str(tmp_path / "good")})
    assert found.served["origin"] == f"folder {tmp_path / 'good'}"


def test_sources_that_have_nothing_say_so(house: Wheelhouse, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found, said = find(house, {"folder": str(tmp_path / "gone")}, {"folder": str(tmp_path / "empty")})
    assert found.path is None and len(found.reasons) == 2
    assert any("gone" in line and "skipped" in line for line in said)
    assert "no wheel of causal_conv1d 1.6.0" in found.reasons[1]


def test_a_faulty_wheel_is_set_aside_when_a_source_replaces_it(house: Wheelhouse, tmp_path: Path) -> None:
    row = stock(house, wish(), real_wheel(tmp_path, text="own"))
    damage(house, row)
    real_wheel(tmp_path / "archive", text="theirs")
    found, said = find(house, {"folder": str(tmp_path / "archive")})
    assert found.served["origin"].startswith("folder ")
    assert [path.name.endswith(".whl") for path in sorted((house.folder(ORIN) / "aside").iterdir())].count(True) == 1
    assert any("set aside as" in line and row["sha256"] in line for line in said)
    assert house.look(ORIN, wish().key).row is None
    assert supply.at_hand(house, wish()).path == found.path


def test_a_faulty_wheel_stays_where_no_source_replaces_it(house: Wheelhouse, tmp_path: Path) -> None:
    """The builder sets it aside; whoever may not build has it told, run by run."""
    damage(house, stock(house, wish(), real_wheel(tmp_path)))
    (tmp_path / "empty").mkdir()
    found, _said = find(house, {"folder": str(tmp_path / "empty")})
    assert found.faulty and found.path is None and len(found.reasons) == 2
    assert house.look(ORIN, wish().key).fault


def test_what_another_controller_brought_meanwhile_is_taken(
    house: Wheelhouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = real_wheel(tmp_path)
    real_wheel(tmp_path / "archive", text="theirs")

    @contextlib.contextmanager
    def locked(*_arguments: Any) -> Iterator[float]:
        stock(house, wish(), wheel, "other")
        yield 1.0

    monkeypatch.setattr(house, "locked", locked)
    found, _said = find(house, {"folder": str(tmp_path / "archive")})
    assert found.served["origin"] == "built on other"


def test_only_one_asks_the_sources_at_a_time(house: Wheelhouse, tmp_path: Path) -> None:
    real_wheel(tmp_path / "archive")
    wanted = wish()
    with house.locked(ORIN, wanted.component, wanted.key, print, 0), pytest.raises(Problem, match="is held by"):
        find(house, {"folder": str(tmp_path / "archive")})
    with house.locked(ORIN, wanted.component, wanted.key, print, 0):
        assert find(house)[0] == supply.Supply(), "nothing is written without sources, so nobody is waited for"


# --- nowhere, discarded, kept ---


def test_nowhere_names_every_reason_and_every_way_out(house: Wheelhouse) -> None:
    problem = supply.nowhere(wish(), house, supply.Supply(reasons=("wheelhouse: it is broken", "folder /x: empty")))
    text = problem.render()
    for word in ("causal_conv1d 1.6.0", ORIN, str(house.root), "it is broken", "folder /x: empty", "wheelhouse_build"):
        assert word in text
    assert "wheelhouse_action=import" in text and "wheelhouse_sources" in text


def test_discarding_moves_the_judged_wheel_and_no_other(house: Wheelhouse, tmp_path: Path) -> None:
    said: list[str] = []
    damage(house, stock(house, wish(), real_wheel(tmp_path)))
    known = supply.at_hand(house, wish())
    fresh = stock(house, wish(), real_wheel(tmp_path / "fresh", text="fresh"))
    supply.discard(house, wish(), known, said.append)
    assert supply.at_hand(house, wish()).path == house.path_of(fresh), "another controller was quicker"
    damage(house, fresh)
    supply.discard(house, wish(), supply.at_hand(house, wish()), said.append)
    assert supply.at_hand(house, wish()) == supply.Supply()
    (note,) = (house.folder(ORIN) / "aside").glob("*.json")
    assert "sha256" in json.loads(note.read_text())["reason"] and "set aside as" in said[-1]


BUILT: dict[str, Any] = {"builder": "orin-a", "l4t": "36.4.7", "seconds": 80.0, "source": "causal_conv1d-1.6.0.tar.gz"}


def test_a_built_wheel_is_kept_with_all_that_is_known_of_it(house: Wheelhouse, tmp_path: Path) -> None:
    wheel, log = real_wheel(tmp_path, needed=("libcusparseLt.so.0", "libc10.so")), tmp_path / "log"
    log.write_text("nvcc …\n")
    found = supply.keep(house, wish(), wheel, {**BUILT, "sha256": sha256(wheel)}, log)
    assert found.row is not None and found.served is not None and found.path is not None
    row = house.manifest(ORIN)[wish().key]
    assert row == found.row and found.path.read_bytes() == wheel.read_bytes()
    assert {name: row[name] for name in ("builder", "l4t", "seconds", "source", "origin", "source_sha256")} == {
        **{name: BUILT[name] for name in ("builder", "l4t", "seconds", "source")},
        "origin": "built on orin-a",
        "source_sha256": SOURCE,
    }
    assert (house.folder(ORIN) / row["log"]).read_text() == "nvcc …\n"
    assert found.served["needed"] == ["libcusparseLt.so.0"], "what the device's linker will be asked for"
    assert supply.at_hand(house, wish()).path == found.path


def test_a_wheel_is_looked_into_once(house: Wheelhouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = real_wheel(tmp_path, needed=("libcusparseLt.so.0",))
    inspected = supply.inspect(wish(), wheel)
    monkeypatch.setattr(supply, "inspect_row", None)
    found = supply.keep(house, wish(), wheel, {**BUILT, "sha256": sha256(wheel)}, None, inspected)
    assert found.served is not None and found.served["needed"] == ["libcusparseLt.so.0"]


@pytest.mark.parametrize(
    ("wheel", "found"),
    [
        ({"machine": "x86_64"}, "x86_64"),
        ({"version": "1.5.0"}, "1.5.0"),
        ({"class_id": ORIN.replace("sm87", "sm72")}, "sm_72"),
        ({"class_id": ORIN.replace("cp310", "cp312")}, "312"),
    ],
)
def test_what_is_not_what_was_to_be_built_is_not_kept(
    house: Wheelhouse, tmp_path: Path, wheel: dict[str, Any], found: str
) -> None:
    path = real_wheel(tmp_path, **wheel)
    with pytest.raises(Problem, match=found):
        supply.keep(house, wish(), path, {**BUILT, "sha256": sha256(path)}, None)
    assert house.manifest(ORIN) == {} and not list(house.root.rglob("*.whl"))
