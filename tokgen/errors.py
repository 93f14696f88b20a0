"""The error that a user can mend. It stands alone, so that what is light need not wait for jax."""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"( object)? at 0x[0-9a-fA-F]+")


class UserError(ValueError):
    """Something the user gave cannot be used: the message says need, found and remedy.

    Where an object lies in memory, which messages of others tell, helps nobody and is left out.

    Examples:
        >>> try:
        ...     tokgen.load("runs/generator", precision="float8")
        ... except tokgen.UserError as error:
        ...     print(error)
        precision must be one of float32, bfloat16; found 'float8'; did you mean 'float32'?
    """

    def __init__(self, message: str = ""):
        super().__init__(_ADDRESS.sub("", str(message)))


class SharedError(UserError):
    """An error that all processes of a job raise, at the same place."""
