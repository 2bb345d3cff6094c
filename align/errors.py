"""Faults a user can mend: one sentence each, naming the key, file or row, what was expected and the way out."""


class RecipeError(ValueError):
    """A recipe or command line that can't be run."""


class RunError(RuntimeError):
    """A run that has to stop: a failed check, a broken checkpoint, a full disk, a loss that is not a number."""
