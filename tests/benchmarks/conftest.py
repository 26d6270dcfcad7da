"""The benchmarks are scripts: doctest cannot import them as parts of a package."""

collect_ignore = ["bench.py", "bare_loop.py", "memory.py", "painting.py"]
