"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """A mistake in what the user gave: configuration, data, model or environment.

    The message is one line that names the thing, the value and the remedy. The command line prints it
    without a traceback and exits with 2; every other exception is a defect of ours and keeps its traceback.
    """
