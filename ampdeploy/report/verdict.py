"""What the numbers of a report amount to, in sentences. Every claim follows from a number."""

from __future__ import annotations

from ampdeploy.report.result import Interval, Report
from ampdeploy.report.rows import batch_keys, difference, interval

# Below this first-percentile cosine, some images get features that downstream heads have not seen.
DROP_IN_P1 = 0.98
UNUSABLE_P1 = 0.9
# The first percentile of fewer images is little more than their minimum.
IMAGES_FOR_P1 = 100


def verdicts(report: Report) -> list[str]:
    """Sentences on size, speed, memory, fidelity and accuracy; cautions last."""
    return [
        _size(report),
        *_speed(report),
        *_memory(report),
        *_fidelity(report),
        *_accuracy(report),
        *_cautions(report),
    ]


def speed_verdict(batch: str, ratio: Interval) -> str:
    """One sentence on the latency ratio at one batch size."""
    shown = f"latency ratio {interval(ratio)}"
    if ratio.ci95_low is None or ratio.ci95_high is None:
        return f"Speed at batch {batch} is not established: {shown}; {ratio.why['ci95_low']}."
    if ratio.ci95_low <= 1 <= ratio.ci95_high:
        return f"No measurable speed-up at batch {batch}: the 95% interval contains 1 ({shown})."
    if ratio.ci95_low > 1:
        return f"Slower at batch {batch}: {shown}."
    return f"{1 / ratio.value:.2f}× as fast at batch {batch}: {shown}."


def _size(report: Report) -> str:
    ratio = report.ratio
    if ratio.params >= 1:
        return "The pruned model is not smaller: nothing was removed."
    return (
        f"{100 * (1 - ratio.params):.1f}% fewer parameters, {100 * (1 - ratio.flops):.1f}% fewer "
        f"FLOPs, {_less(ratio.file_bytes)} file."
    )


def _less(ratio: float) -> str:
    change = 100 * abs(1 - ratio)
    return f"{change:.1f}% {'smaller' if ratio < 1 else 'larger'}"


def _speed(report: Report) -> list[str]:
    ratios = report.ratio.latency
    if ratios is None:
        return [f"Speed was not measured: {report.ratio.why['latency']}."]
    return [speed_verdict(key, ratios[key]) for key in batch_keys(report)]


def _memory(report: Report) -> list[str]:
    ratio = report.ratio.memory
    if ratio is None:
        return [f"Memory was not compared: {report.ratio.why['memory']}."]
    return [f"Peak memory is {_less(ratio)}."]


def _fidelity(report: Report) -> list[str]:
    fidelity = report.fidelity
    if fidelity is None:
        return [f"Fidelity was not measured, so nothing is promised: {report.why['fidelity']}."]
    worst = f"1st-percentile feature cosine {fidelity.cosine_p1:.3f}"
    epochs = report.method.distill_epochs
    if fidelity.cosine_p1 < UNUSABLE_P1:
        if epochs:
            advice = f"even after {epochs} epochs of distillation: distil longer, or prune less"
        else:
            advice = "without distillation"
        return [f"Not a drop-in replacement {advice} ({worst}, below {UNUSABLE_P1})."]
    if fidelity.cosine_p1 < DROP_IN_P1:
        return [f"Close to the baseline, not equal to it ({worst}): check it on your own task."]
    return [f"A candidate drop-in replacement ({worst}, at least {DROP_IN_P1})."]


def _accuracy(report: Report) -> list[str]:
    sentences = []
    for metric, change in (report.ratio.accuracy_difference or {}).items():
        shown = f"{metric} {difference(change)}"
        if change.ci95_low is None or change.ci95_high is None:
            sentences.append(f"Change in accuracy is not established: {shown}.")
        elif change.ci95_high < 0:
            sentences.append(f"Accuracy fell: {shown}.")
        elif change.ci95_low > 0:
            sentences.append(f"Accuracy rose: {shown}.")
        else:
            sentences.append(f"No measurable change in accuracy: {shown}.")
    return sentences


def _cautions(report: Report) -> list[str]:
    cautions = []
    for key in batch_keys(report):
        timing = (report.timing or {})[key]
        if not timing.warmup_stable:
            cautions.append(
                f"Caution: latency at batch {key} had not settled after "
                f"{timing.warmup_seconds:.0f} s of warm-up."
            )
        if timing.capped:
            cautions.append(
                f"Caution: timing at batch {key} was stopped at its time limit after "
                f"{timing.pairs} pairs of calls."
            )
    fidelity = report.fidelity
    if fidelity is not None and fidelity.images < IMAGES_FOR_P1:
        cautions.append(
            f"Caution: fidelity is judged on {fidelity.images} images, so the 1st percentile is "
            "close to the single worst one."
        )
    return cautions
