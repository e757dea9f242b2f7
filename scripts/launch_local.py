"""Start a training as several processes on this machine, to see it work or to test it; a cluster has its own starter.

    python scripts/launch_local.py -n 2 --devices 4 -- pushpull train quick --data.root ROOT ... --workdir DIR

Each process is told its number and where to meet the others (`--hosts.*`), and its output is prefixed with its number.
SIGTERM and Ctrl-C go to all of them. When one dies, it is said which, of what, and how to resume, and the others are
ended. Exit code: that of the first process that ended with another than 0, 128 + N for signal N.
"""

import argparse
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
from typing import NoReturn

# The others may end by themselves within it: they have all found the same error, or were all told to stop.
GRACE_SECONDS = 10.0
PREEMPTED = 75  # pushpull's exit code after SIGTERM


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def started(command: list[str], *, processes: int, devices: int | None) -> list[subprocess.Popen]:
    """The processes, each in a session of its own, so that Ctrl-C comes from here alone."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if devices:
        flags = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    where = ["--hosts.coordinator", f"localhost:{free_port()}", "--hosts.processes", str(processes)]
    return [
        subprocess.Popen(
            [*command, *where, "--hosts.process", str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for rank in range(processes)
    ]


def follow(rank: int, process: subprocess.Popen, ended: queue.Queue) -> None:
    """Pass on what a process says, line by line, and then how it ended."""
    for line in process.stdout:
        for part in filter(None, line.rstrip(b"\n").split(b"\r")):  # a progress bar has many in a line
            sys.stdout.buffer.write(b"[%d] %s\n" % (rank, part))
        sys.stdout.buffer.flush()
    ended.put((rank, process.wait()))


def described(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}" + (" (told to stop, its state is saved)" if code == PREEMPTED else "")


def watched(processes: list[subprocess.Popen], again: str) -> int:
    """Wait for the processes, and end the others when one has failed; the exit code."""
    ended: queue.Queue = queue.Queue()
    for rank, process in enumerate(processes):
        threading.Thread(target=follow, args=(rank, process, ended), daemon=True).start()
    first = 0
    for _ in processes:
        try:
            rank, code = ended.get(timeout=GRACE_SECONDS if first else None)
        except queue.Empty:
            break
        if code and not first:
            first = code
            print(f"launch_local: rank {rank} {described(code)}; to resume: {again}", file=sys.stderr, flush=True)
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
    return 128 - first if first < 0 else first


def main() -> NoReturn:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--processes", type=int, required=True, help="how many processes")
    parser.add_argument("--devices", type=int, help="CPU devices of each, pretended; otherwise what JAX finds")
    parser.add_argument("command", nargs="+", help="-- pushpull train ...")
    chosen = parser.parse_args()
    processes = started(chosen.command, processes=chosen.processes, devices=chosen.devices)
    for rank, process in enumerate(processes):
        print(f"launch_local: rank {rank} is process {process.pid}", file=sys.stderr, flush=True)

    def forward(number: int, _: object) -> None:
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    sys.exit(watched(processes, shlex.join([sys.executable, *sys.argv])))


if __name__ == "__main__":
    main()
