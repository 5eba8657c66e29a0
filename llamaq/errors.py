"""The one exception whose message is written for the person at the terminal."""


class UserError(ValueError):
    """Something the user can fix: a setting, a file, a folder.

    The message names what is wrong and what to do. `llamaq.cli` and the recipes print it on one line without a
    traceback; every other exception is a bug of ours and keeps its traceback.
    """
