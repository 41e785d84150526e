"""Text of others stays text, in whatever place of the Markdown it lands."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from markdown_it import MarkdownIt

from ampdeploy.report.compare import compare
from ampdeploy.report.compare import render_markdown as render_comparison
from ampdeploy.report.escape import markdown_text
from ampdeploy.report.markdown import render_markdown
from ampdeploy.report.result import Report
from tests.report.samples import engine_report, sample_report

HOSTILE = (
    "![x](http://e.example/p.png)",
    "a`b](http://e.example) `c",
    "[x](http://e.example)",
    "[x]: http://e.example",
    "[x]",
    "<img src=x onerror=y>",
    "&lt;img&gt; &copy;",
    "</details><script>",
    "a|b|c",
    "*a* **b** _c_ __d__ ~~e~~",
    "one\n\n# two\n- three\r\n| four |\u2028five",
    "# heading",
    "- item",
    "1. item",
    "> quote",
    "---",
    "    code",
    "back\\slash\\",
    "\\`x\\`",
    "\\<b>",
    "0 [1, 2](http://e.example)",
    "0 [–, 2%](http://e.example)",
    "0 [–, 2%]: http://e.example",
    "[1, 2]",
)


def rendered(text: str) -> str:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)


def shown(html: str) -> str:
    """What a browser shows of HTML without entities but these."""
    text = re.sub(r"<[^>]*>", "", html)
    for entity, sign in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        text = text.replace(entity, sign)
    return text


@pytest.mark.parametrize("text", HOSTILE)
def test_it_is_shown_as_it_is_written(text):
    expected = " ".join(text.split())
    for before, html in (("", "<p>{}</p>"), ("- ", "<ul>\n<li>{}</li>\n</ul>")):
        found = rendered(before + markdown_text(text))
        begin, end = html.split("{}")
        assert found.startswith(begin)
        assert found.endswith(end + "\n")
        inner = found[len(begin) : -len(end) - 1]
        assert "<" not in inner
        assert shown(inner) == expected


def test_nobody_is_called_and_no_issue_is_linked():
    assert "@team" not in markdown_text("@team a@b.example")
    assert "#12" not in markdown_text("owner/name#12")


def test_signs_that_hide_what_is_written_are_not_kept():
    assert markdown_text("a\x1b[31m\u202egpj.exe\x00") == "a\ufffd\\[31m\ufffdgpj.exe\ufffd"


@pytest.mark.parametrize(
    "text",
    [
        "knn_top1",
        "0.750 [0.741, 0.762]",
        "-0.5 [-3.0, +2.0] pp",
        "0.9512 [–, 0.9532]",
        "64.4% [59.1%, 69.4%]",
    ],
)
def test_what_needs_no_escape_stays_readable(text):
    assert markdown_text(text) == text


EVIL = "![x](http://e.example)<img src=x>`@name`\n# y"


def everything_hostile() -> Report:
    """Every text of a report, and every name that is not the tool's own, is hostile."""
    data = json.loads(engine_report(tasks_left_out={"probe": "one class"}).to_json())
    kept = {"baseline", "pruned", "why"}

    def spoil(value, key=""):
        if isinstance(value, str):
            return f"{value}{EVIL}"
        if isinstance(value, list):
            return [spoil(item) for item in value]
        if not isinstance(value, dict):
            return value
        named = key in (
            "skipped",
            "packages",
            "tasks",
            "tasks_left_out",
            "accuracy",
            "accuracy_difference",
            "islands",
            "max_abs_diff",
            "min_cosine",
            "clocks_mhz",
            "stages_seconds",
            "asked",
            "cosine_min",
            "cosine_p1",
            "features",
        )
        return {
            f"{name}{EVIL}" if named and not name.isdigit() else name: spoil(
                item, "" if key == "intervals" else name
            )
            for name, item in value.items()
        }

    assert kept <= data.keys()
    spoiled = spoil(data)
    for name in ("1", "8"):  # outputs of each batch size
        for test in (engine["test"] for engine in spoiled["engine"].values()):
            for part in ("cosine_p1", "cosine_min"):
                test[part][name] = {f"{key}{EVIL}": v for key, v in test[part][name].items()}
    return Report.from_json(json.dumps(spoiled))


def test_no_text_of_a_report_becomes_markup():
    report = everything_hostile()
    other = dataclasses.replace(sample_report(), threads=4, model=f"y{EVIL}")
    for text in (render_markdown(report), render_comparison(compare({EVIL: report, "b": other}))):
        assert text.count("e.example") > 10
        assert "@name" not in text
        found = rendered(text)
        assert not re.search(r"<(img|a|h1>y|script)\b", found)
        allowed = {
            "code",
            "details",
            "summary",
            "sub",
            "i",
            "p",
            "ul",
            "li",
            "h1",
            "h2",
            "strong",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
        }
        assert set(re.findall(r"<([a-z0-9]+)", found)) <= allowed
        assert len(re.findall(r"<h1", found)) == 1
