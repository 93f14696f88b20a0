"""One file per subcommand of `tokgen`: a docstring, `arguments(parser)` and `run(arguments)`."""
