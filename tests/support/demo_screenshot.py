"""Takes README's image of the demo: `python -m tests.support.demo_screenshot [--models FOLDER]`.

To be run again whenever the page or the embedded checkpoint has changed.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from gradio_helper import launch_demo, make_demo
from ov_pixart.demo.serve import converted
from ov_pixart.demo.settings import SCENE_EXAMPLES

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=ROOT / "models", type=Path)
    parser.add_argument("--output", default=ROOT / "assets" / "images" / "demo.png", type=Path)
    options = parser.parse_args()
    demo = make_demo(converted(str(ROOT / "assets" / "pixart-tiny"), options.models))
    launch_demo(demo)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(io.BytesIO(photograph(demo.local_url))) as image:
        image.convert("RGB").save(options.output, optimize=True)
    demo.close()


def photograph(address: str) -> bytes:
    """Generate every example once, on the first seed, and show the page with the second one."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 980})
        page.set_default_timeout(300_000)
        expect.set_options(timeout=300_000)
        page.goto(address)
        names = list(SCENE_EXAMPLES)
        for count, name in enumerate([*names[2:], names[0], names[1]], start=1):
            page.get_by_role("button", name=name).click()
            page.locator("#generate").click()
            expect(page.locator("#history .thumbnail-item")).to_have_count(count)
            expect(page.locator("#generate")).to_be_enabled()
        page.mouse.move(5, 5)
        page.add_style_tag(content="* { transition: none !important; }")
        taken = page.screenshot()
        browser.close()
    return taken


if __name__ == "__main__":
    main()
