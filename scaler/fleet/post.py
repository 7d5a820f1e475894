"""What somebody has posted of a model's demand, as the replicas of the scaler tell it to each other: whichever got it, it counts at all."""

from __future__ import annotations

from dataclasses import dataclass

from zerowake_proto import peers_pb2 as pb


@dataclass(frozen=True, slots=True)
class Post:
    """namespace: of the model when it was posted; by: who did; stamp: the later one's of two is larger; seconds: it counts for so long from
    now on."""

    namespace: str
    model: str
    by: str
    pending: int
    stamp: float
    seconds: float

    @classmethod
    def told(cls, said: pb.Post) -> Post:
        return cls(said.namespace, said.model, said.by, said.pending, said.stamp, said.seconds)

    @property
    def message(self) -> pb.Post:
        return pb.Post(namespace=self.namespace, model=self.model, by=self.by, pending=self.pending, stamp=self.stamp, seconds=self.seconds)
