"""How to install an optional dependency."""

__all__ = ["install_command"]


def install_command(extra: str) -> str:
    """Return the command that installs an extra, from a checkout and never from a package index.

    Args:
        extra: A name of ``[project.optional-dependencies]`` in ``pyproject.toml``.

    Example:
        >>> install_command("onnx")
        "pip install -e '.[onnx]' in the repository of fitsmall"
    """
    return f"pip install -e '.[{extra}]' in the repository of fitsmall"
