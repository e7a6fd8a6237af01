"""Keep the C library from handing freed memory back to the system at every step."""

import ctypes
from contextlib import suppress

# mallopt(3): sizes from which blocks are mapped for themselves, and from which free memory at the
# heap's end is given back. The first is glibc's upper limit.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST_IN_HEAP = 32 * 2**20  # bytes
MOST_KEPT = 2**30  # bytes


def keep_freed_memory() -> None:
    """Let the tensors of one step take the memory of the step before; without glibc do nothing.

    PyTorch on CPUs asks the C library for every tensor. Blocks of some megabytes would be mapped
    anew each time, and every page of them be cleared by the system.
    """
    with suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(MMAP_THRESHOLD, LARGEST_IN_HEAP)
        library.mallopt(TRIM_THRESHOLD, MOST_KEPT)
