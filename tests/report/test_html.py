"""report.html: complete, well formed, loads nothing; charts draw what the report says."""

from __future__ import annotations

import dataclasses
import itertools
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from ampdeploy.report import charts
from ampdeploy.report.html import render_html, tiles
from ampdeploy.report.result import BlockWidth, Interval, LatencyStats, unmeasured
from ampdeploy.report.rows import comparison_rows
from ampdeploy.report.svg import Scale, linear_ticks
from ampdeploy.report.verdict import judgements, verdicts
from tests.report.samples import (
    bare_report,
    engine_report,
    few_images,
    fidelity,
    sample_report,
    stats,
    whole_report,
    with_ratio,
)

ALL = [sample_report(), engine_report(), bare_report(), whole_report()]
NAMES = ["full", "engine", "bare", "whole"]
VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """What a page holds; refuses tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module", params=ALL, ids=NAMES)
def report(request):
    return request.param


@pytest.fixture(scope="module")
def page(report):
    return Page(render_html(report))


def test_it_loads_nothing(report, page):
    text = render_html(report)
    policy = page.of("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"].startswith("default-src 'none'; style-src 'unsafe-inline';")
    assert not {"script", "iframe", "img", "object"} & {tag for tag, _ in page.tags}
    links = [a["href"] for tag, a in page.tags if "href" in a]
    assert links
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert not re.search(r"https?:|url\(|@import", text)
    assert not any(name.startswith("on") or name == "src" for _, a in page.tags for name in a)


def test_links_and_labels_point_at_something(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids
        for name in (attributes.get("aria-labelledby") or "").split():
            assert name in ids


def test_headings_are_in_order_and_cells_have_scope(page):
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(a.get("scope") in ("row", "col") for a in page.of("th"))
    assert len(page.of("caption")) == len(page.of("table"))
    assert all(a.get("role") == "img" and a.get("aria-labelledby") for a in page.of("svg"))


def test_everything_is_there(report, page):
    text = " ".join(" ".join(page.text).split())
    for sentence in verdicts(report):
        assert sentence in text
    for row in comparison_rows(report):
        assert {row.what, row.baseline, row.pruned, row.ratio} <= set(page.text)
    for name, reason in unmeasured(report):
        assert name in page.text
        assert reason in text
    assert report.weights.sha256 in text
    assert "None" not in text


def test_text_of_others_cannot_become_markup():
    evil = "<script>alert(1)</script>"
    report = dataclasses.replace(
        sample_report(),
        model=evil,
        stages_seconds={evil: 1.0},
        host={**sample_report().host, "cpu": evil},
    )
    page = Page(render_html(report))
    assert page.of("script") == []
    assert evil in "".join(page.text)


def test_tiles_follow_the_numbers():
    found = {tile.what: tile for tile in tiles(sample_report())}
    assert found["Speed, batch 1"].number == "1.33×"
    assert found["Speed, batch 1"].tone == "good"
    assert "0.750 [0.741, 0.762]; 90 ms → 67.5 ms" in found["Speed, batch 1"].detail
    assert found["Parameters"].number == "−25.0%"
    assert found["Feature cosine, p1"].number == "0.951"
    assert found["Feature cosine, p1"].detail == (
        "0.951 [0.947, 0.953]; mean 0.987 [0.983, 0.989], smallest 0.933; 256 images"
    )
    assert found["Accuracy, knn_top1"].number == "−0.5 pp"
    assert found["Accuracy, knn_top1"].tone == "neutral"
    assert found["Accuracy, knn_top1"].detail.startswith("not established: -0.5 [-3.0, +2.0] pp")
    assert "Energy per image" not in found
    assert "Energy per image" in {tile.what for tile in tiles(whole_report())}
    bare = {tile.what: tile for tile in tiles(bare_report())}
    assert bare["Latency"].detail == "not measured: no reason but this test"


@pytest.mark.parametrize(("p1", "tone"), [(0.8, "bad"), (0.95, "neutral"), (0.99, "good")])
def test_tile_and_verdict_agree_on_fidelity(p1, tone):
    report = sample_report(fidelity=fidelity(cosine_p1=p1))
    assert next(t for t in tiles(report) if t.what == "Feature cosine, p1").tone == tone
    assert next(j for j in judgements(report) if "feature cosine" in j.text).tone == tone


def test_fidelity_is_shown_with_its_intervals_and_tasks_left_out_with_their_reason():
    report = sample_report(fidelity=few_images(), tasks_left_out={"probe": "one class"})
    page = Page(render_html(report))
    for cell in ("0.9871 [0.9831, 0.9891]", "0.9512 [–, 0.9532]", "0.9123 [0.9083, 0.9143]"):
        assert page.text.count(cell) == 2  # in the comparison, and in its own section
    text = " ".join(" ".join(page.text).split())
    assert "83.0% [82.6%, 83.2%] of each image's 5 nearest neighbours" in text
    assert "180 images; about 368 would give the lower end" in text
    assert "Task probe was asked for and left out: one class." in text
    assert "task probe (one class)." in text


def test_only_whole_intervals_are_drawn_in_the_chart_of_fidelity():
    assert len(shapes(charts.fidelity_chart(sample_report()), "whisker")) == 2
    few = sample_report(fidelity=few_images())
    assert len(shapes(charts.fidelity_chart(few), "whisker")) == 1


def shapes(chart, css):
    """The shapes of a chart with a class, as XML elements."""
    root = ElementTree.fromstring(chart.svg)
    return [element for element in root.iter() if css in (element.get("class") or "").split()]


def test_latency_curves_reach_from_the_shortest_to_the_longest_call():
    before, after = stats(100.0), stats(70.0)
    chart = charts.latency_chart("x", "Latency", before, after)
    slow, fast = (
        [float(n) for n in re.findall(r"[\d.]+", shapes(chart, role)[0].get("d"))]
        for role in ("baseline", "pruned")
    )
    assert len(slow) == len(fast) == 2 * 21
    # Higher share of calls is further up; a slower model is further right.
    assert slow[1::2] == sorted(slow[1::2], reverse=True)
    assert slow[0::2] == sorted(slow[0::2])
    assert all(a > b for a, b in zip(slow[0::2], fast[0::2], strict=True))
    assert "logarithmic" not in chart.svg
    # One call that took 50 times as long is drawn, too.
    outlier = dataclasses.replace(before, max=5000.0, quantiles=(*before.quantiles[:-1], 5000.0))
    assert "logarithmic" in charts.latency_chart("x", "Latency", outlier, after).svg


def test_calls_that_all_took_the_same_time_can_be_drawn():
    same = LatencyStats(
        p50=5.0, p90=5.0, p99=5.0, mean=5.0, min=5.0, max=5.0, n=600, quantiles=(5.0,) * 21
    )
    assert "nan" not in charts.latency_chart("x", "Latency", same, same).svg


def test_ratio_marks_are_hollow_where_nothing_is_established():
    nothing = {"1": Interval(value=0.99, ci95_low=0.97, ci95_high=1.01)}
    chart = charts.ratio_chart(with_ratio(sample_report(), latency=nothing))
    assert len(shapes(chart, "hollow")) == 1
    assert len(shapes(charts.ratio_chart(sample_report()), "hollow")) == 0


def test_widths_are_drawn_to_scale():
    widths = [BlockWidth(block=i, hidden=4096, kept=1024 * (1 + i % 4)) for i in range(40)]
    chart = charts.width_chart(widths)
    kept = [float(r.get("height")) for r in shapes(chart, "pruned")][:40]
    whole = [float(r.get("height")) for r in shapes(chart, "removed")][:40]
    for width, left, all_ in zip(widths, kept, whole, strict=True):
        assert left / all_ == pytest.approx(width.kept / width.hidden, abs=0.01)
    assert "block 39: 4096 of 4096 (100.0%)" in chart.svg


def test_names_in_a_chart_do_not_cover_each_other():
    points = [charts.Point(name=f"run {i}", x=0.7, y=0.9) for i in range(4)]
    points.append(charts.Point(name="baseline", x=1.0, y=1.0, baseline=True))
    chart = charts.size_chart("x", "Fidelity", "cosine", points, joined=True)
    root = ElementTree.fromstring(chart.svg)
    labels = [e for e in root.iter("text") if (e.text or "").startswith("run ")]
    names = sorted(float(label.get("y")) for label in labels)
    assert len(names) == 4
    assert all(b - a >= 11 for a, b in itertools.pairwise(names))


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (41.3, 78.9), (0.001, 0.0013), (-1.0, 1.0), (3e3, 9e4)]
)
def test_ticks_are_round_and_inside(low, high):
    ticks = linear_ticks(low, high, 6)
    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert all(len(f"{tick:g}".lstrip("-").replace(".", "").strip("0")) <= 3 for tick in ticks)


def test_a_logarithmic_scale_is_even_in_ratios():
    scale = Scale(0.5, 2.0, 0.0, 100.0, log=True)
    assert scale(1.0) == pytest.approx(50.0)
    assert 1.0 in scale.ticks()
