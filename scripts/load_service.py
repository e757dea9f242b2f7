"""Loads `pushpull serve` for real, over loopback: good clients alone, then good clients among hostile ones.

    python scripts/load_service.py RUN IMAGES

RUN is the folder of a finished run, IMAGES one of images. Prints throughput and latencies beside the throughput of
`predict` on the same images, the service's memory and what it compiled, and how each hostile request ended: with a 4xx,
or by being closed.
"""

import argparse
import asyncio
import itertools
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

BOUNDARY = "0123456789abcdef"
# What the service has to keep: every hostile request ends within it.
END_SECONDS = 10.0


class Answer(NamedTuple):
    """What became of a request."""

    status: int  # 0 where the connection was closed without one
    seconds: float


def post(body: bytes, *, content_type: str = f"multipart/form-data; boundary={BOUNDARY}") -> bytes:
    """A whole request for /predict."""
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def multipart(file: bytes) -> bytes:
    """A body with a file in the field `file`."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    return head.encode() + file + f"\r\n--{BOUNDARY}--\r\n".encode()


async def read_answer(reader: asyncio.StreamReader) -> int:
    """The status of the next answer, which is read to its end; 0 where the connection is closed instead."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        _, _, length = head.partition(b"content-length:")
        await reader.readexactly(int(length.split(b"\r\n")[0]))
        return int(head.split()[1])
    except (asyncio.IncompleteReadError, ConnectionError):
        return 0


async def good_client(port: int, requests: Sequence[bytes], stop: Callable[[], bool]) -> list[Answer]:
    """One request after another on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answers = []
    for request in itertools.cycle(requests):
        if stop():
            break
        began = time.perf_counter()
        writer.write(request)
        answers.append(Answer(await read_answer(reader), time.perf_counter() - began))
        if answers[-1].status == 0:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()
    return answers


async def good_clients(port: int, requests: Sequence[bytes], *, count: int, stop: Callable[[], bool]) -> list[Answer]:
    """All answers of some clients at a time, each of which begins with another request."""
    turns = [list(requests[i % len(requests) :]) + list(requests[: i % len(requests)]) for i in range(count)]
    return list(itertools.chain(*await asyncio.gather(*(good_client(port, turn, stop) for turn in turns))))


def after(seconds: float) -> Callable[[], bool]:
    """Whether some seconds have passed from now on."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


async def at_once(port: int, request: bytes) -> int:
    """A request that is sent whole."""
    return await slowly(port, [request])


async def slowly(port: int, parts: Sequence[bytes]) -> int:
    """Parts of a request, one a second; then nothing more comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = asyncio.create_task(read_answer(reader))
    try:
        for part in parts:
            writer.write(part)
            await asyncio.wait([answer], timeout=1.0)
            if answer.done():
                break
        return await answer
    finally:
        writer.close()


def hostile_requests(image: bytes) -> dict[str, Callable[[int], Coroutine[None, None, int]]]:
    """Ways to be hostile by name, each a coroutine of the port that gives the status, 0 where it was closed."""
    size = struct.pack(">4sIIBBBBB", b"IHDR", 60_000, 60_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    huge = png + struct.pack(">I", 13) + size + struct.pack(">I", zlib.crc32(size)) + image[33:]
    whole = {
        "not an image": post(multipart(b"<html>no image</html>" * 100)),
        "truncated": post(multipart(image[: len(image) // 2])),
        "huge dimensions": post(multipart(huge)),
        "wrong type": post(b'{"file": "a.png"}', content_type="application/json"),
    }
    request = post(multipart(image))
    body = request.index(b"\r\n\r\n") + 4
    parts = {
        "slow header": [request[i : i + 1] for i in range(30)],
        "slow body": [request[:body], *(request[i : i + 1] for i in range(body, body + 30))],
        "silent": [],
    }
    return {name: lambda port, request=request: at_once(port, request) for name, request in whole.items()} | {
        name: lambda port, part=part: slowly(port, part) for name, part in parts.items()
    }


async def attack(port: int, image: bytes, *, count: int, rate: float) -> dict[str, list[Answer]]:
    """Hostile requests of every kind in turn, `rate` of them begun a second, whatever became of those before."""
    kinds = hostile_requests(image)
    ended: dict[str, list[Answer]] = {name: [] for name in kinds}

    async def one(name: str) -> None:
        began = time.perf_counter()
        try:
            status = await asyncio.wait_for(kinds[name](port), 3 * END_SECONDS)
        except ConnectionError:
            status = 0
        except TimeoutError:
            status = -1
        ended[name].append(Answer(status, time.perf_counter() - began))

    async with asyncio.TaskGroup() as group:
        began = time.monotonic()
        for i, name in zip(range(count), itertools.cycle(kinds), strict=False):
            group.create_task(one(name))
            await asyncio.sleep(max(0.0, began + (i + 1) / rate - time.monotonic()))
    return ended


async def measured(port: int) -> dict[str, float]:
    """What /metrics tells, by name."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    rows = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(("pushpull", "process")))
    return {name: float(value) for name, value in rows}


