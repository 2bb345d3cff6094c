"""A stand-in for vLLM's server: started as it is, ready at once, and judges by counting exclamation marks.

The variable ``STAND_IN`` names a folder. What is in its file ``how`` is done: ``die``, ``mute`` (it never listens),
``crash`` (at the third question), else it serves. Every process leaves a file there, named after its number, with the
words of its command. It starts a process of its own that can't be asked to end, as an engine that hangs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.align.judge_server import JudgeServer, better

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"


def main(words: list[str]) -> int:
    folder = Path(os.environ["STAND_IN"])
    how = (folder / "how").read_text() if (folder / "how").is_file() else ""
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE) as engine:
        assert engine.stdout is not None
        engine.stdout.readline()
        (folder / f"{engine.pid}.pid").write_text("[]")
        (folder / f"{os.getpid()}.pid").write_text(json.dumps(words))
        if how == "die":
            print("(EngineCore pid=7) ERROR 11-22 05:20:56 [core.py:1] ValueError: no room for a single request")
            print("(APIServer pid=1) ERROR 11-22 05:20:57 [api.py:2] \nTraceback (most recent call last):")
            print("\n".join(f"  File {i}" for i in range(9)))
            print("RuntimeError: Engine core initialization failed. See root cause above.", flush=True)
            os._exit(3)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        if how == "mute":
            time.sleep(600)
        key, port = os.environ["VLLM_API_KEY"], int(words[1].removeprefix("--port="))

        def answer(body: dict[str, Any]) -> str:
            if how == "crash" and len(server.bodies) >= 3:
                os._exit(9)
            return better(body)

        with JudgeServer(answer, key=key, port=port) as server:
            time.sleep(600)
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
