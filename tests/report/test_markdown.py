"""The views: every number arrives, nulls come with their reason, verdicts follow from numbers."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from ampdeploy.report.markdown import render_markdown
from ampdeploy.report.result import Interval
from ampdeploy.report.rows import difference
from ampdeploy.report.terminal import summary_table
from ampdeploy.report.verdict import speed_verdict, verdicts
from tests.report.samples import (
    NO_METER,
    bare_report,
    engine_report,
    few_images,
    fidelity,
    sample_report,
    timing,
    whole_report,
    with_ratio,
)


def table_after(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, separators left out."""
    lines = iter(text.split(heading, 1)[1].splitlines())
    rows = []
    for line in lines:
        if line.startswith("|"):
            cells = line.replace("\\|", "\0").strip("|").split("|")
            rows.append([cell.strip().replace("\0", "|") for cell in cells])
        elif rows:
            break
    return [row for row in rows if not all(set(cell) <= set("-:") for cell in row)]


def test_first_table_is_the_comparison():
    rows = {row[0]: row[1:] for row in table_after(render_markdown(sample_report()), "# dinov2_s")}
    assert rows["Parameters"] == ["22.06 M", "16.54 M", "0.750"]
    assert rows["FLOPs per image"] == ["12.20 G", "9.15 G", "0.750"]
    assert rows["File size"] == ["88.3 MB", "66.2 MB", "0.750"]
    assert rows["Latency p50, batch 1"] == ["90 ms", "67.5 ms", "0.750 [0.741, 0.762]"]
    assert rows["Latency p50, batch 8"] == ["700 ms", "525 ms", "0.752 [0.740, 0.769]"]
    assert rows["Throughput, batch 8"] == ["11.4 img/s", "15.2 img/s", "1.330 [1.300, 1.360]"]
    assert rows["Device compute p50, batch 1"] == ["89 ms", "66.8 ms", "0.748 [0.740, 0.757]"]
    assert not any(name.startswith(("CUDA graph", "Energy")) for name in rows)
    assert rows["Peak memory, batch 8"] == ["240.0 MB", "180.0 MB", "0.750"]
    assert rows["Feature cosine, mean"][1] == "0.9871 [0.9831, 0.9891]"
    assert rows["Feature cosine, p1"][1] == "0.9512 [0.9472, 0.9532]"
    assert rows["Patch cosine, mean"][1] == "0.9755 [0.9715, 0.9775]"
    assert rows["Patch cosine, p1"][1] == "0.9123 [0.9083, 0.9143]"
    assert rows["Shared 5 neighbours"][1] == "83.0% [82.6%, 83.2%]"
    assert rows["Accuracy, knn_top1"] == ["57.0%", "56.5%", "-0.5 [-3.0, +2.0] pp"]


def test_verdict_and_table_are_on_the_first_screen_and_the_rest_is_folded():
    for report in (sample_report(), bare_report(), engine_report(), whole_report()):
        lines = render_markdown(report).splitlines()
        first_fold = lines.index("<details>")
        assert first_fold < 50
        assert lines[0] == f"# dinov2_s on {report.target}"
        assert f"- {verdicts(report)[0]}" in lines[:first_fold]
        assert "| | baseline | pruned | ratio [95% interval] |" in lines[:first_fold]
        depth = 0
        for before, line, after in zip(lines, lines[1:], [*lines[2:], ""], strict=False):
            depth += {"<details>": 1, "</details>": -1}.get(line, 0)
            assert depth in (0, 1)
            if line.startswith("<summary>"):
                # GitHub reads what follows as Markdown only after an empty line.
                assert (before, after) == ("<details>", "")
            if line.startswith("## "):
                assert depth == 1
        assert depth == 0


