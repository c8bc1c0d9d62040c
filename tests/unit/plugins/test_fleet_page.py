"""The page of a run as text: nothing of a device's can run in it, nothing is loaded, colours can be told apart."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from ansible_collections.jetson.mamba.plugins.plugin_utils import fleet_data, fleet_page, report

from tests.unit.plugins import fleet_kit
from tests.unit.plugins.test_fleet_data import HOSTILE, hostile_run

VOID = {"meta", "input", "br", "hr", "img", "link", "wbr"}


class Reader(HTMLParser):
    """Reads a page: its elements with attributes, its text, ids and links; notes what is not well nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.raw: dict[str, str] = {}
        self.faults: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.text += " "
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.raw[self.open[-1]] = self.raw.get(self.open[-1], "") + data
        else:
            self.text += data

    def values(self, name: str) -> list[str]:
        return [value for _tag, attributes in self.elements if (value := attributes.get(name))]


@pytest.fixture(scope="module")
def whole() -> str:
    return fleet_kit.page(fleet_kit.every_kind())


def words(text: str) -> str:
    return " ".join(text.split())


# --- safe ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [fleet_kit.every_kind(), hostile_run()], ids=["every kind", "hostile"])
def test_the_page_is_well_formed_and_holds_our_script_alone(run: fleet_data.Run) -> None:
    found = Reader(fleet_kit.page(run))
    assert found.faults == [] and found.open == []
    names = [tag for tag, _attributes in found.elements]
    assert names.count("script") == names.count("style") == 1
    assert not {"img", "iframe", "link", "object", "embed", "base", "svg"} & set(names)
    assert not [key for _tag, attributes in found.elements for key in attributes if key.startswith("on")]
    assert not found.values("style"), "the policy would refuse them"
    assert found.raw["script"] == (fleet_page.ASSETS / fleet_page.SCRIPT).read_text(encoding="utf-8")


def test_what_a_device_says_is_text() -> None:
    text = fleet_kit.page(hostile_run())
    found = Reader(text)
    assert found.text.count("</script><script>alert(1)</script>") > 10
    assert not set(text) & {"\x00", "\x1b", "\u202e"}
    assert HOSTILE not in text


def test_the_policy_allows_our_style_and_script_and_nothing_else(whole: str) -> None:
    found = Reader(whole)
    (policy,) = [a["content"] for _tag, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(found.raw[kind].encode("utf-8")).digest()).decode("ascii")
        assert f"{kind}-src 'sha256-{digest}'" in str(policy)
    assert str(policy).startswith("default-src 'none';") and "unsafe" not in str(policy)


def test_the_page_names_no_address(whole: str) -> None:
    assert not re.findall(r"https?://|url\(|@import|fetch\(|XMLHttpRequest|WebSocket", whole)
    assert {value[0] for value in Reader(whole).values("href")} == {"#"} and not Reader(whole).values("src")


# --- whole ---------------------------------------------------------------------------------------------------------


def test_ids_are_unique_and_every_link_leads_somewhere() -> None:
    for run in (fleet_kit.every_kind(), hostile_run(), fleet_kit.large(60)):
        found = Reader(fleet_kit.page(run))
        ids = found.values("id")
        assert len(ids) == len(set(ids))
        named = {value[1:] for value in found.values("href")} | set(found.values("aria-labelledby"))
        assert named <= set(ids)
        assert sum(value == "device" for value in found.values("class")) == len(run.hosts)


def test_failures_come_first_with_message_and_what_to_do(whole: str) -> None:
    text = words(Reader(whole).text)
    places = [text.index(part) for part in ("10 hosts: 3 failed", "Failures", "Not proven", "Hosts and components")]
    assert places == sorted(places)
    head = text[places[1] : places[2]]
    assert "No route to host" in head and "No space left on device" in head
    for part in fleet_kit.PROBLEM.values():
        assert part in head
    assert head.index("could not be reached") < head.index("task failed") < head.index("component failed")
    assert "selective_scan_fn 2 hosts" in head and "This is what orin-1 says; the numbers differ" in head
    assert "orin-0" not in head


def test_a_page_without_failures_has_no_list_of_them() -> None:
    found = Reader(fleet_kit.page(fleet_data.Run(fleet_kit.MADE_AT, hosts={"a": fleet_kit.passed()})))
    assert "failures" not in found.values("id") and "open" not in found.values("id")
    assert "1 host: 1 passed" in words(found.text)


def test_nothing_is_claimed_that_was_not_found_out(whole: str) -> None:
    text = words(Reader(whole).text)
    assert "On 1 of 10 hosts: kernels verified, projects not tested." in text
    assert "On 1 of 10 hosts: cpu kernels verified, projects not tested." in text
    assert "1 host ran on cpu kernels: no GPU was tested there." in text
    planned = fleet_kit.page(fleet_data.Run(fleet_kit.MADE_AT, hosts={"a": fleet_data.HostRun(plan=fleet_kit.plan())}))
    bare = words(Reader(planned).text)
    assert "No verification was run on any host." in bare and "Nothing was changed on any host." in bare
    assert "kernels not verified, projects not tested" in bare


def cells(text: str, host: str) -> list[str]:
    """Return the words of a host's cells in the matrix."""
    (row,) = [part for part in text.split("<tr data-state")[1:] if f">{host}</a></th>" in part]
    return re.findall(r'<td class="c[^>]*>(.*?)</td>', row.partition("</tr>")[0])


