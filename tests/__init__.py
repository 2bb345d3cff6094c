"""Tests. Signatures are checked while they run: pytest's option ``--jaxtyping-packages`` names ``tests.checked``."""

from beartype import BeartypeConf, beartype

# beartype alone refuses an int where a float is annotated; typing rules allow it, and recipes say ``beta: 1``.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
