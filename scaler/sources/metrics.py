"""What is counted of the sources of demand; their ages and values are read when Prometheus asks (view/metrics.py)."""

from prometheus_client import Counter

ERRORS = Counter("zerowake_source_errors_total", "Readings of a source of demand that failed, or were of no use.", ["model", "source"])
