"""What the gateway counts. Alerts and dashboards build on these names."""

from functools import cache

from prometheus_client import Counter, Histogram

WAITS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

REQUESTS = Counter(
    "zerowake_requests_total", "Requests answered, by model and the answer's status; 499: the client left.", ["model", "code"]
)
REFUSED = Counter("zerowake_requests_refused_total", "Requests that the gateway itself refused, by reason.", ["model", "reason"])
RETRIES = Counter(
    "zerowake_request_retries_total", "Requests sent to another replica because theirs failed before its first byte.", ["model"]
)
HELD_SECONDS = Histogram(
    "zerowake_held_seconds", "How long requests that had to be held were held until a replica took them.", ["model"], buckets=WAITS
)
FIRST_BYTE_SECONDS = Histogram(
    "zerowake_first_byte_seconds", "From a request's first byte in to the answer's first byte out.", ["model"], buckets=WAITS
)

# For what every request counts: looking a child up by its labels costs more than counting. Models and statuses are few.
requests_of = cache(REQUESTS.labels)
first_byte_of = cache(FIRST_BYTE_SECONDS.labels)
