"""The two exceptions that are no fault of the program."""


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line: what is wrong, where, and what to do.

    The command line prints the message and exits with 1; a program that uses the library may catch it.
    """


class Preempted(Exception):
    """The run was asked to stop (SIGTERM) and has saved; the command line exits with 75, and may be run again."""
