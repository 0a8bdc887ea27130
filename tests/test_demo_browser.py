"""The demo in a real Chromium: what a person sees, types, clicks and hears.

Needs a Chromium on the PATH; `REQUIRE_CHROMIUM=1` makes its absence a failure.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import BrowserContext, Page, expect, sync_playwright

import gradio_helper as gh
from tests.demo_support import FakePipeline, fake_folder

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
STEP = 0.08  # seconds a step of the stand-in takes
PATIENCE = 60_000  # milliseconds; a busy machine is slow to load a page

if CHROMIUM is None and os.environ.get("REQUIRE_CHROMIUM") != "1":
    pytest.skip(HOW_TO, allow_module_level=True)


@pytest.fixture(scope="module")
def context() -> Iterator[BrowserContext]:
    """One browser profile for all tests: what a page needs is fetched once."""
    assert CHROMIUM is not None, HOW_TO
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        context = browser.new_context()
        context.set_default_timeout(PATIENCE)
        yield context
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("browser")
    folders = {label: fake_folder(root / label) for label in ("FP16", "INT8")}
    folders["LCM"] = fake_folder(root / "LCM", few_step=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gh, "_load_pipeline", FakePipeline)
        patch.setattr(FakePipeline, "step_seconds", STEP)
        demo = gh.make_demo(folders)
        gh.launch_demo(demo)
        yield demo.local_url
        demo.close()


@pytest.fixture
def visit(context: BrowserContext, address: str) -> Iterator[Callable[..., Page]]:
    """Opens the page; afterwards: no error in any console, no request that left this machine."""
    pages: list[Page] = []
    complaints: list[str] = []

    def open_page(width: int = 1280, height: int = 900, scheme: str = "light") -> Page:
        page = context.new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme=scheme)
        page.on("console", lambda m: m.type == "error" and complaints.append(m.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: is_outside(r.url) and complaints.append(f"asked {r.url}"))
        page.goto(address)
        expect(page.locator("#generate")).to_be_enabled()
        expect(page.locator("#stage")).to_be_attached()  # Gradio renders the columns one by one
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == []


def is_outside(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("http", "https", "ws", "wss") and parts.hostname != "127.0.0.1"


def prompt(page: Page) -> object:
    return page.locator("#prompt textarea")


def headline(page: Page) -> object:
    return page.locator("#stage .headline")


def choose(page: Page, control: str, option: str) -> None:
    page.locator(f"{control} input").click()
    page.get_by_role("option", name=option).click()


# Gradio mounts what an accordion hid when it first opens, and sets its values once more a moment
# later: what was typed in between, faster than any hand, is lost.
SETTLED = """() => new Promise((done) => {
  const finish = () => { watcher.disconnect(); done(); };
  let timer = setTimeout(finish, 250);
  const watcher = new MutationObserver(() => {
    clearTimeout(timer);
    timer = setTimeout(finish, 250);
  });
  watcher.observe(document.body, {subtree: true, childList: true, attributes: true});
})"""


def more_settings(page: Page) -> None:
    page.get_by_role("button", name="More settings").click()
    expect(page.locator("#steps input[type=number]")).to_be_visible()
    page.evaluate(SETTLED)


def wait_until_done(page: Page) -> None:
    expect(page.locator("#stage .stage.done")).to_be_visible()


STEPS = re.compile(r"Step \d+ of \d+")


def set_steps(page: Page, steps: int) -> None:
    more_settings(page)
    page.locator("#steps input[type=number]").fill(str(steps))


def start_long_run(page: Page) -> None:
    """Starts a run that is still going on when the test looks again."""
    set_steps(page, 100)
    page.locator("#generate").click()
    expect(headline(page)).to_contain_text(STEPS)


def generate(page: Page, text: str | None = None) -> None:
    if text is not None:
        prompt(page).fill(text)
    page.locator("#generate").click()
    expect(page.locator("#stage .stage.done")).to_have_count(0)
    wait_until_done(page)


RECORD = """() => {
  const stage = document.querySelector('#stage');
  window.seen = [];
  const look = () => {
    const image = stage.querySelector('.frame img');
    const box = stage.querySelector('.frame').getBoundingClientRect();
    const bar = stage.querySelector('.bar').getBoundingClientRect();
    window.seen.push({
      source: image ? image.getAttribute('src').slice(0, 22) : '',
      headline: stage.querySelector('.headline').innerText,
      box: [box.x, box.y + scrollY, box.width, box.height, bar.y + scrollY],
    });
  };
  new MutationObserver(look).observe(stage, {subtree: true, childList: true, attributes: true});
}"""


def test_previews_arrive_before_the_picture_and_nothing_jumps(visit):
    page = visit()
    set_steps(page, 100)  # eight seconds: time enough for a browser on a busy machine
    page.evaluate(RECORD)
    generate(page)
    seen = page.evaluate("window.seen")
    previews = {s["headline"] for s in seen if s["source"].startswith("data:image/png")}
    assert len(previews) >= 5  # of 100: a busy browser draws several at once
    assert all(STEPS.match(text) for text in previews)
    assert seen[-1]["source"].startswith("gradio_api/file")
    assert "left" in " ".join(previews)
    assert len({json.dumps(s["box"]) for s in seen}) == 1
    width = page.evaluate("document.querySelector('#stage img').naturalWidth")
    assert width == 256


def test_stop_keeps_the_last_preview_and_the_page_goes_on(visit):
    page = visit()
    start_long_run(page)
    started = time.perf_counter()
    page.locator("#stop").click()
    expect(page.locator("#stage .stage.stopped")).to_be_visible()
    assert time.perf_counter() - started < 50 * STEP
    assert page.locator("#stage .frame img").get_attribute("src").startswith("data:image/png")
    expect(page.locator("#stop")).to_be_disabled()
    generate(page)


def test_a_second_tab_waits_its_turn_sees_its_place_and_does_not_mix(visit):
    first, second = visit(), visit()
    prompt(first).fill("a large red heart")
    prompt(second).fill("a small blue star")
    start_long_run(first)
    second.locator("#generate").click()
    expect(second.locator("#stage")).to_contain_text("queue: 1/1")
    expect(second.locator("#stage .frame img")).to_have_count(0)
    wait_until_done(first)
    wait_until_done(second)
    assert first.locator("#stage img").get_attribute("alt") == "a large red heart"
    assert second.locator("#stage img").get_attribute("alt") == "a small blue star"
    assert (
        first.locator("#history button").count() == second.locator("#history button").count() == 1
    )


def test_stop_takes_a_waiting_request_out_of_the_queue(visit):
    first, second = visit(), visit()
    start_long_run(first)
    second.locator("#generate").click()
    expect(second.locator("#stage")).to_contain_text("queue: 1/1")
    second.locator("#stop").click()
    expect(headline(second)).to_contain_text("Taken out of the queue")
    expect(second.locator("#generate")).to_be_enabled()
    wait_until_done(first)


def test_a_closed_tab_stops_its_run(visit):
    first, second = visit(), visit()
    start_long_run(first)
    started = time.perf_counter()
    first.close()
    second.locator("#generate").click()
    expect(headline(second)).to_contain_text(STEPS)
    assert time.perf_counter() - started < 90 * STEP  # the other run would have taken longer
    wait_until_done(second)


def test_comparison_slides_between_two_precisions(visit):
    page = visit()
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-go").click()
    expect(page.locator("#card-left")).to_contain_text("Step")
    slider = page.locator("#compare-slider")
    expect(slider.locator("img").first).to_be_visible()
    for side, label in (("left", "FP16"), ("right", "INT8")):
        card = page.locator(f"#card-{side}")
        for text in (label, "Done", "On disk", "MB", "ms", "Memory"):
            expect(card).to_contain_text(text)
    assert page.locator("#history button").count() == 2

    handle = slider.locator(".inner")
    before = handle.bounding_box()
    page.mouse.move(before["x"] + before["width"] / 2, before["y"] + before["height"] / 2)
    page.mouse.down()
    page.mouse.move(before["x"] - 100, before["y"] + 20, steps=5)
    page.mouse.up()
    dragged = handle.bounding_box()
    assert dragged["x"] < before["x"] - 50
    for _ in range(100):  # and with the keyboard
        page.locator("#divider input[type=range]").press("ArrowRight")
        if handle.bounding_box()["x"] > before["x"] + 20:
            break
    assert handle.bounding_box()["x"] > before["x"] + 20


def test_the_same_precision_twice_is_refused_and_generate_shows_the_picture(visit):
    page = visit()
    page.get_by_role("tab", name="Compare").click()
    choose(page, "#right", "FP16")
    page.locator("#compare-go").click()
    expect(page.locator("#right")).to_contain_text("Choose another precision")
    expect(page.locator("#compare-go")).to_be_enabled()
    page.locator("#generate").click()
    expect(page.get_by_role("tab", name="Picture")).to_have_attribute("aria-selected", "true")
    wait_until_done(page)


def test_refusals_appear_next_to_their_control_and_go_away(visit):
    page = visit()
    prompt(page).fill("  ")
    page.locator("#seed input").fill("-5")
    page.locator("#generate").click()
    expect(page.locator("#prompt-note")).to_contain_text("Type what you would like to see")
    expect(page.locator("#seed")).to_contain_text("whole number from 0")
    expect(headline(page)).to_have_text("Ready")
    expect(page.locator("#generate")).to_be_enabled()
    page.locator("#seed input").fill("99999999999999999999")
    page.locator("#generate").click()
    expect(page.locator("#seed")).to_contain_text("whole number from 0")
    page.locator("#seed input").fill("5")
    generate(page, "a red heart")
    expect(page.locator("#seed")).to_contain_text("The same seed")
    expect(page.locator("#prompt-note")).to_have_text("")


def test_typed_steps_are_clamped_to_what_the_model_can_do(visit):
    page = visit()
    more_settings(page)
    for typed, kept in (("1000", "100"), ("0", "2")):
        page.locator("#steps input[type=number]").fill(typed)
        page.locator("#prompt textarea").click()
        expect(page.locator("#steps input[type=number]")).to_have_value(kept)


def test_long_and_foreign_prompts_are_painted_and_html_stays_text(visit):
    page = visit()
    nasty = '<img src=x onerror="window.hacked=1"> {{x}} ${alert(1)} 🦊 שלום'
    generate(page, nasty)
    assert page.locator("#stage img").get_attribute("alt") == nasty
    assert page.locator("#history button").get_attribute("aria-label").find(nasty) > 0
    expect(page.locator("#prompt-note")).to_contain_text("vocabulary")
    generate(page, "word " * 2_000)
    expect(page.locator("#prompt-note")).to_contain_text("120 tokens")
    assert page.evaluate("window.hacked") is None


def test_an_error_is_shown_and_the_next_run_works(visit):
    page = visit()
    prompt(page).fill(FakePipeline.fail_on)
    page.locator("#generate").click()
    expect(page.locator("#stage .stage.error")).to_contain_text("the device is on fire")
    generate(page, "a red heart")


def test_history_brings_pictures_and_settings_back_and_ends_with_the_visit(visit, tmp_path):
    page = visit()
    more_settings(page)
    page.locator("#steps input[type=number]").fill("7")
    page.locator("#seed input").fill("41")
    generate(page, "a red heart")
    choose(page, "#precision", "INT8")
    expect(page.locator("#steps input[type=number]")).to_have_value("7")
    choose(page, "#precision", "LCM")
    expect(page.locator("#steps input[type=number]")).to_have_value("4")
    page.locator("#seed input").fill("42")
    generate(page, "a blue star")
    page.locator("#history button").last.click()  # newest first
    expect(headline(page)).to_contain_text("Picture 1 of this visit")
    assert page.locator("#stage img").get_attribute("alt") == "a red heart"
    page.locator("#reuse").click()
    expect(prompt(page)).to_have_value("a red heart")
    expect(page.locator("#seed input")).to_have_value("41")
    expect(page.locator("#precision input")).to_have_value("FP16")
    expect(page.locator("#steps input[type=number]")).to_have_value("7")
    expect(page.locator("#guidance input[type=number]")).to_be_enabled()
    with page.expect_download() as download:
        page.get_by_role("link", name="Save PNG").click()
    saved = tmp_path / "saved.png"
    download.value.save_as(saved)
    assert gh.read_settings(saved).prompt == "a red heart"
    page.reload()
    expect(page.locator("#generate")).to_be_enabled()
    expect(page.locator("#history")).to_contain_text("Nothing yet")


def test_four_pictures_have_four_seeds(visit):
    page = visit()
    more_settings(page)
    page.locator("#pictures input[type=number]").fill("4")
    page.locator("#prompt textarea").click()
    generate(page)
    assert page.locator("#stage .frame img").count() == 4
    assert page.locator("#history button").count() == 4
    assert page.get_by_role("link", name="Save PNG").count() == 4


def test_a_new_seed_each_time_is_drawn_and_shown(visit):
    page = visit()
    page.get_by_label("New seed each time").check()
    expect(page.locator("#seed input")).to_be_disabled()
    seeds = set()
    for _ in range(2):
        generate(page)
        seeds.add(page.locator("#seed input").input_value())
    assert len(seeds) == 2


def test_controls_without_effect_are_disabled_and_say_why(visit):
    page = visit()
    more_settings(page)
    expect(page.locator("#negative-prompt textarea")).to_be_enabled()
    choose(page, "#precision", "LCM")
    expect(page.locator("#steps input[type=number]")).to_have_value("4")
    expect(page.locator("#guidance input[type=number]")).to_be_disabled()
    expect(page.locator("#guidance")).to_contain_text("distilled")
    expect(page.locator("#negative-prompt textarea")).to_be_disabled()
    expect(page.locator("#negative-prompt")).to_contain_text("Has no effect")


def test_the_keyboard_is_enough(visit):
    page = visit()
    prompt(page).focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("a green star")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "generate"
    page.keyboard.press("Enter")
    wait_until_done(page)
    page.locator("#history button").focus()
    page.keyboard.press("Enter")
    expect(headline(page)).to_contain_text("Picture 1 of this visit")


def test_every_control_has_a_name_for_screen_readers(visit):
    page = visit()
    more_settings(page)
    page.get_by_role("tab", name="Compare").click()
    nameless = page.evaluate("""() => [...document.querySelectorAll(
        'button, input, textarea, select, [role=slider], [role=progressbar], a[href]')]
      .filter(e => e.checkVisibility())
      .filter(e => !(e.getAttribute('aria-label') || e.innerText || e.title
        || [...(e.labels || [])].some(l => l.innerText.trim())
        || document.getElementById(e.getAttribute('aria-labelledby'))))
      .map(e => e.outerHTML.slice(0, 120))""")
    assert nameless == []


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
    if (e.closest('[disabled], script, style, noscript, .spoken')) continue;
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
    page.locator("#seed input").fill("-5")
    page.locator("#generate").click()
    expect(page.locator("#seed")).to_contain_text("whole number")
    page.mouse.move(5, 5)
    time.sleep(0.5)  # colours fade
    assert page.evaluate(CONTRAST) == []
    page.get_by_role("tab", name="Compare").click()
    time.sleep(0.5)
    assert page.evaluate(CONTRAST) == []


def test_phone_width_shows_the_picture_next_to_the_button_and_does_not_scroll_sideways(visit):
    page = visit(width=390, height=844)
    generate(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    button, frame = (page.locator(s).bounding_box() for s in ("#generate", "#stage .frame"))
    assert 0 < frame["y"] - button["y"] < 200
    page.get_by_role("tab", name="Compare").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_page_works_inside_a_notebooks_frame(visit, address, tmp_path: Path):
    page = visit()
    page.set_content(f'<iframe src="{address}" width="100%" height="900"></iframe>')
    frame = page.frame_locator("iframe")
    frame.locator("#generate").click()
    expect(frame.locator("#stage .stage.done")).to_be_visible()