def test_text_of_others_cannot_become_markup():
    report = sample_report()
    evil = "</details><img src=x>"
    report = dataclasses.replace(
        report,
        weights=dataclasses.replace(report.weights, note=evil, source=evil),
        host={**report.host, "cpu": evil},
        why={**report.why, "engine": evil},
    )
    text = render_markdown(report)
    assert evil not in text
    assert text.count("&lt;/details>&lt;img src=x>") == 4


@pytest.mark.parametrize(
    ("low", "high", "begins"),
    [
        (1.1, 1.3, "Throughput rises"),
        (0.8, 0.9, "Throughput falls"),
        (0.9, 1.1, "No measurable change in throughput"),
    ],
)
def test_throughput_verdict(low, high, begins):
    ratio = {"1": Interval(value=(low + high) / 2, ci95_low=low, ci95_high=high)}
    found = verdicts(with_ratio(sample_report(), throughput=ratio))
    assert sum(sentence.startswith(begins) for sentence in found) == 1


def test_throughput_that_falls_at_another_batch_size_is_not_passed_over():
    rises = Interval(value=1.2, ci95_low=1.1, ci95_high=1.3)
    falls = Interval(value=0.95, ci95_low=0.93, ci95_high=0.98)
    found = verdicts(with_ratio(sample_report(), throughput={"1": falls, "8": rises}))
    assert sum("Throughput rises" in text for text in found) == 1
    assert any(text.startswith("Throughput falls: 0.950 [0.930, 0.980]") for text in found)


def test_what_stays_the_same_is_called_so():
    found = verdicts(with_ratio(sample_report(), memory=1.0002, energy=0.9997))
    assert "Peak memory is the same." in found
    assert "An image takes the same energy." in found


def test_a_difference_that_rounds_to_nothing_has_no_minus_sign():
    tiny = Interval(value=-0.0002, ci95_low=-0.007, ci95_high=0.007)
    assert difference(tiny) == "+0.0 [-0.7, +0.7] pp"


def test_energy_verdict_and_row():
    report = with_ratio(whole_report(), energy=0.8)
    assert "An image takes 20.0% less energy." in verdicts(report)
    rows = {row[0]: row[1:] for row in table_after(render_markdown(report), "# dinov2_s")}
    assert rows["Energy per image"] == ["0.5 J", "0.5 J", "0.800"]
    assert rows["CUDA graph p50, batch 8"][2] == "0.751 [0.739, 0.767]"
    assert "Energy of the pruned: a meter, 4000 images of batch 8 in 30.0 s at 40.0 W" in (
        render_markdown(report)
    )


def test_every_table_is_well_formed():
    for report in (sample_report(), bare_report(), engine_report(), whole_report()):
        text = render_markdown(report)
        lines = text.splitlines()
        blocks: list[list[str]] = [[]]
        for line in lines:
            if line.startswith("|"):
                blocks[-1].append(line.replace("\\|", ""))
            elif blocks[-1]:
                blocks.append([])
        for block in filter(None, blocks):
            assert len({line.count("|") for line in block}) == 1, block
            assert set(block[1]) <= set("|-:")
        assert "None" not in text


