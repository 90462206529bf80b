"""``monkey serve``: an OpenAI-compatible server, vLLM's."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from monkey_model.commands.console import (
    PickleOption,
    check_free,
    one_error,
    report,
)


def serve(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory, of a whole model.")],
    plain: Annotated[
        bool, typer.Option("--plain", help="Ask in upstream's form instead of ChatML.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    allow_pickle: PickleOption = False,
) -> None:
    """Answer OpenAI's chat completions with vLLM. Other options are those of vllm serve."""
    if find_spec("vllm") is None:
        report('vLLM is not installed: pip install "monkey-vision[vllm]"')
        raise typer.Exit(2)

    from monkey_model.serving.vllm import (
        CONNECTOR,
        CONNECTOR_VARIABLE,
        PLAIN_TEMPLATE,
        check_servable,
    )

    with one_error():
        pictures = check_servable(checkpoint, allow_pickle)
        check_free(host, port)
    # Of an option that comes twice vLLM takes the last: the caller's.
    options = ["--limit-mm-per-prompt", json.dumps({"image": pictures})]
    if plain:
        options += ["--chat-template", str(PLAIN_TEMPLATE)]
    command = ["serve", str(checkpoint), "--host", host, "--port", str(port), *options]
    os.environ.setdefault(CONNECTOR_VARIABLE, CONNECTOR)
    # In place of this process, so that signals and the exit code are the server's.
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    os.execv(sys.executable, [*vllm, *command, *context.args])
