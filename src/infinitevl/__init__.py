"""InfiniteVL: a vision-language model of linear cost that watches a stream for ever with a memory of fixed size.

    import infinitevl

    model = infinitevl.load()  # the small checkpoint that comes along; or a folder, or "hustvl/InfiniteVL"
    stream = infinitevl.Stream(model)
    for frame in infinitevl.frames("street.mp4", fps=1):
        stream.observe(frame)
    print(stream.ask("what does the sign say?").text)

Every name is imported when it is first used: `infinitevl --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infinitevl.batch import StreamBatch
    from infinitevl.generate import Sampling, prefill
    from infinitevl.memory import Memory
    from infinitevl.model import Model
    from infinitevl.stream import Answer, Stream, answer, begin, observe
    from infinitevl.video import Frame, frames
    from infinitevl.weights import load, save

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "Frame",
    "Memory",
    "Model",
    "Sampling",
    "Stream",
    "StreamBatch",
    "__version__",
    "answer",
    "begin",
    "frames",
    "load",
    "observe",
    "prefill",
    "save",
]
_HOME = {
    "batch": ("StreamBatch",),
    "generate": ("Sampling", "prefill"),
    "memory": ("Memory",),
    "model": ("Model",),
    "stream": ("Answer", "Stream", "answer", "begin", "observe"),
    "video": ("Frame", "frames"),
    "weights": ("load", "save"),
}


def __getattr__(name: str) -> object:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"infinitevl.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
