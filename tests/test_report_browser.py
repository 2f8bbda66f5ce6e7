"""The report in a real browser: it draws, it moves, it asks for nothing."""

import base64
import importlib.util
import io
import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.report.write import report

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
WIDTHS = (360, 900, 1400)
LOSSES = {step: 1 / math.sqrt(step) for step in range(10, 510, 10)}
"""The loss that the run's log is made to have, at each step."""


def why_not(markers):
    """Why there is no browser here; None where there is."""
    if "browser" not in markers:
        return "run by scripts/test_browser.sh, or with -m browser"
    if importlib.util.find_spec("selenium") is None:
        return "needs selenium: pip install 'ddpm-jax[browser]'"
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"needs {program}, for example of Debian: apt-get install chromium-driver"
    return None


@pytest.fixture(scope="module")
def browser(request, tmp_path_factory):
    """Chromium without a window, all of whose requests and messages are logged."""
    reason = why_not(request.config.option.markexpr)
    if reason:
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = Service(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as driver:
        driver.set_page_load_timeout(300)
        yield driver


@pytest.fixture(scope="module")
def file(browser, run, tmp_path_factory):
    """The page of two runs, one of them with a longer log and more grids."""
    folder = tmp_path_factory.mktemp("browser")
    other = shutil.copytree(run, folder / "other")
    logged = [json.dumps({"step": step, "loss": loss}) for step, loss in LOSSES.items()]
    (other / "metrics.jsonl").write_text("\n".join(logged) + "\n")
    for step in (100, 200):
        Image.new("L", (60, 60), step).save(other / "samples" / f"{step:08d}.png")
    return report([str(run), str(other)], folder / "page.html")


@pytest.fixture
def page(browser, file):
    """The page, freshly opened at a desktop's width."""
    show(browser, file)
    return browser


def show(browser, file, width=1200, scheme="light"):
    """Opens the page; empties the logs before."""
    browser.get_log("performance")
    browser.get_log("browser")
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(f"file://{file}")


def find(page, name):
    return page.find_element("id", name)


def pressed(page, name, *keys):
    """Presses keys on the element, as somebody without a mouse does."""
    for key in keys:
        find(page, name).send_keys(key)


def value(page, expression):
    return page.execute_script(f"return {expression}")


def chart(page, name="chart-loss"):
    return f"report.charts.get('{name}').plot"


def until(page, condition):
    """Waits for what the browser does in its own time."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(page, 60).until(lambda _: condition())


def screen(page):
    """What is seen, as [H,W,3]."""
    content = page.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_says_nothing_asks_for_nothing_and_fits(browser, file, width, scheme):
    show(browser, file, width, scheme)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [f"file://{file}"]
    assert value(browser, "document.documentElement.scrollWidth") <= width
    assert value(browser, "performance.getEntriesByType('resource').length") == 0
    sizes = value(
        browser,
        "[...document.querySelectorAll('.plot')].map(e => [e.clientWidth, "
        "e.querySelector('canvas').clientWidth])",
    )
    assert sizes and all(canvas <= place <= width for place, canvas in sizes)
    assert all(value(browser, "[...document.images].map(i => i.complete && i.naturalWidth > 0)"))
    is_dark = screen(browser)[2, 2].mean() < 100
    assert is_dark == (scheme == "dark")


def test_curves_hold_the_runs_numbers_and_are_drawn(page):
    x, first, second = value(page, f"{chart(page)}.data.map(each => [...each])")
    assert dict(zip(x, second, strict=True)) == {
        2: None,
        **{step: pytest.approx(loss, rel=1e-5) for step, loss in LOSSES.items()},
    }
    assert [each is not None for each in first] == [step == 2 for step in x]
    painted = """
    const canvas = document.querySelector('#chart-loss canvas');
    const bytes = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    const seen = new Set();
    for (let i = 0; i < bytes.length; i += 4) seen.add(bytes.slice(i, i + 3).join());
    return seen.has('194,65,12');"""
    assert page.execute_script(painted)  # --run-1


def test_the_slider_of_training_steps_turns_the_grids(page):
    from selenium.webdriver.common.keys import Keys

    moving = value(page, "document.getElementById('grids-range').max")
    assert moving == "2"
    seen = [find(page, "grids-1").get_attribute("src")]
    for step in (100, 2):
        pressed(page, "grids-range", Keys.ARROW_LEFT)
        assert find(page, "grids-position").text == f"step {step}"
        assert find(page, "grids-range").get_attribute("aria-valuetext") == f"step {step}"
        assert f"after {step} training steps" in find(page, "grids-1").get_attribute("alt")
        seen.append(find(page, "grids-1").get_attribute("src"))
    assert len(set(seen)) == 3
    pressed(page, "grids-range", Keys.END)
    assert find(page, "grids-1").get_attribute("src") == seen[0]


def test_the_slider_of_t_turns_both_pictures_of_each_run(page):
    from selenium.webdriver.common.keys import Keys

    names = [f"chain-0-{i}" for i in range(4)]
    images = [find(page, name).get_attribute("src") for name in names]
    pressed(page, "chain-0-range", Keys.HOME)
    noise = [find(page, name).get_attribute("src") for name in names]
    assert all(a != b for a, b in zip(images, noise, strict=True))
    assert find(page, "chain-0-position").text == "t = 10 of 10, pure noise"
    find(page, "chain-0-play").click()
    until(page, lambda: find(page, "chain-0-position").text == "t = 0, the image")
    until(page, lambda: find(page, "chain-0-play").text == "Play")
    assert [find(page, name).get_attribute("src") for name in names] == images


def test_dragging_zooms_into_all_training_curves(page):
    from selenium.webdriver.common.action_chains import ActionChains

    over = page.find_element("css selector", "#chart-loss .u-over")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", over)
    width = over.size["width"]
    whole = value(page, f"[{chart(page)}.scales.x.min, {chart(page)}.scales.x.max]")
    assert whole == [2, 500]
    drag = ActionChains(page).move_to_element_with_offset(over, -width // 4, 0).click_and_hold()
    drag.move_by_offset(width // 2, 0).release().perform()
    until(page, lambda: find(page, "from-step").get_attribute("value") != "0")
    low, high = value(page, f"[{chart(page)}.scales.x.min, {chart(page)}.scales.x.max]")
    assert 100 < low < 150 and 350 < high < 400
    other = chart(page, "chart-grad_norm")
    assert value(page, f"[{other}.scales.x.min, {other}.scales.x.max]") == [low, high]
    assert find(page, "to-step").get_attribute("value") == str(round(high))
    ActionChains(page).double_click(over).perform()
    until(page, lambda: value(page, f"{other}.scales.x.max") == 500)
    assert value(page, f"[{chart(page)}.scales.x.min, {chart(page)}.scales.x.max]") == whole


def test_steps_can_be_typed_and_taken_back(page):
    from selenium.webdriver.common.keys import Keys

    find(page, "from-step").clear()
    pressed(page, "from-step", "200", Keys.TAB)
    until(page, lambda: value(page, f"{chart(page)}.scales.x.min") == 200)
    pressed(page, "whole-run", Keys.ENTER)
    until(page, lambda: value(page, f"{chart(page)}.scales.x.min") == 2)


def test_values_stand_below_the_pointer(page):
    from selenium.webdriver.common.action_chains import ActionChains

    over = page.find_element("css selector", "#chart-loss .u-over")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", over)
    ActionChains(page).move_to_element(over).perform()
    until(page, lambda: value(page, f"{chart(page)}.cursor.idx") is not None)
    legend = page.find_element("css selector", "#chart-loss .u-legend")
    values = [each.text for each in legend.find_elements("css selector", ".u-value")]
    step, other, loss = values
    assert other == "\u2013"  # That run has no such step.
    assert float(loss) == pytest.approx(LOSSES[int(step)], rel=1e-4)


def test_the_smoothing_slider_averages(page):
    from selenium.webdriver.common.keys import Keys

    pressed(page, "smoothing", *[Keys.ARROW_RIGHT] * 25)
    assert find(page, "smoothing-value").text == "0.50"
    raw, smooth = value(page, f"{chart(page)}.data.slice(-2).map(each => [...each])")
    weights = 0.5 ** np.arange(len(LOSSES))
    losses = list(LOSSES.values())
    expected = [
        np.average(losses[: i + 1], weights=weights[: i + 1][::-1]) for i in range(len(losses))
    ]
    known = [(a, b) for a, b in zip(raw, smooth, strict=True) if a is not None]
    np.testing.assert_allclose([a for a, _ in known], losses, rtol=1e-5)
    np.testing.assert_allclose([b for _, b in known], expected, rtol=1e-5)


def test_the_logarithmic_switch(page):
    from selenium.webdriver.common.keys import Keys

    pressed(page, "logarithmic", Keys.SPACE)
    assert value(page, f"{chart(page)}.scales.y.distr") == 3
    assert value(page, f"{chart(page, 'chart-holdout_gap')}.scales.y.distr") == 1


def test_colours_follow_the_readers_wish_at_once(page):
    before = value(page, f"{chart(page)}.series[1].stroke()")
    feature = {"name": "prefers-color-scheme", "value": "dark"}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    until(page, lambda: value(page, f"{chart(page)}.series[1].stroke()") != before)


def test_curves_follow_the_width_of_the_window(page):
    size = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    until(page, lambda: value(page, f"{chart(page)}.width") < 400)
    assert value(page, "document.documentElement.scrollWidth") <= 400


def test_the_nearest_images_are_larger_where_there_is_room(browser, run, tmp_path):
    one = report([str(run)], tmp_path / "one.html")
    widths = {}
    scrolls = {}
    for width in (360, 1400):
        show(browser, one, width)
        widths[width] = value(browser, "document.querySelector('.near img').clientWidth")
        box = "document.querySelector('#neighbours .scroll')"
        scrolls[width] = value(browser, f"{box}.scrollWidth > {box}.clientWidth")
    assert widths == {360: 96, 1400: 120}
    assert scrolls == {360: True, 1400: False}


def test_every_control_is_reached_by_the_keyboard(page):
    names = value(
        page,
        "[...document.querySelectorAll('input, button, summary, a, .scroll')]"
        ".filter(e => e.tabIndex < 0).map(e => e.outerHTML)",
    )
    assert names == []


def test_it_prints(page):
    content = page.execute_cdp_cmd("Page.printToPDF", {})["data"]
    assert base64.b64decode(content).startswith(b"%PDF")
    assert page.get_log("browser") == []
