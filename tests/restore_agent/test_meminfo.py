"""The node's memory, as the kernel tells it."""

import os

import pytest

from restore_agent.drivers.meminfo import _meminfo, available_memory, total_memory


def test_it_is_in_bytes_and_what_is_available_is_part_of_it() -> None:
    assert total_memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    assert 0 < available_memory() < total_memory()


def test_a_kernel_that_does_not_say_is_an_error() -> None:
    with pytest.raises(OSError, match="has no Nonsense"):
        _meminfo("Nonsense")
