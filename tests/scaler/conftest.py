"""The gateway's tests run on both event loops: uvloop's transports and descriptors are not asyncio's."""

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

_ON_BOTH = {"test_gateway", "test_dispatcher", "test_exchange", "test_upstream", "test_client_gone", "test_body", "test_openai_client"}


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if item.path.stem in _ON_BOTH:
        loops["uvloop"] = uvloop.new_event_loop
    return loops
