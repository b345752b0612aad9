"""What can go wrong through no fault of the code: the scripts turn each into one line, without a traceback."""


class InputError(ValueError):
    """A flag, file or data set is wrong. The message is one line that names it and says what to do."""


class NonFiniteError(RuntimeError):
    """Training left the finite numbers. The message says where, and which checkpoint is still good."""
