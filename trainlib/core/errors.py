"""UserError, the one exception for problems that a user can cause and fix."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """A problem of settings, files or folders; its text says where, the value and what to do.

    Entry points print it without a traceback and exit with code 1.
    """

    reported = False
    """True once rank 0 prints this error, so that the other ranks stay silent."""


class AlreadyFinished(UserError):  # noqa: N818  # Not an error: exit code 0.
    """The same run is finished already, so there is nothing to do."""


@contextlib.contextmanager
def as_user_errors() -> Iterator[None]:
    """Turn ValueError and OSError into UserError with the same text."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
