"""Whether activations are told to a collector as traces: OpenTelemetry's own environment variables say so.

Nothing of OpenTelemetry is imported, and no request asked anything, unless they do. What is wrong with it is told in the log: a model that
could be served is served without traces.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Mapping

from scaler.books.activation import Activations
from scaler.gateway.gateway import Gateway

log = logging.getLogger(__name__)


def wanted(environ: Mapping[str, str]) -> bool:
    """Whether the environment names a collector, and does not switch it off."""
    named = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    is_off = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or environ.get("OTEL_TRACES_EXPORTER", "otlp").strip() == "none"
    return bool(named) and not is_off


@contextlib.asynccontextmanager
async def traced(activations: Activations, gateway: Gateway, environ: Mapping[str, str] = os.environ) -> AsyncIterator[None]:
    """Has activations exported as traces until the block ends, if the environment says so."""
    if not wanted(environ):
        yield
        return
    try:
        from scaler.view.traces import Traces  # noqa: PLC0415

        traces = Traces(environ)
    except ImportError as error:
        log.error("no traces are exported: OpenTelemetry is not installed (%s); pip install 'zerowake[traces]'", error)
        yield
        return
    except Exception as error:  # a certificate that cannot be read, a value that is none: whatever the exporter finds
        log.error("no traces are exported, as the environment's OTEL_ variables say what cannot be done: %s", error)
        yield
        return
    activations.on_end(traces.ended)
    gateway.traced_by(traces.begin)
    try:
        yield
    finally:
        await traces.close()
