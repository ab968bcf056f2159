"""Follow a frame: when its stream has been watched, what a model got right. One file a test.

`heldout` is the test of the default checkpoint, `recall` asks by the age of the evidence, `length` by the length of the
stream; `freshness` looks at the states. `batched` runs many streams as rows of one memory, `exam` asks them, `needles`
are the very long streams; `counts`, `room`, `figure` and `record` count, weigh, draw, and say how it was measured.
"""
