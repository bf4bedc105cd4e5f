"""The one exception for mistakes that a user can mend.

Raised with a one-line message that names the fix; the command line prints it and exits with code 2. Knows nothing of
what raised it.
"""

from __future__ import annotations


class UserError(ValueError):
    """A setting, file or input that cannot work; the message is one line and names the fix."""
