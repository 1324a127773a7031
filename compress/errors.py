"""The one error a user is meant to read: a single line with the numbers and a way out. The CLI prints it and exits 1."""


class CompressError(ValueError):
    """Bad input or a failed check, told in one line. Anything else that escapes is a bug and keeps its traceback."""


def at_least(options: object, **least: float) -> None:
    """Raises CompressError naming every field of `options` that lies below its least value."""
    if bad := [f"{name} {getattr(options, name)} is below {low}" for name, low in least.items() if not getattr(options, name) >= low]:
        raise CompressError("; ".join(bad))
