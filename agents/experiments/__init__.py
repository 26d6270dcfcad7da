"""The comparisons of the paper: which runs they consist of, how they are run, and their page."""
