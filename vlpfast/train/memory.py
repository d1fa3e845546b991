"""Memory that a step frees stays with the process, for the next step."""

from __future__ import annotations

import ctypes
import os
import platform

# mallopt's parameters and the variables that set them before a process starts (malloc.h).
_MMAP_MAX, _TRIM_THRESHOLD = -4, -1
_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Lets glibc keep freed memory for this process, whatever the size of the piece.

    By default glibc returns large tensors to the system when they are freed and asks for them anew
    in every step; the system clears each page again at its first touch. Peak memory stays what the
    step needs. Memory on GPUs is not concerned.

    Returns: whether it was set: not where the C library is another, nor where one of the variables
        MALLOC_MMAP_MAX_ and MALLOC_TRIM_THRESHOLD_ says what to do.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _VARIABLES):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # An int: at most 2 GiB stay free at the end of the heap.
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
