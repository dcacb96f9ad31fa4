"""The error that data on a disk can cause."""


class DataError(RuntimeError):
    """A data set is missing, torn, or not what was asked for; the message names the file and the remedy."""
