"""Let the interpreter of Triton 3.6, which torch 2.11 brings, count up to a loaded number.

It makes an int of an array of one element, which numpy refuses from 2.4 on. Triton 3.7 squeezes the
array first, as here.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any


def mend() -> None:
    """Replace that conversion, where Triton 3.6 is what is installed."""
    try:
        if not version("triton").startswith("3.6."):
            return
    except PackageNotFoundError:
        return
    from triton.runtime import interpreter  # here only: it reads TRITON_INTERPRET

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: object, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda number: number.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend
