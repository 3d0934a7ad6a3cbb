"""A live server at four times its capacity for a minute, over loopback, on small models.

    python benchmarks/overload.py

Starts `mmrl serve` on two random-weight models, finds the throughput that 16 clients in a closed
loop reach, then sends four times as many requests per second whatever the answers. Prints how many
were answered and how, the throughput under overload against that before, and the growth of memory.
"""

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx2
import psutil

from mmrl.deploy.testbed import create

CLIENTS, CLOSED_S, OPEN_S, FACTOR = 16, 20.0, 60.0, 4
OPTIONS = ("--port", "0", "--device", "cpu", "--memory", "500MB", "--policy", "slack")
BODY = {"prompt": [20] * 32, "max_tokens": 8, "ignore_eos": True}


def memory_mb(pid: int) -> float:
    """Return the resident memory of a process and its children, MB."""
    process = psutil.Process(pid)
    processes = [process, *process.children(recursive=True)]
    return sum(int(one.memory_info().rss) for one in processes) / 1e6


async def measure(url: str, pid: int) -> None:
    """Run both phases and print what came of them."""
    # Shorter than the server keeps idle connections: or one is reused as it is being closed.
    limits = httpx2.Limits(max_connections=4000, keepalive_expiry=2.0)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def send(number: int) -> int | str:
            body = {**BODY, "model": ("a", "b")[number % 2]}
            try:
                answer = await client.post("/v1/completions", json=body)
            except httpx2.TransportError as error:
                return type(error).__name__
            if answer.status_code == 429:
                assert answer.headers["retry-after"]
            return answer.status_code

        until = time.monotonic() + CLOSED_S
        done = 0

        async def loop(number: int) -> None:
            nonlocal done
            while time.monotonic() < until:
                assert await send(number) == 200
                done += 1

        await asyncio.gather(*(loop(i) for i in range(CLIENTS)))
        capacity = done / CLOSED_S
        print(f"closed loop, {CLIENTS} clients: {capacity:.1f} requests/s")
        rate, before, begun = FACTOR * capacity, memory_mb(pid), time.monotonic()
        tasks, marks = [], []
        for number in range(int(rate * OPEN_S)):
            await asyncio.sleep(max(0.0, begun + number / rate - time.monotonic()))
            tasks.append(asyncio.create_task(send(number)))
            if number % max(1, int(rate * 10)) == 0:
                marks.append(memory_mb(pid))
        sent_s = time.monotonic() - begun
        answers = Counter(await asyncio.gather(*tasks))
        took = time.monotonic() - begun
        print(f"open loop: {len(tasks)} requests in {sent_s:.0f} s, {len(tasks) / sent_s:.0f}/s")
        without = sum(count for what, count in answers.items() if isinstance(what, str))
        print(f"answers: {dict(answers)}; without one: {without}")
        under = answers[200] / took
        print(f"throughput: {under:.1f}/s, {under / capacity:.2f} of before")
        growth = memory_mb(pid) - marks[min(1, len(marks) - 1)]
        print(f"memory: {before:.0f} MB before, {growth:+.0f} MB since ten seconds into it")


def main() -> None:
    """Serve, measure, stop."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = [create("llama-tiny", folder, name="a"), create("qwen2.5-tiny", folder, name="b")]
        log = folder / "log.txt"
        with log.open("wb") as file:
            server = subprocess.Popen(
                [Path(sys.executable).with_name("mmrl"), "serve", *models, *OPTIONS],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "COLUMNS": "200"},
            )
        try:
            while not (found := re.search(r"at (http://\S+)", log.read_text())):
                if server.poll() is not None:
                    sys.exit(log.read_text())
                time.sleep(0.2)
            asyncio.run(measure(found.group(1), server.pid))
        finally:
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    main()
