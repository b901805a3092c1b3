"""One thread for small products: threads that wait for each other beside other work take many times as long."""

from contextlib import AbstractContextManager
from functools import cache
from typing import Any


@cache
def _pools() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()  # looks through all libraries that are loaded, which takes longer than a small fit


def one_thread() -> AbstractContextManager[object]:
    """Within it BLAS and OpenMP have one thread; import what brings them (scikit-learn) before."""
    limits: AbstractContextManager[object] = _pools().limit(limits=1)
    return limits
