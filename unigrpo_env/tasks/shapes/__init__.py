"""The tasks of the shapes world: coloured shapes on a 3 x 3 grid.

A thought of this world is a layout in words, such as `red circle top , blue square left`. The
images are drawn by `rewards.shapes.grid`, and judged by the rewards beside it.
"""
