"""The one exception for everything the person who runs a job must fix."""


class UserError(Exception):
    """A mistake in a run file, a data file, a checkpoint or a topology: one line that names it and the fix."""
