"""Errors that the user can fix, and preemption."""


class InputError(Exception):
    """A file, option or value from the user is not usable. The message is one line: what, where, what to do.

    The command line prints the message and exits with 1. Programs that use the library may catch it.
    """


class Preempted(Exception):
    """The run received SIGTERM and has saved. The command line exits with 75: the same command resumes."""
