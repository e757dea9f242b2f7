"""`pushpull serve` over real sockets, with a detector that is cheap to compute: answers, limits, loads, the page."""

import asyncio
import base64
import contextlib
import importlib
import io
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace

import chromium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pushpull_jax import cli
from pushpull_jax.data.images import resize_image
from pushpull_jax.detector import Detector
from pushpull_jax.errors import InputError

for library in ("prometheus_client", "python_multipart", "starlette", "uvicorn"):
    pytest.importorskip(library, reason="the extra `serve` is not installed")

from pushpull_jax.service import serving, web  # noqa: E402
from pushpull_jax.service.microbatches import SIZES, MicroBatches  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))
loads = importlib.import_module("load_service")

SIDE = 32
LIMITS = serving.Limits(body=100_000, bodies=300_000, pixels=40_000, waiting=6, arrival=1.0, answer=5.0)


@jax.jit
def program(images):
    """The map is the mean over channels, the score the mean of the map."""
    maps = images.mean(axis=-1)
    return maps.mean(axis=(1, 2)), maps


class Brightness(Detector):
    """A detector of bright images; it can be stopped at a gate, and tells of its batches."""

    def __init__(self):
        super().__init__(
            network=SimpleNamespace(image_size=SIDE, resize="stretch"),
            parameters={"threshold": np.float32(100), "map_threshold": np.float32(120)},
        )
        object.__setattr__(self, "gate", threading.Event())
        object.__setattr__(self, "batches", [])
        self.gate.set()

    def detect_resized(self, images, *, size):
        assert self.gate.wait(30)
        self.batches.append((len(images), size))
        padded = np.zeros((size, SIDE, SIDE, 3), np.float32)
        padded[: len(images)] = images
        scores, maps = jax.device_get(program(jnp.asarray(padded)))
        return scores[: len(images)], maps[: len(images)]


@contextlib.contextmanager
def served(detector, *, token=None, limits=LIMITS, is_ready=True):
    """The port of a service in a thread."""
    server = serving.build_server(detector, token=token, limits=limits)
    with serving.bind("127.0.0.1", 0, token=token) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            if is_ready:
                eventually(lambda: get(port, "/health")[0] == 200)
            yield port
        finally:
            detector.gate.set()
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def detector():
    return Brightness()


@pytest.fixture(scope="module")
def port(detector):
    with served(detector) as port:
        yield port


def request(port, method, path, body=None, headers=()):
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        return response.status, response.read(), response.headers


def get(port, path, **headers):
    return request(port, "GET", path, headers=headers)


def predict(port, file, query="", **headers):
    kind = f"multipart/form-data; boundary={loads.BOUNDARY}"
    status, body, _ = request(
        port, "POST", f"/predict{query}", loads.multipart(file), {"Content-Type": kind, **headers}
    )
    return status, json.loads(body)


