"""Models that write text and draw images.

`base` defines the methods that every model has, `registry` finds models by name, `bagel` is the
real architecture, and `toy` is the smallest model with the same methods.
"""
