"""A server with threads that keeps its state in files, as real ones do: each trait is a way of that, and has a path that shows it.

    writing_engine.py PORT FOLDER TRAIT…

`/TRAIT` answers with what the engine itself sees of it, `/write` uses every trait and answers always the same. So two replicas that
meet in a folder, or one that came back to other files than it left, give themselves away.
"""

import ctypes
import fcntl
import http.server
import json
import mmap
import os
import socket
import socketserver
import sqlite3
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

port, folder, traits = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
folder.mkdir(parents=True, exist_ok=True)
requests = 0


def backend() -> Callable[[], object]:
    """A front end that asks its back end, another process, over a UNIX socket."""
    path = folder / "backend.sock"
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()
    if os.fork() == 0:
        counted = 0
        while True:
            connection, _ = listening.accept()
            counted += 1
            connection.sendall(b"%d" % counted)
            connection.close()
    listening.close()

    def ask() -> object:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            return int(connection.recv(100))

    return ask


def deleted() -> Callable[[], object]:
    """A file without a name, of as many MiB as SIZE says, and one that had two."""
    size = int(os.environ.get("SIZE", "1")) << 20
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    file.write(os.urandom(1 << 20) * (size >> 20))
    file.flush()
    first, second = folder / "first", folder / "second"
    first.write_text("two names")
    held = first.open("r+")
    second.unlink(missing_ok=True)
    second.hardlink_to(first)
    first.unlink()

    def look() -> object:
        file.seek(0)
        held.seek(0)
        return [
            os.fstat(file.fileno()).st_size,
            sum(file.read(1 << 20)),
            held.read(),
            second.read_text(),
            sorted(path.name for path in folder.iterdir()),
        ]

    return look


def log() -> Callable[[], object]:
    """A file that was opened for writing, as `>` does, and is written at each request."""
    file = (folder / "engine.log").open("w")

    def write() -> object:
        print("a request", file=file, flush=True)
        return (folder / "engine.log").read_text().count("\n")

    return write


def mapped() -> Callable[[], object]:
    """A file that is mapped shared and writable."""
    path = folder / "mapped"
    path.write_bytes(bytes(1 << 20))
    with path.open("r+b") as file:
        view = mmap.mmap(file.fileno(), 0)

    def count() -> object:
        view[0] += 1
        return [view[0], path.read_bytes()[0]]

    return count


def sequence() -> Callable[[], object]:
    """Numbers that are drawn from a file under a lock, and a PID file."""
    path, lock, pid = folder / "sequence", (folder / "lock").open("w"), folder / "engine.pid"
    path.write_text("0")
    pid.write_text(str(os.getpid()))
    fcntl.flock(lock, fcntl.LOCK_EX)

    def draw() -> object:
        path.write_text(str(int(path.read_text()) + 1))
        return [int(path.read_text()), pid.read_text() == str(os.getpid())]

    return draw


def database() -> Callable[[], object]:
    """SQLite with a write-ahead log."""
    connection = sqlite3.connect(folder / "state.db", check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE counted (n INTEGER)")
    connection.commit()

    def count() -> object:
        connection.execute("INSERT INTO counted VALUES (1)")
        connection.commit()
        return connection.execute("SELECT sum(n) FROM counted").fetchone()[0]

    return count


def special() -> Callable[[], object]:
    """What a folder may hold beside files: a pipe with a name, links, owners, modes, attributes, a removed file of the machine's."""
    (folder / "real").write_text("real")
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    pipe.chmod(0o620)
    end = os.open(pipe, os.O_RDWR)
    os.write(end, b"kept in the pipe")
    (folder / "link").symlink_to("real")
    (folder / "hard").hardlink_to(folder / "real")
    os.chown(folder / "real", 1000, 1001)
    (folder / "real").chmod(0o640)
    if Path("/run") not in folder.parents:
        os.setxattr(folder / "real", "user.note", b"noted")
    if (removed := folder / "of-the-machine").exists():
        removed.unlink()

    def look() -> object:
        at, same = (folder / "real").stat(), (folder / "hard").stat()
        note = os.getxattr(folder / "real", "user.note").decode() if Path("/run") not in folder.parents else ""
        data = os.read(end, 100)
        os.write(end, data)
        return [
            data.decode(),
            stat.filemode(pipe.stat().st_mode),
            str((folder / "link").readlink()),
            at.st_ino == same.st_ino,
            [at.st_uid, at.st_gid, stat.filemode(at.st_mode), note],
            removed.exists(),
        ]

    return look


def watched() -> Callable[[], object]:
    """Folders that are watched, the engine's and one of the machine's, as by `fs.watch`."""
    libc = ctypes.CDLL(None, use_errno=True)
    notify = libc.inotify_init1(os.O_NONBLOCK)
    for each in (folder, Path("/usr/lib")):
        if libc.inotify_add_watch(notify, os.fsencode(each), 0x100) < 0:  # IN_CREATE
            raise OSError(ctypes.get_errno(), "inotify_add_watch")

    def look() -> object:
        fresh = folder / f"fresh-{time.monotonic_ns()}"
        fresh.touch()
        (Path("/usr/lib") / fresh.name).touch()
        return os.read(notify, 4096).count(fresh.name.encode())

    return look


def append() -> Callable[[], object]:
    """A log that several replicas write together, where its folder is shared."""
    file = (folder / "access.log").open("a")

    def write() -> object:
        print(os.environ.get("HOSTNAME", "a replica"), file=file, flush=True)
        return (folder / "access.log").read_text().count("\n")

    return write


shown = {trait: globals()[trait]() for trait in traits}
serial = threading.Lock()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with serial:
            if self.path == "/write":
                for use in shown.values():
                    use()
            look = shown.get(self.path[1:])
            body = json.dumps(look() if look else traits).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True


threading.Thread(target=threading.Event().wait, daemon=True).start()
Server(("127.0.0.1", port), Handler).serve_forever()
