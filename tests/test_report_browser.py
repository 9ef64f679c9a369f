"""The report in a real browser: headless Chromium, as Debian packages it with its driver, led by Selenium."""

from __future__ import annotations

import base64
import json
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_models import feeds, model_with_norms

import fxp_layernorm as fxp
from fxp_layernorm.analysis import ModelAnalysis, analyze_model, formats
from fxp_layernorm.calibration import calibrate_model
from fxp_layernorm.runtime import Feeds

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,900")
#: Colours that a page may have behind its text, and what the text needs: WCAG's contrast for small text.
CONTRAST = 4.5


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    selenium = pytest.importorskip("selenium.webdriver", reason="needs the extra [test]: Selenium")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if found is None or driver is None:
        pytest.skip("no Chromium with its driver is installed: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = found
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driven = selenium.Chrome(options, selenium.ChromeService(driver))
    yield driven
    driven.quit()


@pytest.fixture(scope="module")
def analysis() -> ModelAnalysis:
    model, data = model_with_norms(3), Feeds(feeds())
    return analyze_model(model, calibrate_model(model, data, exponents=0), data)


@pytest.fixture(scope="module")
def report(analysis: ModelAnalysis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib", reason="needs the extra [report]")
    path: Path = tmp_path_factory.mktemp("report") / "r.html"
    analysis.to_html(path)
    return path


def opened(browser: Any, path: Path, **media: str) -> None:
    """Open a page, as a screen or a printer has it, in light or dark."""
    scheme = [{"name": "prefers-color-scheme", "value": media.get("scheme", "light")}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media.get("kind", "screen"), "features": scheme})
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what was said of the page before
    browser.get(path.as_uri())


def complaints(browser: Any) -> list[str]:
    """Return what the console holds, and what failed to load or was asked of a network."""
    said = [entry["message"] for entry in browser.get_log("browser")]
    for entry in browser.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        if event["method"] in ("Network.loadingFailed", "Runtime.exceptionThrown"):
            said.append(str(event))
        url = event["params"].get("request", {}).get("url", "file:")
        if not url.startswith(("file:", "data:")):
            said.append(url)
    return said


def column(browser: Any, index: int) -> list[str]:
    cells = browser.find_elements("css selector", f"table.sortable tbody td:nth-child({index + 1})")
    return [cell.text for cell in cells]


def test_nothing_fails_and_nothing_is_loaded(browser: Any, report: Path) -> None:
    for scheme in ("light", "dark"):
        opened(browser, report, scheme=scheme)
        assert browser.title.startswith("Error analysis of ")
        assert not browser.execute_script("return performance.getEntriesByType('resource').length")
        assert not complaints(browser)


def test_an_error_on_the_page_would_be_seen(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text("<!DOCTYPE html><link rel=icon href='data:,'><img src=none.png><script>undefined.x</script>")
    opened(browser, page)
    assert {re.sub(r".*(none\.png|TypeError).*", r"\1", said) for said in complaints(browser)} >= {
        "none.png",
        "TypeError",
    }


def test_tables_sort(browser: Any, report: Path, analysis: ModelAnalysis) -> None:
    opened(browser, report)
    assert column(browser, 0) == [entry.norm for entry in analysis.harm]
    head = browser.find_elements("css selector", "table.sortable th button")[2]
    head.click()
    rising = [float(text) for text in column(browser, 2)]
    assert rising == sorted(rising)
    assert len(set(rising)) > 1
    assert browser.find_element("css selector", "[aria-sort=ascending]").text.startswith("model's SQNR")
    head.click()
    assert [float(text) for text in column(browser, 2)] == rising[::-1]
    browser.find_element("css selector", "table.sortable th button").send_keys("\ue007")  # Enter, from the keyboard
    assert column(browser, 0) == sorted(column(browser, 0))
    assert not complaints(browser)


def test_the_sweep(browser: Any, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((50, 16))
    path = tmp_path / "sweep.html"
    found = fxp.sweep(fxp.LayerNorm(16), rows, formats(["int4", "int8"], methods=["minmax", "mse"], exponents=[0]))
    found.to_html(path)
    opened(browser, path)
    assert column(browser, 0) == [point.format.input.value for point in found.points]
    browser.find_elements("css selector", "table.sortable th button")[0].click()
    assert column(browser, 0) == ["int4", "int4", "int8", "int8"]
    assert browser.find_element("css selector", "figure svg").is_displayed()
    assert not complaints(browser)


def test_links_open_the_norm(browser: Any, report: Path, analysis: ModelAnalysis) -> None:
    opened(browser, report)
    last = analysis.harm[-1].norm
    link = browser.find_element("link text", last)
    target = browser.find_element("id", link.get_attribute("href").split("#")[1])
    assert target.get_attribute("open") is None
    link.click()
    # the hash changes in a task of its own
    found = browser.execute_async_script(
        "const [target, done] = arguments;"
        "requestAnimationFrame(() => setTimeout(() => done([target.open, target.getBoundingClientRect().top])))", target
    )  # fmt: skip
    assert found[0]
    assert 0 <= found[1] < 900
    assert target.find_element("css selector", "figure svg").is_displayed()
    assert not complaints(browser)


def rgb(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[\d.]+", text)][:3]


def luminance(colour: list[float]) -> float:
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(
    ("kind", "scheme", "dark"), [("screen", "light", False), ("screen", "dark", True), ("print", "dark", False)]
)
def test_colours_follow_the_reader(browser: Any, report: Path, kind: str, scheme: str, dark: bool) -> None:
    """On paper always dark on light; figures take the text's colour."""
    opened(browser, report, kind=kind, scheme=scheme)
    page = rgb(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert (luminance(page) < 0.5) is dark
    for element in ("body", "a[href^='#']", "details[open] svg text"):
        style = "return getComputedStyle(document.querySelector(arguments[0]))"
        text = rgb(browser.execute_script(f"{style}.{'fill' if 'svg' in element else 'color'}", element))
        lighter, darker = sorted((luminance(page), luminance(text)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= CONTRAST, element


def test_screenshot(browser: Any, report: Path, tmp_path: Path) -> None:
    shot = tmp_path / "report.png"
    opened(browser, report)
    assert browser.save_screenshot(str(shot))
    content = shot.read_bytes()
    assert struct.unpack(">II", content[16:24])[0] == 1200
    opened(browser, report, scheme="dark")
    assert browser.get_screenshot_as_png() != content


def test_printing_opens_every_part(browser: Any, report: Path) -> None:
    opened(browser, report)
    closed = "return [...document.querySelectorAll('details')].filter(part => !part.open).length"
    assert browser.execute_script(closed)
    assert base64.b64decode(browser.print_page()).startswith(b"%PDF")
    assert not browser.execute_script(closed)
    assert not complaints(browser)


def test_a_hundred_norms_load_within_two_seconds(browser: Any, report: Path, tmp_path: Path) -> None:
    """In time that the page's thread computes, so that a busy machine makes no difference.

    The page is that of three norms, whose parts are repeated as those of a hundred.
    """
    text = report.read_text(encoding="utf-8")
    head, *parts = re.split(r'(?=<details class="norm")', text)
    parts[-1], tail = parts[-1].split('<h2 id="definitions">')
    many = [re.sub(r"norm\d", f"norm{i}", parts[i % 3], count=1) for i in range(100)]
    page = tmp_path / "many.html"
    page.write_text(head + "".join(many) + '<h2 id="definitions">' + tail, encoding="utf-8")
    assert page.stat().st_size < 10e6
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    opened(browser, page)
    assert len(browser.find_elements("css selector", "details.norm")) == 100
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    seconds = {entry["name"]: entry["value"] for entry in metrics}["TaskDuration"]
    browser.execute_cdp_cmd("Performance.disable", {})
    assert 0 < seconds < 2
    assert not complaints(browser)