def test_the_matrix_has_each_status_of_each_host(whole: str) -> None:
    number = len(fleet_kit.COMPONENTS)
    assert cells(whole, "orin-0") == ["passed"] * number
    assert cells(whole, "orin-gone") == ["no result"] * number
    scan = fleet_kit.COMPONENTS.index("selective_scan_fn")
    assert cells(whole, "orin-1")[scan] == "failed" and cells(whole, "orin-1").count("not run") == 1
    assert cells(whole, "orin-busy").count("not tested: busy") == len(fleet_kit.KERNELS) + 1


def test_the_worst_hosts_come_first_and_numbers_count() -> None:
    hosts = {f"orin-{index}": fleet_kit.passed() for index in (10, 9, 1)}
    text = fleet_kit.page(fleet_data.Run(fleet_kit.MADE_AT, hosts={**hosts, "z": fleet_kit.failed()}))
    assert re.findall(r'<th scope="row"><a href="#host-([^"]+)', text) == ["z", "orin-1", "orin-9", "orin-10"]


def test_a_device_page_has_its_numerics_and_reasons(whole: str) -> None:
    page = whole[whole.index('id="host-orin-1"') :]
    text = words(Reader(page[: page.index("</section>")]).text)
    for part in ("4.1e-02", "5.0e-03", "826 %", "(2, 64, 67) → (2, 64, 67)", "fp32 fp16 bf16", "20260201", "36.4.7"):
        assert part in text
    assert f"not run mamba2_module: {fleet_kit.TRITON}" in text and "All 2 failures of selective_scan_fn" in text
    assert "mamba_ssm: 2.2.4: 2.2.3 found, 2.2.4 wanted; wheel built on orin-0" in text
    busy = whole[whole.index('id="host-orin-busy"') :]
    assert "pid 812: python3 /srv/camera.py, 5120 MB" in busy[: busy.index("</section>")]


def test_classes_builds_and_times_are_shown(whole: str) -> None:
    text = words(Reader(whole[whole.index('id="classes"') : whole.index('class="device"')]).text)
    for name in fleet_kit.CLASSES:
        assert name in text
    assert "mamba_ssm 2.2.4 B builder-1 built 25 min 12 s 41.2 MB" in text
    assert "mamba_ssm 4 12 s 12 s 12 s" in text


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0.0 s"), (9.96, "10 s"), (59.4, "59 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (None, ""), ("x", "")],
)
def test_durations(seconds: Any, said: str) -> None:
    assert fleet_page.duration(seconds) == said


def test_one_trouble_of_many_hosts_is_told_once() -> None:
    hosts = {f"h{index}": fleet_kit.failed(0.01 + index / 1000) for index in range(30)}
    text = fleet_kit.page(fleet_data.Run(fleet_kit.MADE_AT, hosts=hosts))
    section = text[text.index('id="failures"') : text.index('id="matrix"')]
    assert section.count("<article") == 1 and "and 18 more" in section and section.count('href="#host-h') == 30


def test_a_status_from_a_later_version_is_shown_as_it_is() -> None:
    found = fleet_kit.verification("incomplete", {"device": {"status": "flaky", "message": "twice"}})
    run = fleet_data.Run(fleet_kit.MADE_AT, hosts={"a": fleet_data.HostRun(outcome=report.Outcome(found))})
    text = fleet_kit.page(run)
    assert "flaky" in cells(text, "a") and "device: twice" in words(Reader(text).text)


# --- colours -------------------------------------------------------------------------------------------------------

CSS = (fleet_page.ASSETS / fleet_page.STYLE).read_text(encoding="utf-8")
# (in front, behind, least ratio): text needs 4.5, borders of controls 3 (WCAG 2.1 AA)
PAIRS = [
    *((front, behind, 4.5) for front in ("text", "muted", "link") for behind in ("page", "panel")),
    *((look, f"{look}-on", 4.5) for look in "pfbnv"),
    *((look, "panel", 3.0) for look in "fbnv"),
    ("page", "text", 4.5),
    ("line", "page", 3.0),
]


def palettes() -> dict[str, dict[str, str]]:
    found = {}
    for name, block in zip(("light", "dark"), re.findall(r":root \{(.*?)\}", CSS, re.DOTALL), strict=True):
        found[name] = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    return found


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_computed_rightly() -> None:
    assert round(contrast("#000000", "#ffffff"), 2) == 21 and round(contrast("#777777", "#ffffff"), 2) == 4.48


@pytest.mark.parametrize("name", ["light", "dark"])
def test_every_pair_of_colours_can_be_told_apart(name: str) -> None:
    colours = palettes()[name]
    weak = {
        (front, behind): round(contrast(colours[front], colours[behind]), 2)
        for front, behind, least in PAIRS
        if contrast(colours[front], colours[behind]) < least
    }
    assert not weak


def test_light_and_dark_define_the_same_and_nothing_else_is_a_colour() -> None:
    light, dark = palettes()["light"], palettes()["dark"]
    assert set(light) == set(dark)
    outside = re.sub(r":root \{.*?\}", "", CSS, flags=re.DOTALL)
    assert not re.findall(r"#[0-9a-fA-F]{3,8}\b(?=[;\s])|rgba?\(|hsla?\(", outside)
    assert set(re.findall(r"var\(--([\w-]+)\)", CSS)) == set(light)


def test_meaning_is_never_in_colour_alone() -> None:
    signs = {look: {sign for letter, sign in fleet_page.LOOKS.values() if letter == look} for look in "pfbv"}
    assert all(len(found) == 1 for found in signs.values())
    assert len({sign for found in signs.values() for sign in found}) == 4
    for look, (sign,) in signs.items():  # the matrix draws the same
        code = sign if sign == "?" else f"\\{ord(sign):04x}"
        assert f'td.{look}::before {{ content: "{code}"; content: "{code}" / ""; }}' in CSS