def eventually(condition):
    """Wait until a condition holds."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def png(pixels):
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()


def photograph(seed=0, shape=(50, 70, 3), high=256):
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


@pytest.mark.parametrize("high, verdict", [(256, "anomalous"), (150, "normal")])
def test_an_image_is_scored_as_the_detector_does(port, detector, high, verdict):
    pixels = photograph(high=high)
    status, answer = predict(port, png(pixels))
    scores, _ = detector.detect_resized(resize_image(pixels, size=SIDE)[None], size=1)
    assert status == 200
    assert answer == {
        "score": pytest.approx(float(scores[0]), rel=1e-6), "threshold": 100.0, "verdict": verdict, "height": 50,
        "width": 70,
    }  # fmt: skip


@pytest.mark.parametrize("shape, shown", [((50, 70, 3), (70, 50)), ((16, 2048, 3), (1024, 8))])
def test_a_heat_map_is_drawn_on_request(detector, shape, shown):
    pixels = np.full(shape, 100, np.uint8)
    pixels[:, : shape[1] // 2] = 250  # above twice the map's threshold, 120
    with served(detector) as port:
        status, answer = predict(port, png(pixels), "?heatmap=true")
    picture = Image.open(io.BytesIO(base64.b64decode(answer["heatmap"])))
    assert status == 200 and picture.format == "PNG" and picture.size == shown
    # Left 250 of a threshold of 120, so red; right 100, which is above half of it: a little blue over the grey.
    drawn = np.asarray(picture).astype(int)
    hot, cold = drawn[shown[1] // 2, 2], drawn[shown[1] // 2, -3]
    assert hot[0] > hot[2] + 50 and cold[2] > cold[0]


def test_refusals(port):
    image = png(photograph())
    kind = {"Content-Type": f"multipart/form-data; boundary={loads.BOUNDARY}"}
    assert predict(port, b"no image")[0] == 422
    assert "PNG, JPEG, BMP or TIFF" in predict(port, b"no image")[1]["detail"]
    assert predict(port, image[: len(image) // 2])[0] == 422
    assert predict(port, b"")[0] == 422
    assert predict(port, image, "?heatmap=yes")[0] == 400
    assert request(port, "POST", "/predict", b"{}", {"Content-Type": "application/json"})[0] == 415
    assert request(port, "POST", "/predict")[0] == 415
    assert request(port, "POST", "/predict", b"nothing of the kind", kind)[0] == 400
    assert request(port, "POST", "/predict", b"", {"Content-Type": "multipart/form-data"})[0] == 400
    other = loads.multipart(image).replace(b'name="file"', b'name="image"')
    assert request(port, "POST", "/predict", other, kind)[0] == 400
    text = loads.multipart(b"x").replace(b'; filename="a.png"', b"")
    assert request(port, "POST", "/predict", text, kind)[0] == 400
    twice = loads.multipart(image).removesuffix(b"--\r\n") + b"\r\n" + loads.multipart(image).partition(b"\r\n")[2]
    assert request(port, "POST", "/predict", twice, kind)[0] == 400
    assert get(port, "/predict")[0] == 405
    assert get(port, "/nothing")[0] == 404
    assert predict(port, image)[0] == 200


@pytest.mark.parametrize("width, height, reason", [
    (60_000, 60_000, "decompression bomb"),  # Pillow's own limit
    (201, 200, "at most 40000 pixels"),
    (1, 2**14 + 1, "16384 a side"),
])  # fmt: skip
def test_an_image_too_large_is_refused_by_its_header(port, width, height, reason):
    # Its data are those of another image: it could not be decoded, so the message must come from the header.
    bomb = bytearray(png(photograph()))
    bomb[16:24] = struct.pack(">II", width, height)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    status, answer = predict(port, bytes(bomb))
    assert status == 422 and reason in answer["detail"]


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_too_large_is_refused(port, is_chunked):
    body = loads.multipart(bytes(150_000))
    kind = {"Content-Type": f"multipart/form-data; boundary={loads.BOUNDARY}"}
    chunks = (body[i : i + 10_000] for i in range(0, len(body), 10_000))  # nothing tells their length
    status, answer, _ = request(port, "POST", "/predict", chunks if is_chunked else body, kind)
    assert status == 413 and b"100000 bytes" in answer


def test_an_idle_connection_is_used_again(port):
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        kept = set()
        for path in ("/health", "/nothing", "/"):
            connection.request("GET", path)
            connection.getresponse().read()
            kept.add(connection.sock)
    assert len(kept) == 1


def test_what_waits_is_computed_together_in_few_sizes():
    detector = Brightness()
    seen = []

    async def detect_all():
        batches = MicroBatches(detector, on_batch=seen.append)
        running = asyncio.create_task(batches.run())
        images = [np.full((SIDE, SIDE, 3), i, np.float32) for i in range(12)]
        detector.gate.clear()
        first = asyncio.create_task(batches.detect(images[0]))
        await asyncio.sleep(0.05)
        rest = [asyncio.create_task(batches.detect(image)) for image in images[1:]]
        await asyncio.sleep(0.05)
        rest[0].cancel()  # a client that has left
        detector.gate.set()
        results = [await first] + [await task for task in rest[1:]]
        running.cancel()
        return results

    results = asyncio.run(detect_all())
    assert [score for score, _ in results] == [0, *range(2, 12)]
    assert all((score_map == score).all() for score, score_map in results)
    assert detector.batches == [(1, 1), (8, 8), (2, 2)] and seen == [1, 8, 2]


def test_a_batch_that_fails_does_not_stop_the_next():
    detector = Brightness()

    async def detect_twice():
        batches = MicroBatches(detector)
        running = asyncio.create_task(batches.run())
        with pytest.raises(ValueError, match="broadcast"):
            await batches.detect(np.ones((SIDE + 1, SIDE, 3), np.float32))
        score, _ = await batches.detect(np.ones((SIDE, SIDE, 3), np.float32))
        running.cancel()
        return score

    assert asyncio.run(detect_twice()) == 1


def test_health_is_ready_once_every_size_is_compiled():
    detector = Brightness()
    detector.gate.clear()
    with served(detector, is_ready=False) as port:
        status, body, _ = get(port, "/health")
        assert (status, json.loads(body)) == (503, {"status": "warming"})
        assert predict(port, png(photograph()))[0] == 503
        detector.gate.set()
        eventually(lambda: get(port, "/health")[0] == 200)
        assert [size for _, size in detector.batches] == list(SIZES)


def test_too_many_images_are_refused_at_once(detector):
    with served(detector) as port:
        detector.gate.clear()
        image = png(photograph())
        answers = []
        ask = lambda: answers.append(predict(port, image)[0])  # noqa: E731
        waiting = [threading.Thread(target=ask) for _ in range(LIMITS.waiting)]
        for thread in waiting:
            thread.start()
        eventually(lambda: asyncio.run(loads.measured(port))["pushpull_waiting_images"] == LIMITS.waiting)
        status, body, headers = request(
            port, "POST", "/predict", loads.multipart(image),
            {"Content-Type": f"multipart/form-data; boundary={loads.BOUNDARY}"},
        )  # fmt: skip
        assert status == 503 and b"wait already" in body and headers["retry-after"] == "1"
        detector.gate.set()
        for thread in waiting:
            thread.join()
        assert answers == [200] * LIMITS.waiting
        assert predict(port, image)[0] == 200


def test_bodies_are_held_up_to_a_limit(detector):
    """Four bodies of 90 kB, unfinished, are more than 300 kB: one is refused, until they are gone."""
    body = loads.multipart(bytes(90_000))
    head = loads.post(body)[: -len(body)]
    with served(detector, limits=replace(LIMITS, arrival=60.0)) as port, contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(4)]
        for one in sockets:
            one.sendall(head + body[:-100])
        (refused,), _, _ = select.select(sockets, [], [], 30)
        assert b" 503 " in refused.recv(4096)
        stack.close()
        for _ in range(3):
            eventually(lambda: predict(port, bytes(90_000))[0] == 422)


def test_an_image_that_is_not_computed_in_time_is_given_up(detector):
    with served(detector, limits=replace(LIMITS, answer=0.3)) as port:
        detector.gate.clear()
        status, answer = predict(port, png(photograph()))
        assert status == 503 and "0.3 s" in answer["detail"]
        assert "pushpull_waiting_images 0" in get(port, "/metrics")[1].decode()


POST = loads.post(b"-" * 900).replace(b"-" * 900, b"--%s\r\n" % loads.BOUNDARY.encode())


@pytest.mark.parametrize("start, ending", [
    (b"", b""),
    (b"GET / HTTP/1.1\r\n", b" 408 "),
    (POST, b" 408 "),
    (b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\n", b" 408 "),
    (b"GET /nothing HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\n-", b" 404 "),
    (b"no protocol at all\r\n\r\n", b" 400 "),
])  # fmt: skip
def test_a_connection_that_is_not_used_is_closed(port, start, ending):
    """Silence, a slow header, a slow body, a slow second header, a body that nobody asked for: closed
    however often a byte comes."""
    with socket.create_connection(("127.0.0.1", port), timeout=0.2) as one:
        one.sendall(start)
        received, end = b"", time.monotonic() + 30
        while time.monotonic() < end:
            try:
                part = one.recv(65536)
            except TimeoutError:
                with contextlib.suppress(OSError):
                    one.sendall(b"-" if start else b"")
                continue
            except ConnectionError:
                part = b""
            if not part:
                break
            received += part
        else:
            pytest.fail(f"still open; received {received!r}")
    assert ending in received.replace(b"\r\n", b" ") if ending else received == b""


def test_too_many_connections_close_one_that_waits(detector, monkeypatch):
    monkeypatch.setattr(serving, "_CONNECTIONS", 5)
    with served(detector, limits=replace(LIMITS, arrival=20.0)) as port, contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5)) for _ in range(5)]
        time.sleep(0.1)
        assert predict(port, png(photograph()))[0] == 200
        assert len(select.select(sockets, [], [], 5)[0]) == 1


def test_a_token_is_asked_for(detector):
    image = png(photograph())
    with served(detector, token="of ours") as port:
        assert predict(port, image)[0] == 401
        assert predict(port, image, Authorization="Bearer of yours")[0] == 401
        assert predict(port, image, Authorization="Bearer ö".encode())[0] == 401
        assert predict(port, image, Authorization="Bearer of ours")[0] == 200
        assert get(port, "/metrics")[0] == 401 and get(port, "/metrics", Authorization="Bearer of ours")[0] == 200
        assert get(port, "/health")[0] == get(port, "/")[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_another_host_needs_a_token(host):
    with pytest.raises(InputError, match="PUSHPULL_TOKEN"):
        serving.bind(host, 0, token=None)
    with pytest.raises(InputError, match="PUSHPULL_TOKEN"):
        serving.bind(host, 0, token="")


def test_openapi_tells_of_every_route_and_answer(port, detector):
    document = json.loads(get(port, "/openapi.json")[1])
    app = web.build_app(detector, token=None, limits=LIMITS)
    assert set(document["paths"]) == {route.path for route in app.routes}
    schema = document["components"]["schemas"]["Prediction"]
    _, answer = predict(port, png(photograph()))
    assert set(answer) == set(schema["required"])
    _, answer = predict(port, png(photograph()), "?heatmap=true")
    assert set(answer) == set(schema["properties"])
    told = set(document["paths"]["/predict"]["post"]["responses"])
    sources = [path.read_text() for path in (ROOT / "pushpull_jax/service").glob("*.py")]
    assert set(re.findall(r"HTTPException\((\d+)", "".join(sources))) | {"200", "408", "503"} == told


def test_the_documented_client_works(port, tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/service.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("part.png").write_bytes(png(np.full((40, 30, 3), 200, np.uint8)))
    exec(compile(example.replace(":8000", f":{port}"), "docs/service.md", "exec"), {})
    assert capsys.readouterr().out == "anomalous 200.0 100.0\n"
    with Image.open("heatmap.png") as heatmap:
        assert heatmap.size == (30, 40)


def test_the_documented_limits_are_the_defaults():
    table = (ROOT / "docs/service.md").read_text()
    limits, command = serving.Limits(), cli.Serve(workdir=Path())
    for text in (
        f"--max-megabytes {command.max_megabytes:g}`", f"--max-megapixels {command.max_megapixels:g}`",
        f"--max-waiting {command.max_waiting}`", f"| {limits.bodies / 2**20:g} MiB", f"| {limits.arrival:g} s",
        f"| {limits.answer:g} s", f"| {serving._CONNECTIONS} |", f"; {web._MAX_SIDE} a side",
    ):  # fmt: skip
        assert text in table


def test_metrics_count(detector):
    with served(detector) as port:
        predict(port, png(photograph()))
        predict(port, b"no image")
        rows = asyncio.run(loads.measured(port))
    assert rows['pushpull_requests_total{status="200"}'] == rows['pushpull_requests_total{status="422"}'] == 1
    assert rows["pushpull_batch_images_sum"] == rows["pushpull_request_seconds_count"] == 1
    assert rows["process_resident_memory_bytes"] > 0


def test_under_load(detector):
    """A short form of scripts/load_service.py: no error, nothing compiled, hostile requests end as they must."""
    image = png(photograph(shape=(150, 150, 3)))
    images = [loads.post(loads.multipart(image))]

    async def loaded(port):
        before = await loads.measured(port)
        attacking = asyncio.create_task(loads.attack(port, image, count=140, rate=140))
        answers = await loads.good_clients(port, images, count=4, stop=attacking.done)
        return before, answers, await attacking, await loads.measured(port)

    with served(detector, limits=replace(LIMITS, bodies=10_000_000, waiting=64)) as port:
        before, answers, ended, now = asyncio.run(loaded(port))
    assert len(answers) > 20 and {answer.status for answer in answers} == {200}
    assert now["pushpull_compilations_total"] == before["pushpull_compilations_total"]
    statuses = {name: {answer.status for answer in answers} for name, answers in ended.items()}
    assert statuses == {
        "not an image": {422}, "truncated": {422}, "huge dimensions": {422}, "wrong type": {415},
        "slow header": {408}, "slow body": {408}, "silent": {0},
    }  # fmt: skip


STOPPED = """
import sys, time
sys.path.insert(0, sys.argv[1])
import test_service
from pushpull_jax.service import serving

