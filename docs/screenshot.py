"""Takes the README's pictures of the demo's report, in headless Chromium; needs chromium, chromedriver and Selenium.

Run it after the demo: ``python docs/screenshot.py fxp-layernorm-demo/analysis.html``.
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from shutil import which

from PIL import Image
from selenium import webdriver

#: For each picture, what it begins with and what it ends with.
PICTURES = {
    "report.png": ("h1", "table.sortable"),
    "report-norm.png": ("details.norm[open] > summary", "details.norm[open] .figures"),
}
WIDTH, HEIGHT, MARGIN = 1000, 1000, 8


def main(page: Path) -> None:
    """Write the pictures of a page beside this file."""
    options = webdriver.ChromeOptions()
    options.binary_location = which("chromium") or ""
    for option in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        f"--window-size={WIDTH},{HEIGHT}",
    ):
        options.add_argument(option)
    browser = webdriver.Chrome(options, webdriver.ChromeService(which("chromedriver") or ""))
    browser.get(page.resolve().as_uri())
    for name, (first, last) in PICTURES.items():
        top = browser.find_element("css selector", first).rect["y"] - MARGIN
        end = browser.find_element("css selector", last).rect
        clip = {"x": 0, "y": top, "width": WIDTH, "height": end["y"] + end["height"] - top, "scale": 1}
        taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        picture = Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")
        picture.quantize(64).save(Path(__file__).parent / name, optimize=True)  # a page has few colours
    browser.quit()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
