"""The one exception that reaches a user as a single line."""


class UserError(Exception):
    """An error that the user can fix. The message is one line that names the cause (field, file, model) and the fix.

    The CLI prints it without a traceback and exits with status 2; any other exception is a bug and keeps its traceback.
    """
