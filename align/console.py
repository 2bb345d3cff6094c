"""What a run says, and what libraries may say beside it."""

from __future__ import annotations

import os
import sys

from tqdm import tqdm


def tell(line: str) -> None:
    """Writes a line of its own to stderr, where progress bars may stand and other processes write too."""
    with tqdm.external_write_mode(file=sys.stderr):
        sys.stderr.write(f"{line}\n")  # in one piece: with its end written apart, lines of two processes run together
        sys.stderr.flush()


def quiet_libraries() -> None:
    """Keeps what libraries print about themselves out of the way of what a run has to say."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when imported; else DeepSpeed warns that it found no GPU
    from transformers.utils import logging

    logging.disable_progress_bar()
