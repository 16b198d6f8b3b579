"""The application that the commands belong to."""

from typing import NoReturn

import typer
from rich.console import Console

app = typer.Typer(
    help="Turn a full-attention Hugging Face model into a sparse one, and run it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()


def fail(message: str) -> NoReturn:
    """Ends the program with a line on stderr and exit status 2."""
    typer.echo(f"rtpurbo: {message}", err=True)
    raise typer.Exit(2)
