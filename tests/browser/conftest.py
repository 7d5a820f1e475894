"""One Chromium for a file's tests, whose loop it lives in; each test has tabs of its own."""

import pytest
import pytest_asyncio

from tests.worlds.browser import AXE, CHROMIUM, Browser, chromium


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = "" if CHROMIUM and AXE.exists() else "needs Chromium and axe: `make browser` brings them"
    for item in items:
        if missing and "tests/browser" in str(item.path):
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> Browser:
    async with chromium() as found:
        yield found
