"""The sentence model's weights in a gpumem region of the host, which all processes that serve it share."""

import os

from gpumem.checkpoint.safetensors import read_checkpoint
from gpumem.client import Client
from gpumem.hardware.memory import HOST
from gpumem.wire.errors import NotFound
from sentence_model import WEIGHTS, model_folder


class SharedWeights:
    def __init__(self) -> None:
        """Attaches to the region that GPUMEM_REGION names; without it, fills one where nobody has. Raises GpumemError."""
        self._client = Client(device=HOST, label="embeddings")
        named = os.environ.get("GPUMEM_REGION")
        self.region = self._client.attach(bytes.fromhex(named) if named else self._fill())

    def _fill(self) -> bytes:
        checkpoint = read_checkpoint(model_folder() / WEIGHTS)
        return self._client.fill(checkpoint.layout, checkpoint.parts).id

    def let_go(self) -> None:
        self._client.quiesce()

    def take_again(self) -> None:
        """At the same address. Raises GpumemError."""
        try:
            self._client.resume(wait=0)
        except NotFound:  # a server that was started since, or that needed the room
            self._fill()
            self._client.resume()
