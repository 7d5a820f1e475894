"""What was posted, on its way to another replica."""

from __future__ import annotations

from zerowake_proto import peers_pb2 as pb

from scaler.fleet.post import Post


def test_it_comes_as_it_went() -> None:
    post = Post("tenant", "m", "b", 10**9, 1_800_000_000.25, 59.5)
    assert Post.told(pb.Post.FromString(post.message.SerializeToString())) == post
