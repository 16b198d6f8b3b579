"""The entry point of the command `rtpurbo`; the commands are in `rtpurbo.commands`."""

import sys


def main() -> None:
    """Runs the command line, or says what to install for it."""
    try:
        from rtpurbo.commands import app
    except ImportError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.exit(
            f"rtpurbo: the command line needs {error.name}; install it with: "
            "pip install 'rtpurbo[demo]'"
        )
    app()