class Slow(test_service.Brightness):
    def detect_resized(self, images, *, size):
        time.sleep(1 if images.any() else 0)
        return super().detect_resized(images, size=size)

with serving.bind("127.0.0.1", 0, token=None) as listening:
    print(listening.getsockname()[1], flush=True)
    serving.run(Slow(), listening, token=None, limits=test_service.LIMITS)
"""


def test_sigterm_lets_what_is_in_flight_finish():
    program = [sys.executable, "-W", "error", "-c", STOPPED, str(ROOT / "tests")]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            port = int(process.stdout.readline())
            asyncio.run(loads.wait_until_ready(port))
            answers = []
            ask = threading.Thread(target=lambda: answers.append(predict(port, png(photograph()))[0]))
            ask.start()
            idle = socket.create_connection(("127.0.0.1", port))
            eventually(lambda: asyncio.run(loads.measured(port))["pushpull_waiting_images"] == 1)
            process.send_signal(signal.SIGTERM)
            ask.join()
            assert process.wait(60) == 0 and answers == [200]
            assert process.stderr.read() == ""
            idle.close()
        finally:
            process.kill()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_the_command_serves_the_run_that_it_is_given(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr("pushpull_jax.detector.load", lambda folder: f"detector of {Path(folder).name}")
    monkeypatch.setattr(serving, "run", lambda *given, **options: calls.append((*given[:1], options)))
    monkeypatch.setenv("PUSHPULL_TOKEN", "of ours")
    monkeypatch.setattr(cli, "prepare_jax", lambda: None)
    cli.serve([str(tmp_path / "bolt"), "--port", "0", "--max-megabytes", "2", "--max-waiting", "3"])
    ((given, options),) = calls
    assert given == "detector of bolt" and options["token"] == "of ours"
    assert options["limits"] == serving.Limits(body=2_000_000, pixels=16_800_000, waiting=3)
    assert re.search(r"serving .*bolt on http://127.0.0.1:\d+\n", capsys.readouterr().out)


def test_without_the_extra_the_command_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "prepare_jax", lambda: None)
    for name in [name for name in sys.modules if name.startswith(("pushpull_jax.service", "starlette", "uvicorn"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("pushpull_jax.service.serving")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(InputError, match=re.escape("pip install 'pushpull_jax[serve]'")):
        cli.serve([str(tmp_path)])


def test_the_page(port, tmp_path):
    """Dropped images get their verdict and heat map, which a slider fades; SCREENSHOTS names a folder for pictures."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    pixels = np.full((150, 200, 3), 60, np.uint8)
    pixels[40:90, 60:160] = 250
    (tmp_path / "part.png").write_bytes(png(np.full((40, 40, 3), 200, np.uint8)))
    Image.fromarray(pixels).save(tmp_path / "part.tif")
    encoded = base64.b64encode(png(pixels)).decode()
    drop = f"""(async () => {{
      const bytes = Uint8Array.from(atob("{encoded}"), (c) => c.charCodeAt(0));
      const dataTransfer = new DataTransfer();
      dataTransfer.items.add(new File([bytes], "NAME", {{type: "image/png"}}));
      document.body.dispatchEvent(new DragEvent("drop", {{dataTransfer, bubbles: true, cancelable: true}}));
    }})()"""
    with chromium.opened() as page:
        url = f"http://127.0.0.1:{port}/"
        for name, width, dark in (("desktop", 1200, False), ("phone", 390, False), ("dark", 1200, True)):
            page.show(url, width=width, height=850, dark=dark)
            assert page.evaluate("document.getElementById('result').hidden")
            page.screenshot(folder / f"service_{name}_empty.png")
            page.evaluate(drop.replace("NAME", "part <b>17</b>.png"))
            page.wait_for("!document.getElementById('result').hidden")
            page.screenshot(folder / f"service_{name}.png")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("document.getElementById('verdict').textContent") == "Normal"
        assert page.evaluate("document.getElementById('name').textContent") == "part <b>17</b>.png"
        assert page.evaluate("document.getElementById('heat').naturalWidth") == 200
        page.evaluate("of('opacity').value = 25, of('opacity').dispatchEvent(new Event('input'))")
        assert page.evaluate("getComputedStyle(document.getElementById('heat')).opacity") == "0.25"
        page.choose_file("#file", tmp_path / "part.png")
        page.wait_for("document.getElementById('verdict').textContent === 'Defective'")
        page.choose_file("#file", tmp_path / "part.tif")  # which Chromium cannot show
        page.wait_for("document.getElementById('name').textContent === 'part.tif'")
        page.wait_for("!document.getElementById('result').hidden && document.getElementById('fade').hidden")
        assert page.errors == []
        page.choose_file("#file", Path(__file__))
        page.wait_for("document.getElementById('message').textContent.includes('cannot be read as an image')")
        assert page.evaluate("document.getElementById('result').hidden")


def test_the_page_asks_for_the_token(detector, tmp_path):
    (tmp_path / "part.png").write_bytes(png(photograph()))
    with served(detector, token="of ours") as port, chromium.opened() as page:
        page.show(f"http://127.0.0.1:{port}/")
        page.choose_file("#file", tmp_path / "part.png")
        page.wait_for("!document.getElementById('token').hidden")
        page.evaluate("of('secret').value = 'of ours', of('token').requestSubmit()")
        page.wait_for("!document.getElementById('result').hidden")
        assert page.evaluate("document.getElementById('token').hidden")
