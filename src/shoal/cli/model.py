"""`shoal model`: fetch models, list them, see what a model costs and how it runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from shoal.base.errors import ConfigError
from shoal.cli.models import cache_dir, fetch_model, open_outline, quiet_transformers
from shoal.cli.options import JsonOption

if TYPE_CHECKING:
    from shoal.model.facts import ModelFacts, Support

_MEMORY_GIB: Final = (4.0, 8.0, 16.0, 24.0, 48.0, 80.0)
_CACHE_TOKENS: Final = 8192
"""As `shoal serve` keeps by default."""

_DTYPES: Final = ("float32", "bfloat16")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(
        help="Fetch models by name, inspect them.", no_args_is_help=True, rich_markup_mode=None
    )
    group.command("get")(get)
    group.command("list")(list_known)
    group.command("inspect")(inspect)
    app.add_typer(group, name="model")


def get(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A known name (see: shoal model list), or ORG/NAME or ORG/NAME@REVISION of the "
            "Hugging Face hub.",
        ),
    ],
) -> None:
    """Download a model and print where it is.

    A known name: its file is checked by SHA-256 and kept in $SHOAL_CACHE, or else
    ~/.cache/shoal; what is there already is only checked.

    ORG/NAME: config, tokenizer files and safetensors of a repository of the Hugging Face hub,
    never pickled weights or code, kept in the hub's own cache ($HF_HOME, or else
    ~/.cache/huggingface). Gets the newest commit of the branch each time; other commands take
    what is there. Finished files are kept when it is interrupted. Gated and private models
    need `hf auth login` or HF_TOKEN.

    The last line on stdout is the path of the file or directory.

    \b
    Examples:
      shoal model get smollm2-135m-instruct
      shoal model get HuggingFaceTB/SmolLM2-360M-Instruct
      shoal model get ORG/NAME@v1.0
    """
    print(fetch_model(name), flush=True)


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


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            show_default=False,
            help="A directory, a .gguf file, a known name or a hub id, as for shoal serve.",
        ),
    ] = None,
    families: Annotated[
        bool, typer.Option("--families", help="Print the table of all tested architectures.")
    ] = False,
    memory: Annotated[
        list[float] | None,
        typer.Option(
            metavar="GIB",
            show_default=False,
            help="A server's memory; repeat for more (default: 4 8 16 24 48 80).",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a model costs and how it can be served; weights are not read.

    Of ORG/NAME of the Hugging Face hub only config and tokenizer are fetched.

    Engine: batched (many sessions share a pass) or per-session. Truncate and fork: a session
    can be cut back or forked at any length, only within its last 64 tokens (margin, beyond
    that it starts again: sliding windows), or only at its start (recurrent blocks). Exact:
    replayed sessions repeat every bit: yes, or where a probe at start finds how (probe).

    \b
    Example:
      shoal model inspect smollm2-135m-instruct --memory 2
      shoal model inspect ORG/NAME
      shoal model inspect --families
    """
    if families == (model is not None):
        raise ConfigError("give either a MODEL or --families")
    if model is None:
        _print_families(as_json)
        return
    source = open_outline(model)
    from shoal.model.facts import model_facts

    facts = model_facts(source.config)
    sizes = tuple(memory or _MEMORY_GIB)
    if as_json:
        print(json.dumps(_facts_dict(facts, sizes)))
    else:
        _print_facts(facts, sizes)


def _print_families(as_json: bool) -> None:
    quiet_transformers()
    from shoal.model.facts import support_table

    rows = support_table()
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print(f"{'architecture':<14}{'engine':<13}{'truncate':<10}{'fork':<8}exact")
    for row in rows:
        print(f"{row.architecture:<14}{row.engine:<13}{row.truncate:<10}{row.fork:<8}{row.exact}")
    print("Other causal language models of transformers are tried, behind start-up probes.")


def _facts_dict(facts: ModelFacts, sizes: tuple[float, ...]) -> dict[str, Any]:
    fit = {
        dtype: {f"{gib:g}": facts.blocks_that_fit(gib, dtype, _CACHE_TOKENS) for gib in sizes}
        for dtype in _DTYPES
    }
    return {**asdict(facts), "cache_tokens": _CACHE_TOKENS, "blocks_by_gib": fit}


def _longer(facts: ModelFacts) -> str:
    if facts.context_tokens <= facts.session_tokens_max:
        return ""
    return (
        f" of {facts.context_tokens}: rotary tables would change beyond\n"
        "              (longrope: for long sessions copy long_factor over short_factor "
        "in config.json)"
    )


def _print_facts(facts: ModelFacts, sizes: tuple[float, ...]) -> None:
    print(f"architecture  {facts.support.architecture}{_caution(facts.support)}")
    print(f"blocks        {facts.num_blocks} of {facts.hidden_size} values per row")
    print(f"vocabulary    {facts.vocabulary}")
    print(f"session       up to {facts.session_tokens_max} tokens{_longer(facts)}")
    print(f"engine        {facts.support.engine}")
    print(f"truncate      {facts.support.truncate}")
    print(f"fork          {facts.support.fork}")
    print(f"exact         {facts.support.exact}")
    for dtype in _DTYPES:
        weights, cache = facts.block_bytes[dtype], facts.kv_bytes_per_token[dtype]
        largest = f"{max(weights) / 1e6:.1f} MB a block"
        print(
            f"{dtype:<14}{largest}, {sum(weights) / 1e9:.2f} GB all blocks, "
            f"KV cache {sum(cache) / 1e3:.1f} kB per token (all blocks)"
        )
    for gib in sizes:
        counts = ", ".join(
            f"{facts.blocks_that_fit(gib, dtype, _CACHE_TOKENS)} in {dtype}" for dtype in _DTYPES
        )
        print(f"{f'{gib:g} GiB':<14}blocks with a cache of {_CACHE_TOKENS} tokens: {counts}")


def _caution(support: Support) -> str:
    return "" if support.is_tested else " (untested: relies on the start-up probes)"
