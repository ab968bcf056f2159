"""Follow a frame: when its stream has been watched, what a model got right. One file a test.

`batched` runs many streams as rows of one memory, `exam` asks them, `heldout` is the test of the default checkpoint,
`record` says how a number was measured.
"""
