"""What the numbers of a report amount to, in sentences. Every claim follows from a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ampdeploy.report.result import Interval, Report
from ampdeploy.report.rows import (
    batch_keys,
    difference,
    fidelity_interval,
    interval,
    percent,
    times,
)

# Below this first-percentile cosine, some images get features that downstream heads have not seen.
DROP_IN_P1 = 0.98
UNUSABLE_P1 = 0.9
# The first percentile of fewer images is little more than their minimum.
IMAGES_FOR_P1 = 100


# Others' share of the machine from which its times are not those of an idle one.
BUSY = 0.1

SAME = 0.0005  # of a ratio without an interval: it would be shown as a change of 0.0%

Tone = Literal["good", "bad", "neutral", "caution"]


@dataclass(frozen=True)
class Judgement:
    """A sentence, and whether what it says is welcome."""

    tone: Tone
    text: str


def verdicts(report: Report) -> list[str]:
    """The sentences of `judgements`."""
    return [judgement.text for judgement in judgements(report)]


def judgements(report: Report) -> list[Judgement]:
    """On size, speed, memory, energy, fidelity and accuracy; cautions last."""
    return [
        _size(report),
        *_speed(report),
        *_throughput(report),
        *_memory(report),
        *_energy(report),
        *_fidelity(report),
        *_accuracy(report),
        *(Judgement("caution", f"Caution: {text}.") for text in _cautions(report)),
    ]


def speed_verdict(batch: str, ratio: Interval) -> Judgement:
    """One sentence on the latency ratio at one batch size."""
    shown = f"latency ratio {interval(ratio)}"
    if ratio.ci95_low is None or ratio.ci95_high is None:
        return Judgement(
            "neutral",
            f"Speed at batch {batch} is not established: {shown}; {ratio.why_open}.",
        )
    if ratio.ci95_low <= 1 <= ratio.ci95_high:
        return Judgement(
            "neutral",
            f"No measurable speed-up at batch {batch}: the 95% interval contains 1 ({shown}).",
        )
    if ratio.ci95_low > 1:
        return Judgement("bad", f"Slower at batch {batch}: {shown}.")
    return Judgement("good", f"{1 / ratio.value:.2f}× as fast at batch {batch}: {shown}.")


def _size(report: Report) -> Judgement:
    ratio = report.ratio
    if ratio.params >= 1:
        return Judgement("bad", "The pruned model is not smaller: nothing was removed.")
    return Judgement(
        "good",
        f"{100 * (1 - ratio.params):.1f}% fewer parameters, {100 * (1 - ratio.flops):.1f}% fewer "
        f"FLOPs, {_less(ratio.file_bytes)} file.",
    )


def _less(ratio: float) -> str:
    change = 100 * abs(1 - ratio)
    return f"{change:.1f}% {'smaller' if ratio < 1 else 'larger'}"


def _speed(report: Report) -> list[Judgement]:
    ratios = report.ratio.latency
    if ratios is None:
        return [Judgement("neutral", f"Speed was not measured: {report.ratio.why['latency']}.")]
    return [speed_verdict(key, ratios[key]) for key in sorted(ratios, key=int)]


def _throughput(report: Report) -> list[Judgement]:
    """The best batch size, and every other at which it falls: each is in the table."""
    ratios, after = report.ratio.throughput, report.pruned.throughput_img_s
    if not ratios or not after:
        return []
    best = max(ratios, key=lambda batch: after[batch])
    fallen = [key for key in sorted(ratios, key=int) if key != best and _below_1(ratios[key])]
    return [
        _throughput_at(best, ratios[best], most=after[best]),
        *(_throughput_at(key, ratios[key], most=after[key]) for key in fallen),
    ]


def _below_1(ratio: Interval) -> bool:
    return ratio.ci95_high is not None and ratio.ci95_high < 1


def _throughput_at(batch: str, ratio: Interval, *, most: float) -> Judgement:
    shown = f"{interval(ratio)} times the images per second at batch {batch}"
    if ratio.ci95_low is None or ratio.ci95_high is None:
        return Judgement("neutral", f"Throughput is not established: {shown}.")
    if ratio.ci95_low > 1:
        return Judgement("good", f"Throughput rises: {shown}, {most:.1f} at most.")
    if _below_1(ratio):
        return Judgement("bad", f"Throughput falls: {shown}.")
    return Judgement("neutral", f"No measurable change in throughput: {shown}.")


def _memory(report: Report) -> list[Judgement]:
    ratio = report.ratio.memory
    if ratio is None:
        return [Judgement("neutral", f"Memory was not compared: {report.ratio.why['memory']}.")]
    if abs(1 - ratio) < SAME:
        return [Judgement("neutral", "Peak memory is the same.")]
    return [Judgement("good" if ratio < 1 else "bad", f"Peak memory is {_less(ratio)}.")]


def _energy(report: Report) -> list[Judgement]:
    ratio = report.ratio.energy
    if ratio is None:
        return []  # said once, with the other things that were not measured
    if abs(1 - ratio) < SAME:
        return [Judgement("neutral", "An image takes the same energy.")]
    change = f"{100 * abs(1 - ratio):.1f}% {'less' if ratio < 1 else 'more'}"
    return [Judgement("good" if ratio < 1 else "bad", f"An image takes {change} energy.")]


def _fidelity(report: Report) -> list[Judgement]:
    fidelity = report.fidelity
    if fidelity is None:
        return [
            Judgement(
                "neutral",
                f"Fidelity was not measured, so nothing is promised: {report.why['fidelity']}.",
            )
        ]
    worst = f"1st-percentile feature cosine {fidelity_interval(fidelity, 'cosine_p1', times)}"
    epochs = report.method.distill_epochs
    if fidelity.cosine_p1 < UNUSABLE_P1:
        if epochs:
            advice = f"even after {epochs} epochs of distillation: distil longer, or prune less"
        else:
            advice = "without distillation"
        text = f"Not a drop-in replacement {advice} ({worst}, below {UNUSABLE_P1})."
        return [Judgement("bad", text)]
    if fidelity.cosine_p1 < DROP_IN_P1:
        text = f"Close to the baseline, not equal to it ({worst}): check it on your own task."
        return [Judgement("neutral", text)]
    text = f"A candidate drop-in replacement ({worst}, at least {DROP_IN_P1})."
    return [Judgement("good", text)]


# What an interval of the change in accuracy says -> the sentence's tone and beginning.
_CHANGES: dict[str, tuple[Tone, str]] = {
    "fell": ("bad", "Accuracy fell"),
    "rose": ("good", "Accuracy rose"),
    "same": ("neutral", "No measurable change in accuracy"),
    "open": ("neutral", "Change in accuracy is not established"),
}


def _accuracy(report: Report) -> list[Judgement]:
    """One sentence for all metrics of which the same can be said."""
    found: dict[str, list[str]] = {}
    for metric, change in (report.ratio.accuracy_difference or {}).items():
        if change.ci95_low is None or change.ci95_high is None:
            says = "open"
        elif change.ci95_high < 0:
            says = "fell"
        else:
            says = "rose" if change.ci95_low > 0 else "same"
        found.setdefault(says, []).append(f"{metric} {difference(change)}")
    return [
        Judgement(tone, f"{begins}: {'; '.join(found[says])}.")
        for says, (tone, begins) in _CHANGES.items()
        if says in found
    ]


def _cautions(report: Report) -> list[str]:
    cautions = []
    for key in batch_keys(report):
        timing = (report.timing or {})[key]
        if not timing.warmup_stable:
            cautions.append(f"latency at batch {key} had not settled after the first warm-up")
        if timing.capped:
            cautions.append(
                f"timing at batch {key} was stopped at its time limit after "
                f"{timing.pairs} pairs of calls"
            )
    fidelity = report.fidelity
    if fidelity is not None and fidelity.images < IMAGES_FOR_P1:
        cautions.append(
            f"fidelity is judged on {fidelity.images} images, so the 1st percentile is "
            "close to the single worst one"
        )
    telemetry = report.telemetry
    if telemetry is not None and telemetry.throttled:
        reasons = ", ".join(telemetry.throttled)
        cautions.append(f"the clocks were lowered while latency was measured ({reasons})")
    if telemetry is not None and (telemetry.other_load or 0) > BUSY:
        cautions.append(
            f"other processes took {percent(telemetry.other_load)} of the CPUs while latency was "
            "measured; the ratio is of calls that took turns, the milliseconds are not those of "
            "an idle machine"
        )
    return cautions
