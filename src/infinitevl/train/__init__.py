"""Training: convert a Transformer teacher, distil it (stages 1a and 1b), tune it (2), lengthen it (3).

A stage is a file with two functions, what trains and what the loss is; one loop, which knows nothing of stages, runs
it.
"""
