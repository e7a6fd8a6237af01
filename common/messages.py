"""What a normal run prints, and its warnings."""

import sys


def say(text: str) -> None:
    """Print one line of a normal run."""
    print(text, flush=True)


def warn(text: str) -> None:
    """Print a warning."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