def summary(answers: Sequence[Answer], seconds: float) -> str:
    """Throughput, latencies and errors in words."""
    times = np.array([answer.seconds for answer in answers])
    p50, p99 = np.quantile(times, (0.5, 0.99))
    errors = Counter(answer.status for answer in answers if answer.status != 200)
    return (
        f"{len(answers)} requests, {len(answers) / seconds:.1f} a second, p50 {1000 * p50:.0f} ms, "
        f"p99 {1000 * p99:.0f} ms, other than 200: {dict(errors) or 'none'}"
    )


def predict_throughput(run: Path, folder: Path) -> float:
    """Images a second of the prediction program, whose program is compiled already."""
    from pushpull_jax import load, predict
    from pushpull_jax.prediction_output import Pictures

    detector = load(run)
    images = sorted(folder.glob("*.png"))
    with tempfile.TemporaryDirectory() as warm, tempfile.TemporaryDirectory() as output:
        predict(detector, images[:8], warm)
        began = time.perf_counter()
        predict(detector, images, output, pictures=Pictures(heatmaps=False))
        return len(images) / (time.perf_counter() - began)


async def run_loads(port: int, images: Sequence[bytes], options: argparse.Namespace) -> None:
    requests = [post(multipart(image)) for image in images]
    await load(port, requests, "to warm up", count=8, seconds=10.0)
    await load(port, requests, f"{options.clients} clients", count=options.clients, seconds=options.seconds)
    await load(port, requests, "4 clients, quiet", count=4, seconds=30.0)
    before, began = await measured(port), time.perf_counter()
    attacking = asyncio.create_task(attack(port, images[0], count=options.hostile, rate=options.rate))
    answers = await good_clients(port, requests, count=4, stop=attacking.done)
    text = f"4 clients among {options.hostile} hostile requests, {options.rate:g} a second"
    report(text, summary(answers, time.perf_counter() - began), before, await measured(port))
    for name, ended in (await attacking).items():
        statuses = dict(Counter(answer.status or "closed" for answer in ended))
        print(f"  {name}: {statuses}, at most {max(answer.seconds for answer in ended):.1f} s", flush=True)

    await load(port, requests, "4 clients, quiet again", count=4, seconds=30.0)


async def load(port: int, requests: Sequence[bytes], text: str, *, count: int, seconds: float) -> None:
    """Some good clients for some seconds, and what became of them."""
    before, began = await measured(port), time.perf_counter()
    answers = await good_clients(port, requests, count=count, stop=after(seconds))
    report(text, summary(answers, time.perf_counter() - began), before, await measured(port))


def report(text: str, figures: str, before: dict[str, float], now: dict[str, float]) -> None:
    memory = [metrics["process_resident_memory_bytes"] / 2**20 for metrics in (before, now)]
    compiled = now["pushpull_compilations_total"] - before["pushpull_compilations_total"]
    print(f"{text}: {figures}; memory {memory[0]:.0f} to {memory[1]:.0f} MiB, {compiled:g} compilations", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("images", type=Path, help="folder of PNG files")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--hostile", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=80.0, help="hostile requests a second")
    options = parser.parse_args()
    images = [path.read_bytes() for path in sorted(options.images.glob("*.png"))]
    print(f"predict: {predict_throughput(options.run, options.images):.1f} images a second", flush=True)
    program = [sys.executable, "-c", "from pushpull_jax.cli import main; main()", "serve", str(options.run)]
    with subprocess.Popen([*program, "--port", "0"], stdout=subprocess.PIPE, text=True) as service:
        try:
            port = int(service.stdout.readline().rsplit(":", 1)[1])
            asyncio.run(wait_until_ready(port))
            asyncio.run(run_loads(port, images, options))
        finally:
            service.terminate()
    print(f"after SIGTERM: exit code {service.returncode}")


async def wait_until_ready(port: int) -> None:
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        if answer.startswith(b"HTTP/1.1 200"):
            return
        if b"failed" in answer:
            raise RuntimeError("the service has failed; its log tells why")
        await asyncio.sleep(0.5)


if __name__ == "__main__":
    main()
