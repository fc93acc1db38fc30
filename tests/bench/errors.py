"""The one error of the benchmark."""


class BenchFailed(Exception):
    """A contestant did not do what is measured: a line was lost, a command failed."""
