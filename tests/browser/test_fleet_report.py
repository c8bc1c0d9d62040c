"""The fleet report as people meet it, in a real headless Chromium; screenshots go to reports/browser/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.browser.chromium import Browser
from tests.browser.conftest import Write
from tests.unit.plugins import fleet_kit
from tests.unit.plugins.test_fleet_data import hostile_run

DESKTOP, PHONE = (1280, 900), (390, 844)
# each visible text with its colour and the nearest opaque colour behind it
CONTRASTS = r"""
(() => {
  const parse = (text) => (text.match(/[\d.]+/g) || []).map(Number);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((part) => part / 255)
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.getClientRects().length || element.closest("script, style")) continue;
    const style = getComputedStyle(element);
    const [one, other] = [luminance(parse(style.color)), luminance(behind(element))].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (other + 0.05);
    const size = parseFloat(style.fontSize);
    const least = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
    if (ratio < least) found[node.data.trim().slice(0, 40)] = [element.tagName, element.className, ratio.toFixed(2)];
  }
  return found;
})()
"""
SHOWN = """Array.from(document.querySelectorAll('#hosts tbody tr')).filter(row => !row.hidden)
    .map(row => row.cells[0].textContent.trim())"""
OPEN = """Array.from(document.querySelectorAll('.device')).filter(page => page.getClientRects().length)
    .map(page => page.id)"""
FOCUS = "document.activeElement.textContent.trim()"
SETTLE = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def opened(browser: Browser, address: str, size: tuple[int, int] = DESKTOP, **how: Any) -> None:
    browser.view(*size, **how)
    browser.open(address)


def complaints(browser: Browser) -> list[str]:
    """Return what the browser logged: refused scripts, errors."""
    kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    return [json.dumps(event["params"])[:300] for event in browser.events if event.get("method") in kinds]


def requests(browser: Browser) -> list[str]:
    return [
        event["params"]["request"]["url"]
        for event in browser.events
        if event.get("method") == "Network.requestWillBeSent"
    ]


# --- looks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize(
    "part", ["", "#matrix", "#host-orin-1", "#host-orin-busy"], ids=["top", "matrix", "failed", "busy"]
)
def test_text_has_contrast_and_fits_the_window(
    browser: Browser, small: str, pictures: Path, dark: bool, size: tuple[int, int], part: str
) -> None:
    opened(browser, small + part, size, dark=dark)
    kind = f"{'dark' if dark else 'light'}-{'phone' if size == PHONE else 'desktop'}-{part.strip('#') or 'top'}"
    browser.screenshot(pictures / f"{kind}.png")
    assert browser.ask(CONTRASTS) == {}
    assert browser.ask("document.documentElement.scrollWidth") <= size[0], "only tables may be scrolled sideways"
    assert complaints(browser) == []


def test_the_scheme_is_followed(browser: Browser, small: str) -> None:
    colours = []
    for dark in (False, True):
        opened(browser, small, dark=dark)
        colours.append(browser.ask("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 23, 26)"]


def test_what_is_pressed_is_large_enough_for_a_thumb(browser: Browser, small: str) -> None:
    opened(browser, small, PHONE)
    low = browser.ask(
        "Array.from(document.querySelectorAll('button, input, select, summary, #hosts a, .hosts a'))"
        ".filter(e => e.getClientRects().length && Math.min(e.offsetHeight, e.offsetWidth) < 24)"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert low == []


# --- safe ----------------------------------------------------------------------------------------------------------


def test_nothing_of_a_device_runs_and_nothing_is_loaded(browser: Browser, write: Write) -> None:
    address = write(hostile_run())
    opened(browser, address)
    assert browser.ask("document.scripts.length") == 1
    assert browser.ask(f"({SHOWN}).some(name => name.includes('<script>alert(1)</script>'))") is True
    browser.ask("location.hash = document.querySelector('#hosts a').hash")
    browser.ask(SETTLE)
    assert requests(browser) == [address]
    assert complaints(browser) == []
    assert not [event for event in browser.events if event.get("method") == "Page.javascriptDialogOpening"]


def test_the_policy_refuses_any_other_script(browser: Browser, small: str) -> None:
    opened(browser, small)
    browser.ask(
        "{const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)}"
    )
    assert browser.ask("window.ran === undefined") is True
    assert browser.ask("fetch('https://example.org/').then(() => 'loaded', () => 'refused')") == "refused"


# --- use -----------------------------------------------------------------------------------------------------------


def test_without_script_everything_can_be_read(browser: Browser, small: str, pictures: Path) -> None:
    opened(browser, small, script=False)
    browser.screenshot(pictures / "no-script.png")
    assert len(browser.ask(OPEN)) == 10 and browser.ask("document.getElementById('tools').getClientRects().length") == 0
    opened(browser, small + "#host-orin-1", script=False)
    top = browser.ask("document.getElementById('host-orin-1').getBoundingClientRect().top")
    assert -5 <= top <= 900


def test_search_filters_and_counts(browser: Browser, large: str, pictures: Path) -> None:
    opened(browser, large)
    assert browser.ask("document.getElementById('shown').textContent") == "500 of 500 hosts shown"
    browser.press("/")
    browser.type("route HOST")  # in the page of the host, any case, each word
    rows = browser.ask(SHOWN)
    lost = [name for name, run in fleet_kit.large().hosts.items() if run.outcome.unreachable_at]
    assert sorted(rows) == sorted(lost)
    assert browser.ask("document.getElementById('shown').textContent") == f"{len(lost)} of 500 hosts shown"
    browser.press("Escape")
    assert len(browser.ask(SHOWN)) == 500
    browser.ask("document.querySelector('button[data-state=failed]').click()")
    browser.ask("{const c = document.getElementById('class'); c.value = 'A'; c.dispatchEvent(new Event('change'))}")
    browser.ask("document.getElementById('matrix').scrollIntoView()")
    browser.screenshot(pictures / "large-failed-of-class-A.png")
    rows = browser.ask(SHOWN)
    assert 0 < len(rows) < 13
    assert browser.ask("document.querySelector('button[data-state=failed]').getAttribute('aria-pressed')") == "true"


def test_columns_sort_both_ways_by_keyboard(browser: Browser, large: str, pictures: Path) -> None:
    opened(browser, large)
    names = browser.ask("Array.from(document.querySelectorAll('#hosts thead th')).map(head => head.textContent)")
    column = names.index("selective_scan_fn")
    browser.ask(f"document.querySelectorAll('#hosts thead th')[{column}].querySelector('button').focus()")
    browser.press("Enter")
    words = f"Array.from(document.querySelectorAll('#hosts tbody tr')).map(row => row.cells[{column}].textContent)"
    first = browser.ask(words)
    assert first[0] == "failed" and first[-1] == "passed" and len(first) == 500
    assert browser.ask(f"document.querySelectorAll('#hosts thead th')[{column}].ariaSort") == "ascending"
    browser.press("Enter")
    assert browser.ask(words)[0] == "passed" and browser.ask(words)[-1] == "failed"
    browser.ask("document.querySelector('#hosts thead th button').click()")
    assert browser.ask(SHOWN)[:3] == ["site-a-orin-0", "site-a-orin-4", "site-a-orin-8"], "numbers as numbers"
    browser.ask("document.getElementById('matrix').scrollIntoView()")
    browser.screenshot(pictures / "large-sorted.png")


def test_a_device_has_a_page_of_its_own_and_the_way_back(browser: Browser, small: str) -> None:
    opened(browser, small)
    assert browser.ask(OPEN) == []
    browser.ask("document.querySelector('#hosts a[href=\"#host-orin-2\"]').focus()")
    browser.press("Enter")
    assert browser.ask(OPEN) == ["host-orin-2"] and browser.ask(FOCUS).startswith("orin-2")
    assert browser.ask("document.getElementById('matrix').getClientRects().length") == 0
    browser.press("Escape")
    browser.ask(SETTLE)
    assert browser.ask(OPEN) == [] and browser.ask(FOCUS) == "orin-2", "the reader is back where they were"
    opened(browser, small + "#host-orin-busy")
    assert browser.ask(OPEN) == ["host-orin-busy"], "a link to a device opens it"


def test_the_keyboard_reaches_everything(browser: Browser, small: str) -> None:
    opened(browser, small)
    browser.press("Tab")
    assert browser.ask(FOCUS) == "Skip to the fleet matrix"
    browser.ask("document.querySelector('#hosts tbody a').focus()")
    order = browser.ask(SHOWN)
    browser.press("ArrowDown")
    assert browser.ask(FOCUS) == order[1]
    browser.press("ArrowUp")
    assert browser.ask(FOCUS) == order[0]
    assert browser.ask("getComputedStyle(document.activeElement).outlineStyle") == "solid", "the focus can be seen"
    hidden = browser.ask(
        "Array.from(document.querySelectorAll('.scroll')).filter(box => box.tabIndex !== 0 || !(box.ariaLabel || "
        "document.getElementById(box.getAttribute('aria-labelledby')))).length"
    )
    assert hidden == 0, "each box that scrolls can be focused and has a name"


def test_five_hundred_hosts_are_quick(browser: Browser, large: str, pictures: Path) -> None:
    """In seconds of the page's own thread, since the machine may be busy with other things."""
    browser.call("Performance.enable", timeDomain="threadTicks")
    opened(browser, large)
    browser.screenshot(pictures / "large-top.png")
    load = busy_seconds(browser)
    browser.ask(
        "for (const text of ['o', 'or', 'ori', 'orin-48']) {document.getElementById('search').value = text;"
        "document.getElementById('search').dispatchEvent(new Event('input')); document.body.offsetHeight;}"
    )
    keys = busy_seconds(browser) - load
    print(f"load {load:.2f} s, four keys {keys:.2f} s of the page's thread")
    assert browser.ask(SHOWN) == [name for name in browser.ask(SHOWN) if "orin-48" in name] != []
    assert load < 6 and keys < 2


def busy_seconds(browser: Browser) -> float:
    metrics = browser.call("Performance.getMetrics")["metrics"]
    return float({item["name"]: item["value"] for item in metrics}["TaskDuration"])
