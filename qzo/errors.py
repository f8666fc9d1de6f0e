"""Errors that a user can cause; the command line prints them as one line without a traceback."""


class QZOError(Exception):
    """Base of all errors with a message written for the user."""


class ConfigError(QZOError):
    """A recipe key, flag or argument has a value that cannot be used."""


class DataError(QZOError):
    """A data set is missing, malformed or empty."""


class CheckpointError(QZOError):
    """A checkpoint or run folder is missing, damaged or contradicts itself."""


class TrainedRangeError(CheckpointError):
    """Trained numbers are beyond what the dtype of the file holds."""
