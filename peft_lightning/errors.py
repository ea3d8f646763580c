"""The failures that a user can act on.

The command line turns each of them into one line; ``exit_code`` is its exit status.
"""


class PeftLightningError(Exception):
    """Something failed for a reason that the message states in one line."""

    exit_code = 1


class UsageError(PeftLightningError, ValueError):
    """An option has a value that is not allowed; the message names option, value and what is allowed."""

    exit_code = 2


class DataError(PeftLightningError):
    """A data file holds something unusable; the message names the file and, where there is one, the row."""


class CheckpointError(PeftLightningError):
    """A checkpoint or an adapter is damaged or belongs to something else; the message lists the difference."""


def first_line(error: BaseException) -> str:
    """The first line of another package's message, or the error's name if it has none."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
