"""The entry point of the command `rtpurbo`; the commands are in `rtpurbo.commands`."""

import os
import sys

_USER_ERRORS = (ValueError, TypeError, OSError, NotImplementedError, ImportError)


def main() -> None:
    """Runs the command line, or says what to install for it.

    What the library refuses is one line on stderr and exit status 2; with RTPURBO_TRACEBACK=1 in
    the environment it is a traceback.
    """
    try:
        from rtpurbo.commands import app
    except ImportError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.exit(
            f"rtpurbo: the command line needs {error.name}; install it with: "
            "pip install 'rtpurbo[demo]'"
        )
    try:
        app()
    except _USER_ERRORS as error:
        if os.environ.get("RTPURBO_TRACEBACK") == "1":
            raise
        print(_line(error), file=sys.stderr)
        sys.exit(2)


def _line(error: Exception) -> str:
    """The message on one line, begun with the program's name."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.startswith("rtpurbo") else f"rtpurbo: {text}"
