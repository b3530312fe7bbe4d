"""How the loops of this package become machine code.

Signatures are explicit, so a kernel is compiled (or loaded from numba's on-disk cache, a few
milliseconds each) when its module is imported, never while a chunk waits.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

UInt8s = NDArray[np.uint8]
UInt16s = NDArray[np.uint16]
UInt32s = NDArray[np.uint32]
Float32s = NDArray[np.float32]

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(*signatures: str, fuse: bool = False) -> Callable[[Function], Function]:
    """Compile a function of arrays and integers that runs without the GIL.

    Arrays that a kernel only reads are declared ``Array(type, 1, 'C', readonly=True)`` so that it
    accepts the memory of an immutable frame. ``fuse``: products and sums may be rounded once, not
    twice. Without a signature, on a machine that can't run it, the function is left as it is.
    """

    def compile_function(function: Function) -> Function:
        if not signatures:
            return function
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
        if fuse:
            options["fastmath"] = {"contract", "nsz", "reassoc"}
        try:
            compiled: Function = numba.njit(list(signatures), cache=True, **options)(function)
        except RuntimeError:  # No folder to cache in is writable: compile for this process only.
            compiled = numba.njit(list(signatures), **options)(function)
        return compiled

    return compile_function
