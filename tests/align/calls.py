"""What is called in processes of its own."""

from __future__ import annotations

import os
import sys


def double(number: int) -> int:
    return 2 * number


def fail() -> None:
    raise ValueError("not like this")


def end() -> None:
    os._exit(3)


def fill() -> int:
    return len(b"x" * (16 << 30))


def talk() -> str:
    print("this is not a result", flush=True)
    sys.stderr.write("nor is this")
    return "said"


def surrogate(**_: object) -> None:
    raise ValueError("\ud800")
