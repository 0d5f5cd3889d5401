"""Keep freed memory in the process: what one training step frees, the next one needs again."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and numbers of glibc's mallopt
NEVER, MAPPED_FROM = -1, 2**30


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, for the rest of the process; returns whether it does.

    Left alone, it gives large blocks and the top of its heap back to the system, which then hands out each page of the
    activations anew, and cleared, in every step on a CPU. The process holds its peak instead. Where the C library is
    another one, nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_TRIM_THRESHOLD, NEVER), (M_MMAP_THRESHOLD, MAPPED_FROM))
    return all(mallopt(name, value) for name, value in settings)
