"""The one exception for what a user can mend: a wrong path, field, file or tensor.

Programs catch it at the command line and print its message alone; anything else that escapes is a bug of ours
and keeps its traceback. The message names what was expected, what came, and where.
"""


class InputError(ValueError):
    """Input that cannot be used; the message says which file, field or tensor, what was expected and what came."""
