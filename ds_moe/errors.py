"""The one exception for everything the person who runs a job must fix."""

MOST = 100  # complaints in one error


class UserError(Exception):
    """A mistake in a run file, a data file, a checkpoint or a topology: one line that names it and the fix.

    Of files that are checked as a whole, such as run files, a line for each mistake.
    """


def all_in_one(complaints: list[str]) -> UserError:
    """One error with a line for each complaint, as far as somebody can read them."""
    more = [f"and {len(complaints) - MOST} more"] if len(complaints) > MOST else []
    return UserError("\n".join(complaints[:MOST] + more))


def printed(error: UserError) -> str:
    """The lines that a command prints for an error, each marked as one."""
    return "\n".join(f"error: {line}" for line in str(error).splitlines())


def shown(value: object, most: int = 120) -> str:
    """A value out of somebody's file as a message quotes it: on one line, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def one_line(error: Exception, most: int = 600) -> str:
    """What a library's error says, on one line, cut where it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."
