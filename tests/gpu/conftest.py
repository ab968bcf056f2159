"""What Triton's interpreter lacks where the kernels' tests run without a GPU; on one, a look at what was compiled."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator

import pytest
import sass
import torch

CHECKED: set[int] = set()  # compiled kernels that were looked at, by id; they live as long as the process


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loop bounds in triton 3.6's interpreter are arrays of one element, no ints for NumPy 2.4 and newer."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_index)


@pytest.fixture(autouse=True)
def compiled_well() -> Iterator[None]:
    """No kernel of ours that a test compiled reads a register that nothing wrote (see `sass`)."""
    yield
    if not torch.cuda.is_available():
        return
    for name, kernel in _compiled():
        if id(kernel) not in CHECKED:
            CHECKED.add(id(kernel))
            found = sass.unwritten(sass.listing(kernel.asm["cubin"]))
            assert not found, f"{name} was compiled wrong by ptxas: {found[0]}"


def _compiled() -> Iterator[tuple[str, object]]:
    """Kernels of `infinitevl.ops.triton` that are compiled in this process."""
    from triton.runtime.jit import JITFunction

    ours = [module for name, module in list(sys.modules.items()) if name.startswith("infinitevl.ops.triton.")]
    functions = {id(each): each for module in ours for each in vars(module).values() if isinstance(each, JITFunction)}
    for function in functions.values():
        for kernels, *_ in function.device_caches.values():
            for kernel in kernels.values():
                yield function.__name__, kernel
