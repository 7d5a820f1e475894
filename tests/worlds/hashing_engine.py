"""A small server with memory worth comparing: random bytes, zeros, a heap, a child process, threads, a mapped file, shared memory.
As torch's store and gloo, it has sockets at the address of its host's name, by which it is connected to itself.

`/sum` hashes all of it, so an answer proves every page. It keeps away from everything that a real engine would not do.
"""

import hashlib
import http.server
import json
import mmap
import multiprocessing.shared_memory
import os
import random
import socket
import sys
import threading
import time
from pathlib import Path

port, mebibytes, mapped = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
child = "--child" in sys.argv

source = random.Random(7)
content = bytearray(source.randbytes(mebibytes << 20))
sparse = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a megabyte of content in 64 of written zeros
common = mmap.mmap(-1, 1 << 20)  # shared with the child: not ours to carry, but CRIU's
common[: 1 << 16] = source.randbytes(1 << 16)
sparse[:] = bytes(64 << 20)
sparse[40 << 20 : 41 << 20] = source.randbytes(1 << 20)
heap = [source.randbytes(100) for _ in range(20_000)]
file = mapped.open("rb")
weights = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
private = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
private[:8192] = bytes(8192)  # zeros that must not show the file again
shared = multiprocessing.shared_memory.SharedMemory(create=True, size=1 << 16)
shared.buf[:5] = b"there"
deleted_path = Path("/dev/shm/deleted")
deleted = deleted_path.open("w+b", buffering=0)
deleted.write(b"still here")
deleted_path.unlink()
# As glibc makes a semaphore: mapped under a name that is gone, while another name of the same file is there.
first_name, second_name = Path("/dev/shm/first"), Path("/dev/shm/second")
with first_name.open("w+b") as named:
    named.write(source.randbytes(4096))
    named.flush()
    semaphore = mmap.mmap(named.fileno(), 4096)
second_name.unlink(missing_ok=True)  # a pod's /dev/shm outlives its container
second_name.hardlink_to(first_name)
first_name.unlink()
requests: list[str] = []
attached = threading.Lock()  # held while the weights are put away
region = None
if "GPUMEM_REGION" in os.environ:
    from gpumem.client import Client

    client = Client()
    region = client.attach(bytes.fromhex(os.environ["GPUMEM_REGION"]))
if own := os.environ.get("OWN_WEIGHTS"):  # it brings its weights into gpumem itself, and says so
    from gpumem.checkpoint.safetensors import kept_reading
    from gpumem.client import Client
    from restore_agent.workload.control_directory import ControlDirectory

    found = kept_reading(Path(own))
    client = Client()
    region = client.attach(client.fill(found.layout, found.parts).id)
    if control := ControlDirectory.from_environment():
        control.name_weights(own)


late = "--late" in sys.argv  # it goes to sleep when the first real request has come in, and answers that when it wakes
asked, away = threading.Event(), threading.Event()


def take_part(folder: Path) -> None:
    """The engine's side of the control directory."""
    if late:
        asked.wait()
    while True:
        with attached:
            away.set()
            client.quiesce()
            (folder / "ready-for-snapshot").touch()
            while not ((folder / "snapshot-complete").exists() or (folder / "restore-complete").exists()):
                time.sleep(0.002)
            client.resume()
        while "--deaf" in sys.argv or not (folder / "quiesce-requested").exists():
            time.sleep(0.01)


if region and "SNAPSHOT_CONTROL_DIR" in os.environ:
    threading.Thread(target=take_part, args=(Path(os.environ["SNAPSHOT_CONTROL_DIR"]),)).start()


def own_server() -> socket.socket:
    """At the address of the host's name; where there is none, or it is another network's, at 127.0.0.1, as gloo does."""
    try:
        family, *_, address = socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except OSError:
        return socket.create_server(("127.0.0.1", 0))


listener = own_server()
own_address = listener.getsockname()[0]
# torch's store listens on all addresses, by IPv6, and is connected to the host's own, of whichever version that is.
store = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
here = socket.socket(socket.AF_INET6)
here.connect((own_address if ":" in own_address else f"::ffff:{own_address}", store.getsockname()[1]))
there, _ = store.accept()
unconnected = socket.socket(listener.family, socket.SOCK_DGRAM)  # as a resolver's
unconnected.bind((own_address, 0))
talking = threading.Lock()
server = os.environ.get("KUBERNETES_SERVICE_HOST")  # in a pod; it keeps a connection to somebody outside, as people's engines do
outside = socket.create_connection((server, 443), 10) if server else None


def check_own_sockets() -> None:
    """Raises AssertionError, OSError."""
    with talking, socket.create_connection(listener.getsockname()[:2]) as fresh, listener.accept()[0] as accepted:
        for one, other in ((here, there), (there, here), (fresh, accepted)):
            one.sendall(b"!")
            if other.recv(1) != b"!" or one.getpeername() != other.getsockname():
                raise AssertionError("a connection of the engine to itself is another one")
    if unconnected.getsockname()[0] != listener.getsockname()[0]:
        raise AssertionError(f"sockets are at {unconnected.getsockname()} and {listener.getsockname()}")


def outside_ended() -> str:
    """How the connection to somebody outside ends when it is used."""
    assert outside
    try:
        outside.sendall(b"?")
        return f"read {outside.recv(100)!r}"
    except OSError as error:
        return type(error).__name__


ask, answer = os.pipe(), os.pipe()
if child and os.fork() == 0:
    kept = bytearray(source.randbytes(8 << 20))
    while os.read(ask[0], 1):
        os.write(answer[1], hashlib.sha256(kept).digest())
threading.Thread(target=threading.Event().wait, daemon=True).start()  # every real engine has threads that wait for work


def digest() -> str:
    hasher = hashlib.sha256()
    for part in (content, sparse, common, *heap, weights, private, bytes(shared.buf)):
        hasher.update(part)
    if region:
        with attached:
            hasher.update(region.view())
    semaphore[0] = (semaphore[0] + 1) % 256  # and they are one file still
    hasher.update(semaphore[1:])
    if semaphore[:] != second_name.read_bytes():
        raise AssertionError("the mapping and the name are two files")
    check_own_sockets()
    deleted.seek(0)
    hasher.update(deleted.read())
    if child:
        os.write(ask[1], b"?")
        hasher.update(os.read(answer[0], 32))
    return hasher.hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        requests.append(self.path)
        if late and self.path == "/sum" and not asked.is_set():
            asked.set()
            away.wait()
        if self.path == "/exit":
            os._exit(3)
        body = {
            "/sum": lambda: {"digest": digest()},
            "/count": lambda: {"count": len(requests) - requests.count("/health")},  # that one is asked until it is well
            "/cached": lambda: {"again": requests.count("/cached") > 1},
            "/health": lambda: {},
            "/outside": lambda: {"ended": outside_ended()},
        }[self.path]()
        # calloc gives zeros, as it does of a fresh process.
        if self.path == "/sum" and any(bytearray(1 << 20)):
            body = {"digest": "calloc is dirty"}
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        print("served", *words, flush=True)


http.server.ThreadingHTTPServer(("", port), Handler).serve_forever()