def test_everything_else_is_there():
    text = render_markdown(sample_report())
    assert table_after(text, "## What was removed")[1:] == [
        ["0", "1536", "1536", "100.0%"],
        ["1", "1536", "384", "25.0%"],
    ]
    assert table_after(text, "## Verification")[1] == [
        "model.onnx",
        "onnxruntime, CPU",
        "1, 2, 5",
        "5",
        "features",
        "1.50e-05",
        "1.000000",
    ]
    timed = [row[:4] for row in table_after(text, "## How it was measured")]
    assert timed[1] == ["Latency", "1", "baseline", "90 ms"]
    assert timed[8] == ["Device compute", "8", "pruned", "518 ms"]
    assert ["CPU", "Example CPU | 3 GHz"] in table_after(text, "## Host")
    assert ["total", "102.5"] in table_after(text, "## Time")
    expected = (
        "a" * 64,
        "b" * 64,
        "c" * 64,
        "Apache-2.0",
        "A note.",
        "<code>a/x.jpg</code>: cut",
        "numpy 2.4.6",
        "not distilled",
        "Warm-up 15 pairs in 3.2 s (settled), then 40 pairs in 20.3 s, over 5 loads of both files.",
        "Chance would share 2.0%",
        "310.0 MB (baseline) and 250.0 MB (pruned)",
        f"- {NO_METER}: <code>baseline.energy_j_per_image</code>, <code>baseline.energy</code>, ",
        "- 40 timed calls; p99 needs 500: <code>baseline.latency_ms\\[1\\].p99</code>, ",
        "Not measured: CUDA graph (it runs on the CPU); Energy (no energy meter on this machine).",
        "Throughput at batch 8: 2 batches in flight; the models take turns, 10 windows of 0.5 s",
        "40 samples in 41 s: power mode performance; throttled: never; other processes: 1.0%",
        "| cpu clock | 2900 MHz | 3000 MHz | 3100 MHz |",
        "| knn_top1 | DINOv2's k-NN: k = 20, temperature 0.07 | 256 | 420 | 30 | 3.3% |",
    )
    missing = [part for part in expected if part not in text]
    assert missing == []
    assert "tensorrt" not in text  # not installed, so not listed


def test_nulls_come_with_their_reason():
    text = render_markdown(bare_report())
    rows = {row[0]: row[1:] for row in table_after(text, "# dinov2_s")}
    assert rows["Latency"] == ["not measured", "not measured", "–"]
    assert rows["Fidelity"][1] == "not measured"
    assert "Latency was not measured: no reason but this test." in text
    assert "Not verified: no reason but this test." in text
    names = text.split("- no reason but this test: ")[1].split("\n")[0]
    for name in ("baseline.memory_bytes", "pruned.accuracy", "ratio.latency", "fidelity"):
        assert f"<code>{name}</code>" in names


def test_precision_and_engines_are_shown():
    text = render_markdown(engine_report())
    proof = table_after(text, "## Precision")
    assert proof[2] == [
        "pruned", "16", "39", "1", "3: residual, pointwise", "features", "0.999812", "0.999801",
    ]  # fmt: skip
    engines = table_after(text, "## Engines")
    assert engines[1][:5] == ["baseline", "trt-rtx 1.7.1.116", "8.6, 8.9", "1, 1, 8", "98.0%"]
    tested = table_after(text, "The pruned engine was run on 16 images")
    assert tested[1:] == [
        ["1", "features", "0.999701", "0.999601"],
        ["8", "features", "0.999702", "0.999602"],
    ]
    assert "with ort on the float32 graphs" in text
    assert "## Precision" not in render_markdown(sample_report())


def test_an_engine_that_was_not_tested_is_called_so():
    whole = engine_report().engine["pruned"]
    untested = dataclasses.replace(whole, test=None, why={"test": "no GPU here"})
    text = render_markdown(engine_report(engine={"baseline": whole, "pruned": untested}))
    assert "The pruned engine is not tested: no GPU here." in text
    assert "The baseline engine was run on 16 images" in text
    assert "- no GPU here: <code>engine\\[pruned\\].test</code>" in text


def test_batches_that_an_engine_does_not_take_are_named():
    text = render_markdown(engine_report(not_timed={"16": "the engine was built for 1 to 8"}))
    assert "- Batch 16 was asked for and not timed: the engine was built for 1 to 8." in text
    assert "not timed" not in render_markdown(engine_report())


def test_an_end_that_few_images_do_not_give_is_open_and_has_its_reason():
    text = render_markdown(sample_report(fidelity=few_images()))
    rows = {row[0]: row[1:] for row in table_after(text, "# dinov2_s")}
    assert rows["Feature cosine, p1"][1] == "0.9512 [–, 0.9532]"
    assert "1st-percentile feature cosine 0.951 [–, 0.953]" in text
    assert (
        "- 180 images; about 368 would give the lower end: "
        "<code>fidelity.intervals\\[cosine_p1\\].ci95_low</code>" in text
    )


