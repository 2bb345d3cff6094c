"""The fault of data that a user can mend."""


class DataError(ValueError):
    """Data that can't be used: one sentence naming the file, row or key, what was expected and what to do."""
