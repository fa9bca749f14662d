"""llama.cpp's server in this process, as a worker of llamacpp.py.

`python llamacpp_worker.py MODEL.gguf SESSIONS_MAX`. A request holds prompts (token ids, one
list per session) and a number of tokens; all sessions run at once.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from typing import Any

import xllamacpp

from workers import answer, requests

CONTEXT = 1024
"""Positions per session."""


def server(path: str, sessions_max: int) -> Any:
    """The server, with as many threads as OMP_NUM_THREADS says."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = CONTEXT * sessions_max
    params.n_parallel = sessions_max
    threads = int(os.environ["OMP_NUM_THREADS"])
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers = 0
    params.verbosity = -1
    return xllamacpp.Server(params)


async def main() -> None:
    """Answer requests; one thread of ours per session only waits."""
    running = server(sys.argv[1], int(sys.argv[2]))
    async for request in requests():
        bodies = [
            {
                "prompt": prompt, "max_tokens": request["tokens"], "temperature": 0,
                "ignore_eos": True, "cache_prompt": False,
            }
            for prompt in request["prompts"]
        ]  # fmt: skip
        results = await asyncio.gather(
            *(asyncio.to_thread(running.handle_completions, body) for body in bodies)
        )
        timings = [result["timings"] for result in results]
        texts = [result["choices"][0]["text"] for result in results]
        answer(
            {
                "decode_per_s": sum(
                    (one["predicted_n"] - 1) / one["predicted_ms"] * 1000 for one in timings
                ),
                "prompt_per_s": min(one["prompt_per_second"] for one in timings),
                "tokens": [[int(number) for number in re.findall(r"t(\d+)", one)] for one in texts],
            }
        )
    # llama.cpp's threads may outlive the interpreter's end; nothing is left to do here.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
