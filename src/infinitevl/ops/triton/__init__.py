"""The ops of an NVIDIA GPU, in Triton: tested against `infinitevl.ops.reference`. Imported only where they run."""
