"""The one error that a user of the testbed sees."""


class TestbedError(Exception):
    """Something that the user is told in one line, with what to do about it.

    :param what: what failed, and why.
    :param remedy: what to do; may be empty.
    """

    __test__ = False  # pytest would take the name for a test class

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what}; {remedy}" if remedy else what)
