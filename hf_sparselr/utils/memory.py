"""How much memory the machine has, and how much of it this process takes."""

import contextlib
import ctypes
import os
from pathlib import Path

_LIMITS = (  # of a container: (limit, in use)
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_memory() -> int | None:
    """Bytes of main memory that can still be taken, the limit of a container included; None where nobody knows."""
    found = [_field("/proc/meminfo", "MemAvailable")]
    for limit, used in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    known = [value for value in found if value is not None]
    if not known:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            known.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(known) if known else None


def resident_memory() -> int | None:
    """Bytes of main memory that this process holds, without pages of files that can be dropped; None if unknown."""
    return _field("/proc/self/status", "RssAnon") or _field("/proc/self/status", "VmRSS")


def _field(file: str, name: str) -> int | None:
    """A field of a file of the proc file system, in bytes."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(file).read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def release_memory() -> None:
    """Gives freed memory back to the system: glibc keeps pieces of it, some 20 MB for every block of 13 M weights."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
