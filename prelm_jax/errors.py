"""Errors that the user can fix, preemption, and what to quote of other errors."""


class InputError(Exception):
    """A file, option or value from the user is not usable. The message is one line: what, where, what to do.

    The command line prints the message and exits with 1. Programs that use the library may catch it.
    Control characters and surrogates, of names from files for example, are escaped. The middle of a very long message
    is left out.
    """

    def __init__(self, message: str):
        line = "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in message)
        super().__init__(line if len(line) <= 2000 else f"{line[:1000]} … {line[-1000:]}")


class Preempted(BaseException):
    """The run ends before its time, and has saved what there was to save: SIGTERM came, for example.

    The command line exits with 75: the same command resumes. Like KeyboardInterrupt it can come at any moment, and no
    handler of errors must take it for one; so it is not an Exception.
    """


def first_line(error: Exception) -> str:
    """The first line of an error's message, without the middle of a long one; its class where it has no message."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 400 else f"{line[:200]} … {line[-200:]}"
