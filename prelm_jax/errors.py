"""The one exception of a user's mistake."""


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line: what is wrong, where, and what to do.

    The command line prints the message and exits with 1; a program that uses the library may catch it.
    """
