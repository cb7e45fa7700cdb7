"""The one exception that reaches a user as a single line."""


class UserError(Exception):
    """Something the user can fix. The message is one line that names the culprit (field, file, model) and the fix.

    The CLI prints it without a traceback and exits with status 2; any other exception is a defect of ours and keeps
    its traceback.
    """
