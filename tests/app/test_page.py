"""The page in headless Chromium: click, wait, see pictures; on a desktop and on a phone."""

import contextlib
import io
import shutil
import time
import urllib.parse
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests import command_line

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]
FAMILIES = ("raster", "masked", "next_scale")
PATIENCE = 300_000  # milliseconds: of a machine that others use, too
# What a browser says where a request ended with its tab: the rest of its errors is the page's.
ENDED = ("net::ERR_ABORTED", "net::ERR_NETWORK_CHANGED")
PAINT, PHOTO = (230, 60, 160), (240, 200, 0)
PHONE, DESKTOP = (390, 844), (1280, 900)


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    with driver.sync_playwright() as running:
        found = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(params=[DESKTOP], ids=lambda size: f"{size[0]}px")
def tab(request, page, browser):
    """The page in a tab; in the end it has asked no other host, and nothing went wrong in it."""
    width, height = request.param
    context = browser.new_context(viewport=dict(width=width, height=height))
    tab, hosts, wrong = context.new_page(), set(), []
    tab.set_default_timeout(PATIENCE)
    tab.on("request", lambda asked: hosts.add(urllib.parse.urlsplit(asked.url).netloc))
    tab.on("console", lambda said: said.type == "error" and wrong.append(said.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    with contextlib.closing(context):
        tab.goto(page.address)
        tab.wait_for_selector("#m0-draw-draw")
        yield tab
        found = [said for said in wrong if not any(word in said for word in ENDED)]
    assert hosts - {""} == {f"127.0.0.1:{page.port}"}  # "" are pictures in the page itself
    assert found == []
    assert "ASKED ELSEWHERE" not in page.said()


def shown(tab, number: int, name: str = "") -> None:
    """Choose a model, and one of its tabs."""
    # on a phone some tabs stand in a menu
    title = ("generator", "masked", "next_scale", "tokenizer")[number]
    choose(tab, title)
    if name:
        tab.locator(f"button[role=tab]:visible:text-is('{name}')").first.click()


def choose(tab, title: str) -> None:
    # on a phone some tabs go into a menu, a while after the page is there
    tab.wait_for_function(
        "[...document.querySelectorAll('button[role=tab]')].every((one) => "
        "!one.checkVisibility() || one.getBoundingClientRect().right <= innerWidth + 1)"
    )
    found = tab.locator(f"button[role=tab]:visible:text-is('{title}')")
    if not found.count():
        tab.locator(".overflow-menu > button:visible").first.click()
        found = tab.locator(f".overflow-dropdown button:text-is('{title}')")
    found.first.click()


def pictures(tab, key: str, count: int) -> list:
    """The pictures of a gallery, once there are so many and they are loaded."""
    tab.wait_for_function(
        "([key, count]) => { const all = [...document.querySelectorAll(`#${key} img`)];"
        "return all.length == count && all.every((one) => one.complete && one.naturalWidth) }",
        arg=[key, count],
    )
    return tab.locator(f"#{key} img").all()


def fits(tab) -> None:
    """Nothing is wider than the window."""
    wide, window = tab.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window


def upload(tab, key: str) -> None:
    image = np.zeros((60, 80, 3), np.uint8)
    image[10:40, 20:50] = PHOTO
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    with tab.expect_file_chooser() as asked:
        tab.click(f"#{key}-upload")
    photo = dict(name="photo.png", mimeType="image/png", buffer=file.getvalue())
    asked.value.set_files(photo)


def paint(tab, key: str) -> None:
    """A stroke over the middle of the picture, once it is there; again until it is seen."""
    canvas = tab.locator(f"#{key}-editor canvas").first
    canvas.wait_for()
    canvas.scroll_into_view_if_needed()
    until(lambda: seen(canvas, PHOTO))
    box = None
    while box != (box := canvas.bounding_box()):  # the editor scales what it was given
        tab.wait_for_timeout(500)

    def stroke() -> bool:
        box = canvas.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        tab.mouse.move(x - 40, y - 20)
        tab.mouse.down()
        tab.mouse.move(x + 40, y + 20, steps=8)
        tab.mouse.up()
        return seen(canvas, PAINT)

    until(stroke)


def seen(canvas, colour: tuple[int, int, int]) -> bool:
    """Whether some of what a canvas shows is of a colour."""
    shown = np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB"), int)
    return (abs(shown - colour).max(-1) < 40).sum() > 100


def until(true) -> None:
    """Ask until it is so."""
    end = time.monotonic() + PATIENCE / 1000
    while not true():
        assert time.monotonic() < end


@pytest.mark.parametrize("number", range(3), ids=FAMILIES)
def test_pictures_are_drawn_and_it_is_seen_how_they_came_to_be(tab, number):
    key = f"m{number}-draw"
    shown(tab, number)
    tab.click(f"#{key}-draw")
    pictures(tab, f"{key}-gallery", 4)
    tab.click(f"#{key}-trace")
    film = tab.locator(f"#{key}-film .film")
    film.wait_for()
    told = film.locator("output").inner_text()
    image = film.locator("img")
    assert image.evaluate("(image) => image.naturalHeight") > 0
    before = image.evaluate("(image) => image.style.top")
    film.locator("input").focus()
    tab.keyboard.press("Home")
    assert film.locator("output").inner_text() == "Nothing is drawn yet." != told
    assert image.evaluate("(image) => image.style.top") == "0%" != before
    tab.keyboard.press("ArrowRight")
    first = {
        "raster": "Token 3 of 64, row 1",
        "masked": "Step 1 of 12.",
        "next_scale": "Scale 1 of",
    }
    assert film.locator("output").inner_text().startswith(first[FAMILIES[number]])


@pytest.mark.parametrize("number", range(3), ids=FAMILIES)
def test_a_picture_is_uploaded_painted_over_and_drawn_anew(tab, number):
    key = f"m{number}-edit"
    shown(tab, number, "Edit")
    upload(tab, key)
    paint(tab, key)
    tab.click(f"#{key}-draw")
    before, *edits = [
        tab.request.get(image.get_attribute("src")).body()
        for image in pictures(tab, f"{key}-gallery", 3)
    ]
    before, one, other = (np.asarray(Image.open(io.BytesIO(data))) for data in (before, *edits))
    changed = (one != before).any(-1)
    assert one.shape == (32, 32, 3) and 0 < changed.mean() < 0.6
    assert (one[~changed] == other[~changed]).mean() > 0.9  # what is kept, is kept in both


def test_pictures_are_those_of_the_command_with_the_same_seed(tab, runs, tmp_path):
    shown(tab, 0)
    tab.fill("#m0-draw-seed input", "7")
    tab.click("#m0-draw-class input")
    tab.keyboard.type("ring")
    tab.keyboard.press("Enter")
    tab.click("#m0-draw-draw")
    pictures(tab, "m0-draw-gallery", 4)
    assert tab.locator("#m0-draw-gallery").inner_text().split("\n")[0] == "ring 0"
    with tab.expect_download() as found:
        tab.click("#m0-draw-bundle")
    with zipfile.ZipFile(found.value.path()) as bundle:
        tokens_NLG = np.load(io.BytesIO(bundle.read("tokens.npy")))
    out, words = tmp_path / "out", ("--classes", "ring", "--number", 4, "--seed", 7)
    assert command_line.call("sample", runs / "generator", *words, "--out", out) == 0
    np.testing.assert_array_equal(tokens_NLG, np.load(out / "tokens.npy"))


def test_a_setting_says_that_it_departs_from_its_preset(tab):
    shown(tab, 0)
    tab.click("#m0-draw-settings button")
    number = tab.locator("#m0-draw-temperature input[type=number]")
    own = float(number.input_value())
    number.fill("1.3")
    number.press("Tab")
    tab.wait_for_selector(f"#m0-draw-note:has-text('temperature 1.3 (preset {own:g})')")
    assert f"● temperature (preset: {own:g})" in tab.locator("#m0-draw-temperature").inner_text()
    tab.click("#m0-draw-back")
    tab.wait_for_selector("#m0-draw-note:has-text('As the preset default has it')")
    assert float(number.input_value()) == own


def test_a_mistake_is_a_message_and_the_page_goes_on(tab):
    shown(tab, 0, "Edit")
    tab.click("#m0-edit-draw")
    toast = tab.locator(".toast-body").first
    toast.wait_for()
    assert "A picture is needed first" in toast.inner_text()
    assert "Traceback" not in tab.content()


def test_two_models_draw_side_by_side_on_the_same_seeds(tab):
    choose(tab, "Side by side")
    tab.click("#side-draw")
    for side in "ab":
        pictures(tab, f"side-gallery-{side}", 4)
    with tab.expect_response("**/run/predict*") as answer:  # the classes of those chosen
        tab.click("#side-model-b input")
        tab.keyboard.type("next_scale")
        tab.keyboard.press("Enter")
    assert answer.value.ok
    before = tab.locator("#side-gallery-b img").first.get_attribute("src")
    tab.click("#side-draw")
    until(lambda: tab.locator("#side-gallery-b img").first.get_attribute("src") != before)
    pictures(tab, "side-gallery-b", 4)


@pytest.mark.parametrize("tab", [PHONE, DESKTOP], ids=["phone", "desktop"], indirect=True)
def test_every_tab_fits_its_window_and_tokens_are_seen(tab):
    for number, names in enumerate([("Draw", "Edit", "Tokens")] * 3 + [("",)]):
        for name in names:
            shown(tab, number, name)
            fits(tab)
    upload(tab, "m3-tokens")
    pictures(tab, "m3-tokens-pair", 2)
    pictures(tab, "m3-tokens-maps", 1)
    tab.wait_for_selector("#m3-tokens-told:has-text('64 tokens')")
    numbers = tab.locator("#m3-tokens-numbers textarea")
    until(lambda: numbers.input_value().startswith("# 8 x 8"))
    fits(tab)
    choose(tab, "Side by side")
    fits(tab)
    shown(tab, 1, "Draw")
    tab.click("#m1-draw-draw")
    pictures(tab, "m1-draw-gallery", 4)
    fits(tab)
