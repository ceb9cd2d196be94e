"""Memory of the CPU: what was freed, the next images and tensors take again."""

import ctypes

# The options of mallopt(3), from the C library's malloc.h.
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Tell the C library to keep freed memory for what asks for some next.

    By default it gives large blocks back to the system, which clears them page by page when they are asked for again.
    Kept, a step of PyTorch with 16 images of 384 pixels took 0.5 to 0.9 of the time on a CPU, and its peak of memory
    was up to 22 % higher; TensorFlow keeps that of its steps by itself, but its loader delivered 4 to 16 % more
    (benchmarks/README.md). It changes no result, and nothing in the memory of a GPU.
    """
    library = ctypes.CDLL(None)  # what this process is linked with
    library.mallopt(MMAP_MAX, 0)  # large blocks come from the heap, too
    library.mallopt(TRIM_THRESHOLD, -1)  # and the heap never shrinks
