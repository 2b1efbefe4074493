"""The clock of a training: which optimizer step it is, and the window of steps of each stage."""

from typing import Any, NamedTuple

__all__ = ["NEVER", "Clock", "Window"]


class Window(NamedTuple):
    """Optimizer steps between which a stage grows from nothing to its full strength.

    Args:
        first: Number of steps that are taken before the stage begins.
        last: Number of steps after which the stage is at its full strength.

    Example:
        >>> Window(100, 300).progress(150)
        0.25
    """

    first: int
    last: int

    def progress(self, now: int) -> float:
        """Return the fraction of the window that has passed, in [0, 1].

        Args:
            now: Steps by the clock.
        """
        return min(1.0, max(0.0, (now - self.first) / max(1, self.last - self.first)))


NEVER = Window(2**62, 2**62)
"""The window of a stage before training begins."""


class Clock:
    """A counter of optimizer steps; while it is paused, they do not count for the windows.

    Attributes:
        steps: All steps taken.
        paused_steps: Steps taken while the clock was paused.
        windows: Window of each stage, by its key; fixed once training has begun.

    Example:
        >>> clock = Clock()
        >>> clock.tick()
        >>> clock.pause()
        >>> clock.tick()
        >>> clock.steps, clock.now
        (2, 1)
    """

    def __init__(self) -> None:
        self.steps = self.paused_steps = 0
        self.paused = False
        self.windows: dict[str, Window] = {}

    @property
    def now(self) -> int:
        """Steps that count for the windows."""
        return self.steps - self.paused_steps

    @property
    def upcoming(self) -> int:
        """Steps that count for the windows, including the one that is being taken."""
        return self.now + (not self.paused)

    def pause(self) -> None:
        """Stop the windows: the next steps do not count for them."""
        self.paused = True

    def resume(self) -> None:
        """Let steps count for the windows again."""
        self.paused = False

    def tick(self) -> None:
        """Count a step."""
        self.steps += 1
        self.paused_steps += self.paused

    def state_dict(self) -> dict[str, Any]:
        """Return steps and windows as plain numbers."""
        windows = {key: list(window) for key, window in self.windows.items()}
        return {
            "steps": self.steps,
            "paused_steps": self.paused_steps,
            "paused": self.paused,
            "windows": windows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state that :meth:`state_dict` returned."""
        self.steps, self.paused_steps = state["steps"], state["paused_steps"]
        self.paused = state["paused"]
        self.windows = {key: Window(*window) for key, window in state["windows"].items()}
