"""The one exception for what a user can cause and fix."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """A problem of settings, files or folders; its text names the place, the value and the cure.

    Entry points print it without a traceback and exit with code 1.
    """

    told = False
    """Whether the first of several ranks prints it, so that the others need not."""


@contextlib.contextmanager
def as_user_errors() -> Iterator[None]:
    """Turn a ValueError or OSError of code that knows no UserError into one, with the same text."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
