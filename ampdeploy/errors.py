"""The error family. What a user can fix is an `AmpDeployError`; anything else is our bug.

Every message says what failed, the value seen, and what to do about it. `cli.main` is the one
place that turns an error into an exit code.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_USER_ERROR = 1
EXIT_USAGE = 2
EXIT_GATE = 3
EXIT_MISSING = 4
EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130  # 128 + SIGINT, what shells expect


class AmpDeployError(Exception):
    """Something the user can fix."""

    exit_code: int = EXIT_USER_ERROR


class ConfigError(AmpDeployError):
    """An option or a combination of options that cannot be run."""

    exit_code = EXIT_USAGE


class UnknownNameError(ConfigError):
    """A model, target or other name that is not in its registry."""


class WeightsError(AmpDeployError):
    """Weights that cannot be found, read, or fitted to the model."""


class UnsupportedModelError(AmpDeployError):
    """A model whose MLPs cannot be slimmed exactly; refused rather than mangled."""


class DataError(AmpDeployError):
    """An image folder that is empty, unreadable, or too small for what was asked."""


class ArtifactError(AmpDeployError):
    """A file on disk that is missing, damaged, or belongs to something else."""


class VerificationError(AmpDeployError):
    """A numerical check said no: the artifact is not what it should compute."""

    exit_code = EXIT_GATE


class MissingDependencyError(AmpDeployError):
    """A package, driver or device that this step needs is not here."""

    exit_code = EXIT_MISSING