def test_what_has_no_patches_or_no_interval_is_said():
    none = dict.fromkeys(("patch_cosine_mean", "patch_cosine_p1"))
    found = fidelity(**none, why=dict.fromkeys(none, "no patches"))
    why = dict.fromkeys(("ci95_low", "ci95_high"), "17 images; an interval needs 20")
    lost = Interval(value=0.9871, ci95_low=None, ci95_high=None, why=why)
    found = dataclasses.replace(found, intervals={**found.intervals, "cosine_mean": lost})
    text = render_markdown(sample_report(fidelity=found))
    rows = {row[0]: row[1:] for row in table_after(text, "# dinov2_s")}
    assert rows["Patch cosine, mean"][1] == "not measured"
    assert rows["Feature cosine, mean"][1] == "0.9871 (no interval)"


def test_tasks_that_were_left_out_are_named_with_their_reason():
    left_out = {"probe": "one class", "retrieval": "one class"}
    report = sample_report(tasks_left_out=left_out)
    text = render_markdown(report)
    assert "Energy (no energy meter on this machine); task probe, task retrieval (one class)." in (
        text
    )
    for task in left_out:
        assert f"- Task {task} was asked for and left out: one class." in text
    assert "left out" not in render_markdown(sample_report())
    out = io.StringIO()
    Console(file=out, width=140, force_terminal=False).print(summary_table(report))
    assert "task probe, task retrieval (one class)" in " ".join(out.getvalue().split())


def test_nothing_missing_is_said_too():
    assert "Nothing is missing." in render_markdown(whole_report())


@pytest.mark.parametrize(
    ("low", "value", "high", "begins"),
    [
        (0.74, 0.75, 0.76, "1.33× as fast at batch 8"),
        (0.97, 0.99, 1.01, "No measurable speed-up at batch 8"),
        (1.02, 1.1, 1.2, "Slower at batch 8"),
    ],
)
def test_speed_verdict(low, value, high, begins):
    sentence = speed_verdict("8", Interval(value=value, ci95_low=low, ci95_high=high)).text
    assert sentence.startswith(begins)
    assert f"{value:.3f} [{low:.3f}, {high:.3f}]" in sentence


def test_speed_that_nothing_bounds_on_one_side_is_not_established():
    for missing in ("ci95_low", "ci95_high"):
        ends = {"ci95_low": 0.4, "ci95_high": 0.6, missing: None}
        ratio = Interval(value=0.5, **ends, why={missing: "4 pairs only"})
        assert speed_verdict("1", ratio).text.startswith("Speed at batch 1 is not established")
        assert "4 pairs only" in speed_verdict("1", ratio).text


def test_speed_without_interval_is_not_established():
    why = dict.fromkeys(("ci95_low", "ci95_high"), "4 pairs only")
    ratio = Interval(value=0.5, ci95_low=None, ci95_high=None, why=why)
    assert speed_verdict("1", ratio).text.startswith("Speed at batch 1 is not established")
    assert "4 pairs only" in speed_verdict("1", ratio).text


def test_the_method_is_said_with_what_was_asked():
    text = render_markdown(sample_report())
    assert "Search <code>divergence</code> on loss of cosine, params_cut 0.25; " in text
    assert "repair <code>refit</code>;" in text
    published = dataclasses.replace(
        sample_report().method,
        search="amp",
        asked={"threshold": 0.005, "batch_size": 64, "inv_temperature": 20.0},
        criterion="entropy",
        repair="none",
    )
    text = render_markdown(sample_report(method=published))
    assert (
        "Search <code>amp</code> on entropy, threshold 0.005, batch_size 64, inv_temperature 20.0; "
        "repair <code>none</code>;" in text
    )


