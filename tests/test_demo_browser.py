"""The demo in a real Chromium: what a person sees, types and clicks.

Needs a Chromium on the PATH; `REQUIRE_CHROMIUM=1` makes its absence a failure.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, expect, sync_playwright

import gradio_helper as gh
from ov_pixart.demo import studio
from tests.support.fake_pipeline import PACE, FakePipeline, fake_folder

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOW_TO = "No Chromium found: install one (Debian, Ubuntu: apt-get install chromium)."
PATIENCE = 60_000  # milliseconds; a busy machine is slow to load a page
REFUSED = "status of 422"  # how browsers log a request that a validator refused

pytestmark = pytest.mark.slow
if CHROMIUM is None and os.environ.get("REQUIRE_CHROMIUM") != "1":
    pytest.skip(HOW_TO, allow_module_level=True)


@pytest.fixture(scope="module")
def context() -> Iterator[BrowserContext]:
    """One browser profile for all tests: what a page needs is fetched once."""
    assert CHROMIUM is not None, HOW_TO
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        context = browser.new_context(reduced_motion="reduce")
        context.set_default_timeout(PATIENCE)
        yield context
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("browser")
    folders = {version: fake_folder(root / version) for version in ("FP16", "INT8")}
    folders["LCM"] = fake_folder(root / "LCM", few_step=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studio, "load_pipeline", FakePipeline)
        demo = gh.make_demo(folders)
        gh.launch_demo(demo)
        yield demo.local_url
        demo.close()


@pytest.fixture(autouse=True)
def pace() -> Iterator[None]:
    yield
    PACE.go_on()


@pytest.fixture
def visit(context: BrowserContext, address: str) -> Iterator[Callable[..., Page]]:
    """Opens the page; afterwards: no error in any console, no request that left this machine."""
    pages: list[Page] = []
    complaints: list[str] = []

    def complain(text: str) -> None:
        if REFUSED not in text:
            complaints.append(text)

    def open_page(width: int = 1280, height: int = 900, scheme: str = "light") -> Page:
        page = context.new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme=scheme)
        page.on("console", lambda m: m.type == "error" and complain(m.text))
        page.on("pageerror", lambda error: complain(str(error)))
        page.on("request", lambda r: is_outside(r.url) and complain(f"asked {r.url}"))
        page.goto(address)
        expect(page.locator("#generate")).to_be_enabled()
        expect(page.locator("#history")).to_be_attached()  # Gradio renders column by column
        return page

    yield open_page
    PACE.go_on()
    for page in pages:
        page.close()
    assert complaints == []


def is_outside(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("http", "https", "ws", "wss") and parts.hostname != "127.0.0.1"


def prompt(page: Page) -> Locator:
    return page.locator("#prompt textarea")


def headline(page: Page) -> Locator:
    return page.locator("#status .headline")


def stage(page: Page) -> Locator:
    return page.locator("#stage .grid-container img")


def history(page: Page) -> Locator:
    return page.locator("#history .thumbnail-item")


def number(page: Page, control: str) -> Locator:
    return page.locator(f"#{control} input[type=number]")


def choose(page: Page, control: str, option: str) -> None:
    page.locator(f"#{control} input").click()
    page.get_by_role("option", name=option).click()


# Gradio mounts what an accordion hid when it first opens, and sets its values once more a moment
# later: what was typed in between, faster than any hand, is lost.
SETTLED = """() => new Promise((done) => {
  const finish = () => { watcher.disconnect(); done(); };
  const again = () => { clearTimeout(timer); timer = setTimeout(finish, 250); };
  let timer = setTimeout(finish, 250);
  const watcher = new MutationObserver(again);
  watcher.observe(document.body, {subtree: true, childList: true, attributes: true});
})"""


def more_settings(page: Page) -> None:
    page.get_by_role("button", name="More settings").click()
    expect(number(page, "steps")).to_be_visible()
    page.evaluate(SETTLED)


def set_number(page: Page, control: str, value: int) -> None:
    for _ in range(10):
        number(page, control).fill(str(value))
        prompt(page).click()
        page.evaluate(SETTLED)
        if number(page, control).input_value() == str(value):
            return
    raise AssertionError(f"{control} does not keep {value}.")


def start(page: Page, step: int = 3) -> None:
    """Start a run that holds after `step` steps."""
    PACE.hold_after(step)
    page.locator("#generate").click()
    expect(headline(page)).to_contain_text(f"Step {step} of 20")


def generate(page: Page, text: str | None = None) -> None:
    if text is not None:
        prompt(page).fill(text)
    count = history(page).count()
    page.locator("#generate").click()
    expect(history(page)).not_to_have_count(count)
    expect(headline(page)).to_contain_text("Done in")
    expect(page.locator("#generate")).to_be_enabled()


LAYOUT = """() => JSON.stringify(['#stage', '#status', '#history', '#generate', '#compare-slider']
  .map((part) => document.querySelector(part)?.getBoundingClientRect()))"""


def test_previews_arrive_before_the_image_and_nothing_jumps(visit):
    page = visit()
    start(page, step=1)
    layout, seen = page.evaluate(LAYOUT), [stage(page).get_attribute("src")]
    page.evaluate("document.querySelector('#stage .grid-container img').dataset.first = 'yes'")
    for step in range(2, 6):
        PACE.hold_after(1)
        expect(headline(page)).to_contain_text(re.compile(rf"Step {step} of 20 · .* left"))
        expect(stage(page)).not_to_have_attribute("src", seen[-1])
        seen.append(stage(page).get_attribute("src"))
        assert page.evaluate(LAYOUT) == layout
    assert page.locator("#status progress").get_attribute("value") == "0.250"
    PACE.go_on()
    expect(headline(page)).to_contain_text("Done in")
    assert page.evaluate(LAYOUT) == layout
    assert len(set(seen)) == 5
    expect(stage(page)).to_have_attribute("data-first", "yes")  # never replaced: no flicker
    expect(stage(page)).to_have_js_property("naturalWidth", 256)


def test_stop_ends_the_run_within_one_step_and_keeps_the_last_preview(visit, monkeypatch):
    closed, run = threading.Event(), studio.Studio.generate

    def watched(self, settings):
        try:
            yield from run(self, settings)
        finally:
            closed.set()

    monkeypatch.setattr(studio.Studio, "generate", watched)
    page = visit()
    start(page)
    before, preview = PACE.taken, stage(page).get_attribute("src")
    page.locator("#stop").click()
    expect(headline(page)).to_have_text("Stopped after step 3 of 20")
    expect(page.locator("#stop")).to_be_disabled()
    assert closed.wait(60)
    expect(stage(page)).to_have_attribute("src", preview)
    PACE.go_on()
    generate(page)
    assert PACE.taken - before == 1 + 20  # the rest of the step in progress, and a whole run


def test_a_second_tab_waits_its_turn_sees_its_place_and_does_not_mix(visit):
    first, second = visit(), visit()
    prompt(first).fill("a large red heart")
    prompt(second).fill("a small blue star")
    start(first)
    second.locator("#generate").click()
    expect(second.locator("#stage")).to_contain_text("queue: 1/1")
    expect(stage(second)).to_have_count(0)
    PACE.go_on()
    for page, text in ((first, "a large red heart"), (second, "a small blue star")):
        expect(headline(page)).to_contain_text("Done in")
        expect(stage(page)).to_have_attribute("alt", text)
        expect(history(page)).to_have_count(1)


def test_stop_takes_a_waiting_request_out_of_the_queue(visit):
    first, second = visit(), visit()
    start(first)
    second.locator("#generate").click()
    expect(second.locator("#stage")).to_contain_text("queue: 1/1")
    second.locator("#stop").click()
    expect(headline(second)).to_have_text("Stopped before the first step")
    expect(second.locator("#generate")).to_be_enabled()
    PACE.go_on()
    expect(headline(first)).to_contain_text("Done in")
    expect(history(second)).to_have_count(0)


def test_a_closed_tab_stops_its_run(visit):
    first, second = visit(), visit()
    start(first)
    first.close()
    second.locator("#generate").click()
    for _ in range(16):  # steps of the abandoned run, until the other one begins
        PACE.hold_after(1)
        try:
            expect(headline(second)).to_contain_text("Step", timeout=1_000)
            break
        except AssertionError:
            continue
    expect(headline(second)).to_contain_text("Step", timeout=1_000)


def test_comparison_slides_between_two_versions(visit):
    page = visit()
    page.get_by_role("tab", name="Compare").click()
    PACE.hold_after(3)
    page.locator("#compare-go").click()
    expect(headline(page)).to_contain_text("Step 3 of 20")
    slider = page.locator("#compare-slider")
    expect(slider.locator("img").first).to_be_visible()  # a live preview here, too
    layout = page.evaluate(LAYOUT)
    PACE.hold_after(20)
    expect(page.locator("#status")).to_contain_text("INT8")
    expect(headline(page)).to_contain_text("Step 3 of 20")
    assert page.evaluate(LAYOUT) == layout
    PACE.go_on()
    expect(history(page)).to_have_count(2)
    for text in ("FP16", "INT8", "On disk", "MB", "One step", "ms"):
        expect(page.locator("#facts")).to_contain_text(text)
    expect(page.locator("#facts")).not_to_contain_text("–")
    assert page.evaluate(LAYOUT) == layout

    handle = slider.locator(".inner")
    before = handle.bounding_box()
    page.mouse.move(before["x"] + before["width"] / 2, before["y"] + before["height"] / 2)
    page.mouse.down()
    page.mouse.move(before["x"] - 100, before["y"] + 20, steps=5)
    page.mouse.up()
    assert handle.bounding_box()["x"] < before["x"] - 50
    for _ in range(100):  # and with the keyboard
        page.locator("#divider input[type=range]").press("ArrowRight")
        if handle.bounding_box()["x"] > before["x"] + 20:
            break
    assert handle.bounding_box()["x"] > before["x"] + 20


def test_the_same_version_twice_is_refused_and_generate_shows_the_image(visit):
    page = visit()
    page.get_by_role("tab", name="Compare").click()
    choose(page, "right", "FP16")
    page.locator("#compare-go").click()
    expect(page.locator("#right")).to_contain_text("Choose another version")
    expect(page.locator("#compare-go")).to_be_enabled()
    generate(page)
    expect(page.get_by_role("tab", name="Image")).to_have_attribute("aria-selected", "true")


def test_refusals_appear_next_to_their_control_and_go_away(visit):
    page = visit()
    prompt(page).fill("  ")
    number(page, "seed").fill("-5")
    page.locator("#generate").click()
    expect(page.locator("#prompt")).to_contain_text("Type what you would like to see")
    expect(page.locator("#seed")).to_contain_text("whole number from 0")
    expect(headline(page)).to_have_text("Ready")
    number(page, "seed").fill("99999999999999999999")
    page.locator("#generate").click()
    expect(page.locator("#seed")).to_contain_text("whole number from 0")
    number(page, "seed").fill("5")
    generate(page, "a red heart")
    expect(page.locator("#seed")).not_to_contain_text("whole number")
    expect(page.locator("#prompt")).not_to_contain_text("Type what")


def test_typed_steps_are_clamped_to_what_the_model_can_do(visit):
    page = visit()
    more_settings(page)
    for typed, kept in (("1000", "100"), ("0", "2")):
        number(page, "steps").fill(typed)
        prompt(page).click()
        expect(number(page, "steps")).to_have_value(kept)


def test_long_and_foreign_prompts_are_generated_and_html_stays_text(visit):
    page = visit()
    nasty = '<img src=x onerror="window.hacked=1"> {{x}} ${alert(1)} 🦊 שלום'
    generate(page, nasty)
    expect(stage(page)).to_have_attribute("alt", nasty)
    expect(page.locator("#status")).to_contain_text("vocabulary: 🦊, שלום")
    generate(page, "word " * 2_000)
    expect(page.locator("#status")).to_contain_text("120 tokens")
    assert page.evaluate("window.hacked") is None


def test_an_error_takes_one_line_and_the_next_run_works(visit):
    page = visit()
    prompt(page).fill(FakePipeline.fail_on)
    page.locator("#generate").click()
    expect(headline(page)).to_have_text("That did not work: the device is on fire")
    generate(page, "a red heart")


def test_history_brings_images_and_settings_back_and_ends_with_the_visit(visit, tmp_path):
    page = visit()
    page.locator("#reuse").click()  # nothing there yet
    expect(page.get_by_text("Choose a finished image first.")).to_be_visible()
    more_settings(page)
    set_number(page, "steps", 7)
    set_number(page, "guidance-end", 0.5)
    number(page, "seed").fill("41")
    generate(page, "a red heart")
    expect(page.locator("#status")).to_contain_text("in the first 50%")
    choose(page, "version", "INT8")
    choose(page, "version", "LCM")  # another kind of model brings its own settings
    expect(number(page, "steps")).to_have_value("4")
    number(page, "seed").fill("42")
    generate(page, "a blue star")
    history(page).last.click()  # newest first
    expect(headline(page)).to_contain_text("Image 1 of this visit")
    expect(stage(page)).to_have_attribute("alt", "a red heart")
    page.locator("#reuse").click()
    expect(prompt(page)).to_have_value("a red heart")
    expect(number(page, "seed")).to_have_value("41")
    expect(page.locator("#version input")).to_have_value("FP16")
    expect(number(page, "steps")).to_have_value("7")
    expect(number(page, "guidance")).to_be_enabled()
    expect(number(page, "guidance-end")).to_have_value("0.5")
    stage(page).click()
    with page.expect_download() as download:
        page.locator("#stage").get_by_label("Download").click()
    assert download.value.suggested_filename.endswith(".png")
    download.value.save_as(tmp_path / "saved.png")
    saved = gh.read_settings(tmp_path / "saved.png")
    assert (saved.prompt, saved.seed, saved.version) == ("a red heart", 41, "FP16")
    page.reload()
    expect(page.locator("#generate")).to_be_enabled()
    expect(history(page)).to_have_count(0)


def test_another_version_keeps_the_settings_it_can_use(visit):
    page = visit()
    more_settings(page)
    set_number(page, "steps", 7)
    PACE.hold_after(6)
    choose(page, "version", "INT8")
    page.locator("#generate").click()
    expect(headline(page)).to_contain_text("Step 6 of 7")
    expect(page.locator("#status")).to_contain_text("INT8")


def test_four_images_have_four_seeds(visit):
    page = visit()
    more_settings(page)
    set_number(page, "images", 4)
    generate(page)
    expect(stage(page)).to_have_count(4)
    expect(history(page)).to_have_count(4)
    history(page).first.click()  # the last of the four
    expect(page.locator("#status")).to_contain_text("seed 10")


def test_a_new_seed_each_time_is_drawn_and_shown(visit):
    page = visit()
    page.get_by_label("New seed each time").check()
    expect(number(page, "seed")).to_be_disabled()
    seeds = set()
    for _ in range(2):
        generate(page)
        seeds.add(number(page, "seed").input_value())
    assert len(seeds) == 2


def test_controls_without_effect_are_disabled_and_give_the_reason(visit):
    page = visit()
    more_settings(page)
    expect(page.locator("#negative-prompt textarea")).to_be_enabled()
    expect(number(page, "guidance-end")).to_be_enabled()
    choose(page, "version", "LCM")
    expect(number(page, "steps")).to_have_value("4")
    expect(number(page, "guidance")).to_be_disabled()
    expect(page.locator("#guidance")).to_contain_text("distilled")
    expect(number(page, "guidance-end")).to_be_disabled()
    expect(page.locator("#guidance-end")).to_contain_text("Has no effect")
    expect(page.locator("#negative-prompt textarea")).to_be_disabled()
    expect(page.locator("#negative-prompt")).to_contain_text("Has no effect")


def test_the_keyboard_is_enough(visit):
    page = visit()
    prompt(page).focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("a green star")
    page.keyboard.press("Shift+Enter")
    expect(history(page)).to_have_count(1)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "generate"
    page.keyboard.press("Enter")
    expect(history(page)).to_have_count(2)
    history(page).last.focus()
    page.keyboard.press("Enter")
    expect(headline(page)).to_contain_text("Image 1 of this visit")


NAMELESS = """() => [...document.querySelectorAll(
    'button, input, textarea, select, [role=slider], progress, a[href]')]
  .filter(e => e.checkVisibility())
  .filter(e => !(e.getAttribute('aria-label') || e.innerText || e.title
    || [...(e.labels || [])].some(l => l.innerText.trim())
    || document.getElementById(e.getAttribute('aria-labelledby'))))
  .map(e => e.outerHTML.slice(0, 120))"""


def test_every_control_has_a_name_for_screen_readers(visit):
    page = visit()
    more_settings(page)
    generate(page)
    assert page.evaluate(NAMELESS) == []
    page.get_by_role("tab", name="Compare").click()
    assert page.evaluate(NAMELESS) == []


CONTRAST = """() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0.99) return c;
    }
    return [255, 255, 255];
  };
  const poor = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !e.checkVisibility({opacityProperty: true})) continue;
    if (e.closest('[disabled], script, style, noscript')) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push([walk.currentNode.data.trim().slice(0, 40), ratio.toFixed(2)]);
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough_in_both_themes(visit, scheme):
    page = visit(scheme=scheme)
    more_settings(page)
    generate(page, FakePipeline.fail_on.replace("fail", "שלום"))
    number(page, "seed").fill("-5")
    page.locator("#generate").click()
    expect(page.locator("#seed")).to_contain_text("whole number")
    page.add_style_tag(content="* { transition: none !important; animation: none !important; }")
    page.mouse.move(5, 5)
    assert page.evaluate(CONTRAST) == []
    page.get_by_role("tab", name="Compare").click()
    expect(page.locator("#facts")).to_be_visible()
    assert page.evaluate(CONTRAST) == []


def test_phone_width_shows_the_image_next_to_the_button_and_does_not_scroll_sideways(visit):
    page = visit(width=390, height=844)
    generate(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    button, image = (page.locator(s).bounding_box() for s in ("#generate", "#stage"))
    assert 0 < image["y"] - button["y"] < 250
    page.get_by_role("tab", name="Compare").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_page_works_inside_a_notebooks_frame(visit, address):
    page = visit()
    page.set_content(f'<iframe src="{address}" width="100%" height="900"></iframe>')
    frame = page.frame_locator("iframe")
    frame.locator("#generate").click()
    expect(frame.locator("#status")).to_contain_text("Done in")
