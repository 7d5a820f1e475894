"""The sentence model's weights in a gpumem region of the host, which all processes that serve it share."""

from gpumem.client import Client, Region
from gpumem.errors import NotFound
from gpumem.memory import HOST
from gpumem.safetensors import read_checkpoint
from sentence_model import WEIGHTS, model_folder


class SharedWeights:
    def __init__(self) -> None:
        """Attaches; fills the region first where nobody has. Raises GpumemError."""
        self._client = Client(device=HOST, label="embeddings")
        self._checkpoint = read_checkpoint(model_folder() / WEIGHTS)
        self.region: Region = self._client.attach(self._filled())

    def _filled(self) -> bytes:
        return self._client.fill(self._checkpoint.layout, self._checkpoint.parts).id

    def let_go(self) -> None:
        self._client.quiesce()

    def take_again(self) -> None:
        """At the same address. Raises GpumemError."""
        try:
            self._client.resume(wait=0)
        except NotFound:  # a server that was started since, or that needed the room
            self._filled()
            self._client.resume()
