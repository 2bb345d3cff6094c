"""Objectives from other packages: what they register under the entry point group is there as ours is."""

from __future__ import annotations

from importlib.metadata import entry_points

GROUP = "align_preferences"
"""Entry point group; each entry names a module, which registers its classes when it is imported."""


def load_entry_points() -> None:
    """Imports the modules that installed packages name.

    Raises:
        ImportError: one can't be imported; names the package.
    """
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            package = point.dist.name if point.dist is not None else "an installed package"
            raise ImportError(
                f"{package} adds objectives from {point.value!r}, which can't be imported ({type(error).__name__}: "
                f"{error}); mend it, or uninstall {package}"
            ) from error
