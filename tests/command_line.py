"""The command line, as tests of commands call it in their own process."""

from tokgen import cli


def call(*words) -> int:
    """The exit code of a command."""
    return cli.main([str(word) for word in words])


def refused(capfd, *words) -> str:
    """What a command says that ends with a mistake of the user's: one message."""
    capfd.readouterr()
    assert call(*words) == 2
    said = capfd.readouterr()
    assert "Traceback" not in said.err + said.out and said.err.count("error:") == 1, said.err
    return said.err
