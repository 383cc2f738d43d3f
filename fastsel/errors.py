"""The few exception types. Each message says what happened, where (file, row), and what to do next."""


class FastselError(Exception):
    """Anything fastsel raises on purpose; exit_code is what the command line returns."""

    exit_code = 1


class RunFailedError(FastselError):
    """The run could not be finished, or a gate such as --max-error-rate failed."""


class UsageError(FastselError, ValueError):
    """Bad flags, options or configuration."""

    exit_code = 2


class InputError(UsageError):
    """A pool, model or earlier run that cannot be used as given."""


class MissingExtraError(UsageError, ImportError):
    """A package that an optional feature needs is not installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        """Args: what needs it, the missing package, and the extra of fastsel that brings it."""
        super().__init__(f"{what} needs the package {package}: pip install 'fastsel[{extra}]'")


class FastselWarning(UserWarning):
    """Something a user should know about a run that goes on."""
