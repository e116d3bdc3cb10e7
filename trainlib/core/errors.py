"""UserError, the one exception for problems that a user can cause and fix."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """A problem with settings, files or folders; the message says where it is and how to fix it."""

    reported = False  # True once rank 0 prints this error, so that the other ranks stay silent.


class AlreadyFinished(Exception):  # noqa: N818
    """The same run has already finished. Not an error: the exit code is 0."""


class Stopped(Exception):  # noqa: N818
    """A stop was requested, and what is done has been saved. The exit code is 0."""


@contextlib.contextmanager
def as_user_errors() -> Iterator[None]:
    """Convert ValueError and OSError to UserError with the same message."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
