"""All rules together, and whether they let the report pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ampdeploy.errors import EXIT_GATE, AmpDeployError, ConfigError
from ampdeploy.gate import regression, require
from ampdeploy.gate.finding import Finding, Status
from ampdeploy.gate.rules import Rule
from ampdeploy.report.result import Report


class GateError(AmpDeployError):
    """A report breaks a rule."""

    exit_code = EXIT_GATE


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """What a report must fulfil."""

    rules: tuple[Rule, ...] = ()
    require: tuple[str, ...] = ()
    """Of `gate.require.REQUIREMENTS`."""
    max_regression: float | None = None
    """Fraction by which the report may be worse than an older one."""
    regression_of: tuple[str, ...] | None = None
    """Of `gate.regression.QUANTITIES`; None: its defaults."""
    undecided_passes: bool = False

    def __post_init__(self) -> None:
        if not self.rules and not self.require and self.max_regression is None:
            raise ConfigError(
                "there is no rule to hold the report against. Give one, e.g. "
                "--max-latency-ratio 0.8, or a file of them with --rules."
            )


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the gate says, and why."""

    model: str
    target: str
    findings: tuple[Finding, ...]
    undecided_passes: bool

    def blocks(self, finding: Finding) -> bool:
        """Whether this one finding closes the gate."""
        if finding.status is Status.UNDECIDED:
            return not self.undecided_passes
        return finding.status not in (Status.PASS, Status.SKIPPED)

    @property
    def passed(self) -> bool:
        """Whether the gate is open."""
        return not any(map(self.blocks, self.findings))

    @property
    def headline(self) -> str:
        """``Gate failed: 1 fail, 1 undecided, 3 pass``."""
        counts = {s: sum(f.status is s for f in self.findings) for s in Status}
        order = (
            Status.FAIL, Status.NOT_MEASURED, Status.INCOMPARABLE, Status.UNDECIDED, Status.PASS,
            Status.SKIPPED,
        )  # fmt: skip
        told = ", ".join(f"{counts[status]} {status.value}" for status in order if counts[status])
        lenient = self.undecided_passes and counts[Status.UNDECIDED]
        passed = "passed" if self.passed else "failed"
        return f"Gate {passed}: {told}{' (undecided passes)' if lenient else ''}"

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "target": self.target,
            "passed": self.passed,
            "undecided_passes": self.undecided_passes,
            "findings": [
                {**vars(finding), "status": finding.status.value, "blocks": self.blocks(finding)}
                for finding in self.findings
            ],
        }


def run_gate(report: Report, config: GateConfig, *, old: Report | None = None) -> Decision:
    """Hold `report` against every rule.

    Args:
        report: To be judged.
        config: The rules.
        old: What `config.max_regression` is relative to.

    Raises:
        ConfigError: `max_regression` without an old report, or the other way round.
        ArtifactError: A number of a report is none that can be measured.
    """
    if (config.max_regression is None) != (old is None):
        raise ConfigError(
            "--max-regression and --baseline-report need each other: how much worse, than what?"
        )
    findings = [finding for rule in config.rules for finding in rule.check(report)]
    findings += require.check(config.require, report)
    if config.max_regression is not None and old is not None:
        findings += regression.check(
            report, old, allowed=config.max_regression, names=config.regression_of
        )
    return Decision(
        model=report.model,
        target=report.target,
        findings=tuple(findings),
        undecided_passes=config.undecided_passes,
    )
