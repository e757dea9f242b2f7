"""The service as a program: bind, serve, and on SIGTERM finish what is in flight."""

import functools
import ipaddress
import logging
import math
import socket

import uvicorn

from pushpull_jax.detector import Detector
from pushpull_jax.errors import InputError
from pushpull_jax.preemption import sigterm_noted
from pushpull_jax.service.connections import TimedConnection
from pushpull_jax.service.limits import Limits
from pushpull_jax.service.web import build_app

TOKEN = "PUSHPULL_TOKEN"
# Half of the files that a process may usually have open, 1024.
_CONNECTIONS = 512


def bind(host: str, port: int, *, token: str | None) -> socket.socket:
    """A listening socket.

    Args:
        host: address, or a name of one.
        port: 0 takes any that is free.
        token: without one only this machine's own clients are served.

    Raises:
        InputError: there is no token, and the host can be reached from elsewhere.
        OSError: the port is taken, or the host is not this machine's.
    """
    if not token and not _is_loopback(host):
        raise InputError(
            f"--host {host} can be reached from other machines: set the environment variable {TOKEN} to a token that "
            "clients must send"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


def run(detector: Detector, listening: socket.socket, *, token: str | None, limits: Limits) -> None:
    """Serve until SIGTERM or SIGINT, and answer what has been asked before.

    Args:
        detector: whose scores are served.
        listening: see `bind`.
        token: that clients must send; None asks for none.
        limits: beyond which clients are refused.
    """
    with sigterm_noted():  # uvicorn, once it has stopped, raises the signal again
        build_server(detector, token=token, limits=limits).run(sockets=[listening])


def build_server(detector: Detector, *, token: str | None, limits: Limits) -> uvicorn.Server:
    """The server that `run` runs."""
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it would tell of every malformed body
    connection = functools.partial(
        TimedConnection, seconds=limits.arrival, answer_seconds=limits.arrival + limits.answer, most=_CONNECTIONS
    )
    config = uvicorn.Config(
        build_app(detector, token=token, limits=limits),
        http=connection,
        ws="none",
        loop="asyncio",  # whether or not uvloop is there, so that all run what is tested
        lifespan="on",
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(2 * limits.arrival + limits.answer),
    )
    return uvicorn.Server(config)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
