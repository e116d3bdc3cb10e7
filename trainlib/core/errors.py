"""The one exception for what a user can cause and cure."""


class UserError(ValueError):
    """A problem of settings, files or folders; its text names the place, the value and the cure.

    Entry points print it without a traceback and exit with code 1.
    """

    told = False
    """Whether the first of several ranks prints it, so that the others need not."""
