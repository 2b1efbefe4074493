"""The command line, and the commands that examine a finished run."""
