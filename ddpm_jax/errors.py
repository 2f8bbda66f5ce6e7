"""Exceptions that the command line turns into one line and an exit code."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message names it and the remedy, in one line."""


class DataLost(UserError):
    """An image that was there when the run started cannot be read any more."""


class NonFiniteLoss(UserError):
    """The loss or the gradient was infinite or not a number."""


class NonFiniteSamples(UserError):
    """A chain left values that were infinite or not a number."""
