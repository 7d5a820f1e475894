"""The processes of the SGLang of tests/worlds/sglang_sources.py: its API server with the tokenizer manager, and its scheduler."""

from __future__ import annotations

FILES = {
    "sglang/srt/managers/scheduler.py": """
from types import SimpleNamespace
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.managers.io_struct import FlushCacheReqInput, FlushCacheReqOutput
from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput, ResumeMemoryOccupationReqInput
from sglang.srt.plugins import load_plugins
class Scheduler:
    def __init__(self, server_args):
        from sglang.srt.model_executor.model_runner import ModelRunner
        self.runner = ModelRunner(server_args)
        self.prefix = []
        self.idle = False
    def forward(self, tokens):
        self.idle = False  # its last batch is put away later
        answer = []
        for _ in range(4):
            same = next((at for at, (a, b) in enumerate(zip(tokens, self.prefix)) if a != b), min(len(tokens), len(self.prefix)))
            answer.append(self.runner.forward(tokens, min(same, len(tokens) - 1)))
            self.prefix, tokens = tokens, [*tokens, answer[-1]]
        return answer
    def flush_cache(self, request):
        if not self.idle and not request.timeout_s:
            self.idle = True
            return FlushCacheReqOutput(success=False, message="there are pending requests")
        self.idle, self.prefix = True, []
        return FlushCacheReqOutput(success=True)
    def release_memory_occupation(self, recv_req):
        assert self.idle, "release_memory_occupation should be called only when server is idle."
        for tag in recv_req.tags:
            self.runner.memory_saver_adapter.pause(tag)
    def resume_memory_occupation(self, recv_req):
        for tag in recv_req.tags:
            self.runner.memory_saver_adapter.resume(tag)
def run_scheduler_process(server_args, pipe):
    load_plugins()
    scheduler = Scheduler(server_args)
    ways = {
        FlushCacheReqInput: scheduler.flush_cache,
        ReleaseMemoryOccupationReqInput: scheduler.release_memory_occupation,
        ResumeMemoryOccupationReqInput: scheduler.resume_memory_occupation,
        list: scheduler.forward,
    }
    pipe.send("ready")
    while True:
        request = pipe.recv()
        pipe.send(ways[type(request)](request))
""",
    "sglang/srt/managers/tokenizer_manager.py": """
import asyncio
from enum import Enum
from sglang.srt.managers.io_struct import FlushCacheReqInput, FlushCacheReqOutput
from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput, ResumeMemoryOccupationReqInput
from sglang.srt.utils.aio_rwlock import RWLock
class ServerStatus(Enum):
    Up = "Up"
    Starting = "Starting"
class TokenizerManager:
    def __init__(self, pipe):
        self.pipe = pipe
        self.model_update_lock = RWLock()
        self.server_status = ServerStatus.Starting
        self._asking = asyncio.Lock()
    async def _ask(self, request):
        async with self._asking:
            return await asyncio.to_thread(lambda: (self.pipe.send(request), self.pipe.recv())[1])
    async def generate_request(self, obj, request=None):
        await self.model_update_lock.acquire_reader()
        try:
            return await self._ask([ord(letter) for letter in obj])
        finally:
            await self.model_update_lock.release_reader()
    async def flush_cache(self, timeout_s: float | None = None) -> FlushCacheReqOutput:
        return await self._ask(FlushCacheReqInput(timeout_s=timeout_s))
    async def release_memory_occupation(self, obj: ReleaseMemoryOccupationReqInput, request=None):
        await self._ask(obj)
    async def resume_memory_occupation(self, obj: ResumeMemoryOccupationReqInput, request=None):
        await self._ask(obj)
""",
    "sglang/srt/entrypoints/http_server.py": """
import asyncio, json, multiprocessing, threading
from dataclasses import dataclass
import uvicorn
from sglang.srt.managers.scheduler import run_scheduler_process
from sglang.srt.managers.tokenizer_manager import ServerStatus, TokenizerManager
@dataclass
class _GlobalState:
    tokenizer_manager: TokenizerManager
_global_state = None
def set_global_state(global_state: _GlobalState):
    global _global_state
    _global_state = global_state
def get_global_state() -> _GlobalState:
    return _global_state
class App:
    def __init__(self):
        self._outermost = self._serve
    def add_middleware(self, middleware_class):
        self._outermost = middleware_class(self._outermost)
    async def __call__(self, scope, receive, send):
        await self._outermost({**scope, "app": self}, receive, send)
    async def _serve(self, scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            threading.Thread(target=_wait_and_warmup, args=self.started_with).start()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        message, body = await receive(), b""
        body += message.get("body", b"")
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        asked = json.loads(body or b"{}")
        status, content = await self._answer(scope["path"], asked)
        kind = b"text/event-stream" if asked.get("stream") else b"application/json"
        headers = [(b"content-type", kind), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})
    async def _answer(self, path, body):
        manager = get_global_state().tokenizer_manager
        if path == "/health":
            return (200 if manager.server_status is ServerStatus.Up else 503), b"{}"
        if path == "/v1/models":
            return 200, b'{"object": "list", "data": [{"id": "m", "object": "model"}]}'
        if path != "/v1/completions":
            return 404, b"{}"
        answer = await manager.generate_request(body["prompt"])
        def said(*words):
            choice = {"index": 0, "text": " ".join(map(str, words)), "finish_reason": "length", "logprobs": None}
            return json.dumps({"object": "text_completion", "choices": [choice]})
        if body.get("stream"):
            return 200, "".join(f"data: {said(word)}\\n\\n" for word in answer).encode() + b"data: [DONE]\\n\\n"
        return 200, said(*answer).encode()
app = App()
def _execute_server_warmup(server_args) -> bool:
    get_global_state().tokenizer_manager.server_status = ServerStatus.Up
    print("SGLang's own warm-up", flush=True)
    return True
def _wait_and_warmup(server_args, launch_callback=None, execute_warmup_func=_execute_server_warmup):
    execute_warmup_func(server_args)
def launch_server(server_args, launch_callback=None, execute_warmup_func=_execute_server_warmup):
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    spawn.Process(target=run_scheduler_process, args=(server_args, theirs), daemon=True).start()
    theirs.close()
    ours.recv()
    set_global_state(_GlobalState(TokenizerManager(ours)))
    app.started_with = server_args, launch_callback, execute_warmup_func
    uvicorn.run(app, host="127.0.0.1", port=server_args.port, loop="asyncio", http="h11", log_level="warning")
""",
}
