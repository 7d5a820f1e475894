"""What the scaler counts of its talk with KEDA."""

from prometheus_client import Counter, Gauge, Histogram

STREAMS_OPEN = Gauge("zerowake_keda_streams_open", "Streams that KEDA holds open, by RPC.", ["rpc"])
STREAMS_OPEN.labels("StreamIsActive")  # none is 0, and not no answer: an alert asks
STREAMS_ROTATED = Counter(
    "zerowake_keda_streams_rotated_total", "Streams ended for their age, so that KEDA opens them again elsewhere.", ["rpc"]
)
PUSHES = Counter(
    "zerowake_keda_pushes_total", "`true` written to a StreamIsActive stream, by what caused it (edge, open, repeat).", ["cause"]
)
PUSH_SECONDS = Histogram(
    "zerowake_keda_push_seconds",
    "From the first request for a model without replicas to the push being written.",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 60),
)
REFUSED = Counter("zerowake_keda_calls_refused_total", "Calls answered with an error, by RPC and status.", ["rpc", "code"])
