"""The command `mcp-vllm`: only puts the commands together.

A command's module is imported when that command is called, so `mcp-vllm --help` stays quick.
"""

import importlib
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from mcp_vllm import __version__
from mcp_vllm.errors import McpError


@dataclass(frozen=True)
class Command:
    """One entry of `mcp-vllm --help`: the module that holds its typer `app`, and its help line."""

    module: str
    summary: str


# A new command goes here. Make its app with add_completion=False, as the one below is made.
COMMANDS = {
    "demo": Command("mcp_vllm.cli.demo", "Move a chat between two real engines, show the saving."),
    "agent": Command("mcp_vllm.cli.agent", "Run a context agent on its own."),
    "stage": Command("mcp_vllm.cli.stage", "Run some layers of a model for engines elsewhere."),
    "plan": Command("mcp_vllm.cli.plan", "Where to split a model, and whether it pays."),
    "doctor": Command("mcp_vllm.cli.doctor", "Say what would stop it from working here."),
    "sessions": Command("mcp_vllm.cli.sessions", "List, move, fork, pin, park, export sessions."),
    "cache": Command("mcp_vllm.cli.cache", "Say why blocks are kept, or are not."),
    "peers": Command("mcp_vllm.cli.peers", "Show the peers, their links and codecs."),
    "codec": Command("mcp_vllm.cli.codec", "Calibrate lossy codecs for a model."),
    "bench": Command("mcp_vllm.cli.bench", "Measure what a lossy codec costs your model."),
    "certs": Command("mcp_vllm.cli.certs", "Make a CA, and certificates for hosts and clients."),
    "token": Command("mcp_vllm.cli.token", "Make a bearer token from a signing key."),
    "config": Command("mcp_vllm.cli.config", "Check a configuration file, show the settings."),
}


class LazyGroup(TyperGroup):
    """Lists commands from the table above and imports one only to run it."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """What the help needs to know of a command; resolve_command gives the one to run."""
        command = COMMANDS.get(cmd_name)
        return command and TyperCommand(cmd_name, help=command.summary)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            module = importlib.import_module(COMMANDS[name].module)
            command = typer.main.get_command(module.app)
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run a command; an error of ours ends it with its message alone and exit code 1."""
        try:
            return super().invoke(ctx)
        except McpError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, add_completion=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mcp-vllm {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """Sessions that follow the user between vLLM engines."""


if __name__ == "__main__":
    app()
