"""Freed memory stays in the process: the second round of large blocks needs no new pages."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from engine.allocator import keep_freed_memory

PROGRAM = """
import resource
import numpy as np
from engine.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.ones(2**20) for _ in range(16)]  # 8 MiB each
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_memory()
first = faults()
print(kept, first, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_pages_are_not_asked_for_twice() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    kept, first, second = done.stdout.split()
    assert kept == "True" and int(second) < 0.01 * int(first)


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