@pytest.mark.parametrize(
    ("p1", "epochs", "expected"),
    [
        (0.89, 0, "Not a drop-in replacement without distillation"),
        (0.89, 3, "even after 3 epochs of distillation"),
        (0.95, 0, "Close to the baseline, not equal to it"),
        (0.99, 0, "A candidate drop-in replacement"),
    ],
)
def test_fidelity_verdict(p1, epochs, expected):
    method = dataclasses.replace(sample_report().method, distill_epochs=epochs)
    found = verdicts(sample_report(fidelity=fidelity(cosine_p1=p1), method=method))
    assert sum(expected in sentence for sentence in found) == 1


@pytest.mark.parametrize(
    ("low", "high", "begins"),
    [
        (-0.03, 0.02, "No measurable change in accuracy"),
        (-0.03, -0.01, "Accuracy fell"),
        (0.01, 0.03, "Accuracy rose"),
    ],
)
def test_accuracy_verdict(low, high, begins):
    change = {"knn_top1": Interval(value=(low + high) / 2, ci95_low=low, ci95_high=high)}
    found = verdicts(with_ratio(sample_report(), accuracy_difference=change))
    assert sum(sentence.startswith(begins) for sentence in found) == 1


def test_metrics_that_changed_alike_share_a_sentence():
    lost = Interval(value=-0.02, ci95_low=-0.03, ci95_high=-0.01)
    same = Interval(value=-0.01, ci95_low=-0.03, ci95_high=0.01)
    changes = {"a": lost, "b": same, "c": lost}
    found = verdicts(with_ratio(sample_report(), accuracy_difference=changes))
    assert "Accuracy fell: a -2.0 [-3.0, -1.0] pp; c -2.0 [-3.0, -1.0] pp." in found
    assert "No measurable change in accuracy: b -1.0 [-3.0, +1.0] pp." in found


def test_unknown_telemetry_is_called_unknown():
    seen = dataclasses.replace(
        sample_report().telemetry,
        power_mode=None,
        throttled=None,
        other_load=None,
        why=dict.fromkeys(("power_mode", "throttled", "other_load"), "a VM"),
    )
    text = render_markdown(sample_report(telemetry=seen))
    assert (
        "mode unknown (a VM); throttled: unknown (a VM); other processes: unknown (a VM)." in text
    )


def test_size_and_memory_verdicts():
    found = verdicts(sample_report())
    assert found[0] == "25.0% fewer parameters, 25.0% fewer FLOPs, 25.0% smaller file."
    assert "Peak memory is 25.0% smaller." in found
    assert "The pruned model is not smaller: nothing was removed." in verdicts(bare_report())
    larger = verdicts(with_ratio(sample_report(), memory=1.1))
    assert "Peak memory is 10.0% larger." in larger


def test_cautions():
    assert not any(sentence.startswith("Caution") for sentence in verdicts(sample_report()))
    report = sample_report(
        timing={"1": timing(warmup_stable=False), "8": timing(capped=True, pairs=3)},
        fidelity=fidelity(images=32),
        telemetry=dataclasses.replace(
            sample_report().telemetry, throttled=("SW power cap",), other_load=0.4
        ),
    )
    cautions = [sentence for sentence in verdicts(report) if sentence.startswith("Caution")]
    assert len(cautions) == 5
    assert "lowered while latency was measured (SW power cap)" in cautions[3]
    assert "other processes took 40.0%" in cautions[4]
    assert "had not settled" in cautions[0]
    assert "after 3 pairs" in cautions[1]
    assert "32 images" in cautions[2]


def test_summary_table_shows_intervals_in_brackets():
    out = io.StringIO()
    Console(file=out, width=140, force_terminal=False).print(summary_table(sample_report()))
    text = out.getvalue()
    assert "0.750 [0.741, 0.762]" in text
    assert "ratio [95% interval]" in text
    assert "dinov2_s on ort" in text
    assert "Not measured: CUDA graph (it runs on the CPU)" in text
