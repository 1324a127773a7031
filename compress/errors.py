"""The one error a user is meant to read: a single line with the numbers and a way out. The CLI prints it and exits 1."""


class CompressError(ValueError):
    """Bad input or a failed check, told in one line. Anything else that escapes is a bug and keeps its traceback."""
