"""The one exception for mistakes that a user can mend, and how other libraries' errors are put in one line.

Raised with a one-line message that names the fix; the command line prints it and exits with code 2. Knows nothing of
what raised it.
"""

from __future__ import annotations


class UserError(ValueError):
    """A setting, file or input that cannot work; the message is one line and names the fix."""


def first_line(error: BaseException) -> str:
    """The first line of another library's exception, for a message of our own."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
