"""A headless Chromium for the tests, and pages of made-up runs for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ansible_collections.jetson.mamba.plugins.plugin_utils import fleet_data

from tests.browser import chromium
from tests.unit.plugins import fleet_kit

ROOT = Path(__file__).resolve().parents[2]
Write = Callable[[fleet_data.Run], str]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    program = chromium.find()
    if program is None:
        pytest.fail(
            f"found:    no Chromium on PATH ({', '.join(chromium.NAMES)})\n"
            "expected: one, to look at the fleet report with\n"
            "next:     make test-browser, which as root installs it on Debian; else install one, or name it: "
            f"{chromium.VARIABLE}=…",
            pytrace=False,
        )
    made = chromium.Browser(program, tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Return a function that writes the page of a run and returns its address."""
    folder = tmp_path_factory.mktemp("pages")

    def to_file(run: fleet_data.Run) -> str:
        path = folder / f"{len(list(folder.iterdir()))}.html"
        path.write_text(fleet_kit.page(run), encoding="utf-8")
        return path.as_uri()

    return to_file


@pytest.fixture(scope="session")
def small(write: Write) -> str:
    return write(fleet_kit.every_kind())


@pytest.fixture(scope="session")
def large(write: Write) -> str:
    return write(fleet_kit.large())


@pytest.fixture
def pictures(request: pytest.FixtureRequest) -> Path:
    """Return the folder of screenshots; they are there to be looked at."""
    return ROOT / "reports" / "browser"
