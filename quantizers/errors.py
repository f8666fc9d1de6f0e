"""The errors that every format raises."""


class FormatError(Exception):
    """A 4-bit tensor or its config cannot be read or written as its format says.

    The message is one line: what, what was expected, what was found, what to do.
    """


class ScaleRangeError(FormatError):
    """Trained scales are not finite, or beyond what the file's dtype holds."""
