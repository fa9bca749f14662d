"""`shoal model get` and `shoal model list`: models that can be fetched by name."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli.logs import progress_bar
from shoal.cli.models import cache_dir


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Fetch models by name.", no_args_is_help=True, rich_markup_mode=None)
    group.command("get")(get)
    group.command("list")(list_known)
    app.add_typer(group, name="model")


def get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="See: shoal model list.")],
) -> None:
    """Download a known model, check its SHA-256 and keep it in the cache.

    The last line on stdout is the path of the file. What is in the cache already is only
    checked. The cache is $SHOAL_CACHE, or else ~/.cache/shoal.

    \b
    Example:
      shoal model get smollm2-135m-instruct
    """
    from shoal.model.known import get_model

    with progress_bar(is_bytes=True) as progress:
        path = get_model(name, cache_dir(), progress)
    print(path, flush=True)


def list_known() -> None:
    """List the models that `shoal model get` knows, and where the fetched ones are.

    \b
    Example:
      shoal model list
    """
    from shoal.model.known import KNOWN_MODELS

    for name, known in sorted(KNOWN_MODELS.items()):
        path = cache_dir() / "models" / name / known.file_name
        size = f"{known.num_bytes / 1e6:.0f} MB"
        print(f"{name}  {size}  {known.licence}  {path if path.exists() else '(not fetched)'}")
