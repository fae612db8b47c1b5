"""The one exception for everything the person who runs a job must fix."""


class UserError(Exception):
    """A mistake in a run file, a data file, a checkpoint or a topology: one line that names it and the fix."""


def shown(value: object, most: int = 120) -> str:
    """A value out of somebody's file as a message quotes it: on one line, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def one_line(error: Exception, most: int = 600) -> str:
    """What a library's error says, on one line, cut where it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."
