"""report.html in a real browser: desktop and phone, light and dark, and on paper.

Needs Chromium or Chrome (``apt-get install chromium``) and the package playwright, which drives
it; playwright's own browser download is not used.
"""

from __future__ import annotations

import dataclasses
import os
import shutil

import pytest

from ampdeploy.report.compare import compare
from ampdeploy.report.compare import render_html as render_comparison
from ampdeploy.report.html import render_html
from ampdeploy.report.result import BlockWidth
from tests.report.samples import bare_report, engine_report, sample_report, whole_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless",
    "--no-sandbox",  # tests run as root in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# DINOv2-giant has the most blocks.
WIDE = sample_report(
    method=dataclasses.replace(
        sample_report().method,
        widths=tuple(BlockWidth(block=i, hidden=4096, kept=4096 - 64 * i) for i in range(40)),
    )
)
PAGES = {
    "report": render_html(WIDE),
    "engine": render_html(engine_report()),
    "bare": render_html(bare_report()),
    "whole": render_html(whole_report()),
    "comparison": render_comparison(
        compare(
            {
                "a-rather-long-name-of-a-run": sample_report(),
                "b": whole_report(),
                "c": sample_report(threads=8),
                "d": bare_report(),
            }
        )
    ),
}
SCREENS = {"desktop": (1280, 800), "phone": (390, 844), "small phone": (320, 568)}


def find_browser() -> str | None:
    """$CHROMIUM, or the first browser of Chromium's family on the path."""
    given = os.environ.get("CHROMIUM")
    if given:
        assert os.access(given, os.X_OK), f"CHROMIUM={given} is no program"
        return given
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="module")
def browser():
    path = find_browser()
    if path is None:
        pytest.skip(f"no browser: CHROMIUM is not set, and none of {', '.join(BROWSERS)} is here")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """A page that was opened, and what happened meanwhile."""

    def __init__(self, browser, file, size, scheme):
        self.context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme
        )
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.failed: list[str] = []
        self.page.on("requestfailed", lambda request: self.failed.append(request.url))
        self.page.goto(file.as_uri())


@pytest.fixture
def visit(browser, tmp_path):
    visits = []

    def open_page(name, size=SCREENS["desktop"], scheme="light", text=None):
        file = tmp_path / "report.html"
        file.write_text(text or PAGES[name], encoding="utf-8")
        visits.append(Visit(browser, file, size, scheme))
        return visits[-1], file

    yield open_page
    for one in visits:
        one.context.close()


LAYOUT = """() => ({
  page: document.documentElement.scrollWidth,
  screen: document.documentElement.clientWidth,
  charts: [...document.querySelectorAll('svg')].map(svg => {
    const box = svg.getBoundingClientRect();
    // Text and shapes that reach out of their image are cut off.
    const out = [...svg.querySelectorAll('text, circle, rect, path, line')].filter(e => {
      const b = e.getBoundingClientRect();
      return b.left < box.left - 1 || b.right > box.right + 1
          || b.top < box.top - 1 || b.bottom > box.bottom + 1;
    }).map(e => e.outerHTML);
    return {width: box.width, height: box.height, left: box.left, right: box.right, out};
  }),
  small: [...document.querySelectorAll('svg text')].filter(
    e => e.getBoundingClientRect().height < 7).length,
})"""

# Contrast of every text to what is behind it (WCAG 2.2, 1.4.3), of every shape (1.4.11).
CONTRAST = """() => {
  const rgb = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => {
    const [r, g, b] = c.slice(0, 3).map(v => {
      v /= 255;
      return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const found = {texts: [], shapes: []};
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || e.closest('title, desc')) continue;
    const style = getComputedStyle(e);
    const colour = e instanceof SVGElement ? style.fill : style.color;
    found.texts.push([ratio(rgb(colour), behind(e)), e.textContent.trim().slice(0, 40)]);
  }
  for (const e of document.querySelectorAll('svg .baseline, svg .pruned, svg .bar')) {
    const style = getComputedStyle(e);
    const colour = style.fill === 'none' || e.matches('.hollow') ? style.stroke : style.fill;
    found.shapes.push([ratio(rgb(colour), behind(e)), e.outerHTML.slice(0, 60)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", PAGES)
def test_it_renders(visit, name, screen, scheme):
    seen, file = visit(name, SCREENS[screen], scheme)
    assert seen.said == []
    assert seen.requests == [file.as_uri()]
    layout = seen.page.evaluate(LAYOUT)
    assert layout["page"] == layout["screen"], "the page scrolls sideways"
    assert len(layout["charts"]) == PAGES[name].count("<svg")
    assert layout["charts"]
    for chart in layout["charts"]:
        assert chart["width"] > 240
        assert chart["height"] > 30
        assert chart["left"] >= 0
        assert chart["right"] <= layout["screen"]
        assert chart["out"] == []
    assert layout["small"] == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_contrast_is_enough(visit, name, scheme):
    seen, _ = visit(name, scheme=scheme)
    found = seen.page.evaluate(CONTRAST)
    assert len(found["texts"]) > 100
    assert len(found["shapes"]) > 5
    assert [text for text in found["texts"] if text[0] < 4.5] == []
    assert [shape for shape in found["shapes"] if shape[0] < 3] == []


def test_it_follows_the_colour_scheme(visit):
    colours = {}
    for scheme in ("light", "dark"):
        seen, _ = visit("report", scheme=scheme)
        colours[scheme] = seen.page.evaluate(
            "[document.body, document.querySelector('svg .bar')].map("
            "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).fill])"
        )
    assert colours["light"][0][0] == "rgb(255, 255, 255)"
    assert colours["dark"][0][0] != "rgb(255, 255, 255)"
    assert colours["light"][1][1] != colours["dark"][1][1]


def test_paper_is_white_and_shows_everything(visit):
    seen, _ = visit("report", scheme="dark")
    seen.page.emulate_media(media="print")
    white = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert white == "rgb(255, 255, 255)"
    assert seen.page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    breaks = seen.page.evaluate(
        "[...document.querySelectorAll('figure')].map(e => getComputedStyle(e).breakInside)"
    )
    assert set(breaks) == {"avoid"}
    # A4 without its margins, at 96 dpi: nothing is wider than the paper.
    seen.page.set_viewport_size({"width": 688, "height": 1000})
    over = seen.page.evaluate(
        "[...document.querySelectorAll('table, svg')].filter("
        "e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 99))"
    )
    assert over == []
    assert seen.page.pdf(format="A4").startswith(b"%PDF")


def test_the_policy_holds_even_if_something_gets_in(visit):
    """The page has no such content; the policy is what stops it if a report brought any."""
    evil = '<script>document.title = "owned"</script><img src="https://example.invalid/x.png">'
    text = PAGES["report"].replace("</body>", f"{evil}</body>")
    seen, file = visit("report", text=text)
    assert seen.page.title() == "dinov2_s on ort"
    # The browser announces the image and then refuses to fetch it.
    assert set(seen.requests) - set(seen.failed) == {file.as_uri()}
    assert len(seen.said) == 2
    assert all("Content Security Policy" in line for line in seen.said)


def test_tables_scroll_in_their_box_by_keyboard(visit):
    seen, _ = visit("comparison", SCREENS["phone"])
    box = seen.page.locator(".box").first
    assert box.evaluate("e => e.scrollWidth > e.clientWidth")
    box.focus()
    seen.page.keyboard.press("ArrowRight")
    seen.page.wait_for_timeout(500)  # scrolling is smooth
    assert box.evaluate("e => e.scrollLeft") > 0
