"""Completion of ``fitsmall`` commands and settings in a shell."""

import os
from inspect import isabstract
from typing import Any

from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.completion_plugin import CompletionPlugin

__all__ = ["SCRIPTS", "complete"]

# Shells give the line in COMP_LINE. Bash splits words at `=`, and wants only the part after it.
_BASH = """\
_fitsmall() {
    local line="${COMP_LINE:0:$COMP_POINT}" word current cut
    word="${line##* }" current="${COMP_WORDS[COMP_CWORD]}"
    if [[ "$current" == "=" ]]; then cut="$word"; else cut="${word%"$current"}"; fi
    COMPREPLY=($(COMP_LINE="$line" fitsmall complete))
    COMPREPLY=("${COMPREPLY[@]#"$cut"}")
}
complete -o nospace -o default -F _fitsmall fitsmall
"""

SCRIPTS = {
    "bash": _BASH,
    "zsh": f"autoload -Uz bashcompinit && bashcompinit\n{_BASH}",
    "fish": "complete -c fitsmall -f -a '(COMP_LINE=(commandline -cp) fitsmall complete)'\n",
}


def complete(commands: list[str]) -> None:
    """Print all completions of the last word in the variable ``COMP_LINE``, one a line.

    Args:
        commands: Names of the commands of ``fitsmall``.

    Example:
        >>> os.environ["COMP_LINE"] = "fitsmall tr"
        >>> complete(["train", "inspect"])
        train
    """
    _, *words = os.environ.get("COMP_LINE", "").split(" ")
    if len(words) < 2:
        print("\n".join(c for c in commands if c.startswith(words[0] if words else "")))
    elif words[0] == "train":
        # Hydra takes the first word for the program's name.
        os.environ["COMP_LINE"] = " ".join(["fitsmall", *words[1:]])
        GlobalHydra.instance().clear()
        with initialize_config_module("fitsmall.configs", version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            plugins: Any = Plugins.instance().discover(CompletionPlugin)
            # Fish's plugin prints one completion a line.
            (plugin,) = (p for p in plugins if not isabstract(p) and p.provides() == "fish")
            plugin(loader).query("train")
