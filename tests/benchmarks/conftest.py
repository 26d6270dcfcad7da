"""The benchmark is a script: doctest cannot import it as a part of a package."""

collect_ignore = ["bench.py", "bare_loop.py"]
