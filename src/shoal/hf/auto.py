"""`AutoDistributedModelForCausalLM`: a swarm's model, opened as transformers opens one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from shoal.base.errors import ConfigError
from shoal.client.config import ClientConfig
from shoal.client.tending import TendConfig
from shoal.hf.chain_row import Chains
from shoal.hf.connection import Connection, Joining, Place, check_served, common_encoding
from shoal.hf.head import load_head
from shoal.hf.model import DistributedModelForCausalLM
from shoal.model.families import num_blocks
from shoal.model.hub import Hub
from shoal.model.known import default_cache_dir
from shoal.model.manifest import model_hash
from shoal.model.rows import DTYPES
from shoal.model.source import ModelSource, open_source
from shoal.wire.tensors import INT8_BLOCK

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""How long a session looks for a chain when servers are full, load or fail."""


class AutoDistributedModelForCausalLM:
    """Not for instances: `from_pretrained` gives a `DistributedModelForCausalLM`."""

    def __init__(self) -> None:
        raise ConfigError("call AutoDistributedModelForCausalLM.from_pretrained(MODEL, join=...)")

    @staticmethod
    def from_pretrained(
        model: str | Path | ModelSource,
        *,
        join: str | Sequence[str] | Place,
        swarm: str | None = None,
        invite: str | None = None,
        dtype: str | torch.dtype | Literal["auto"] = "auto",
        device: str = "cpu",
        compress: bool = False,
        borders: Sequence[int] | None = None,
        patience_s: float = PATIENCE_S,
        standby: int = 0,
        cache_dir: str | Path | None = None,
    ) -> DistributedModelForCausalLM:
        """Join a swarm and load the parts of a model that run here: embedding, norm, head.

        Args:
            model: as on the command line: a directory with config.json and *.safetensors,
                a .gguf file, a known name that was fetched, or ORG/NAME or ORG/NAME@REVISION
                of the Hugging Face hub, fetched unless it is in the cache. It must be the
                very model that the servers hold.
            join: addresses from servers' ready lines, or a `LocalSwarm`.
            swarm: the swarm's name, if it has one.
            invite: the invite to a private swarm.
            dtype: of embedding and head, and of the rows sent; "auto": what most servers
                compute in.
            device: where embedding and head run.
            compress: whether servers may send each other 8-bit rows. Lossy.
            borders: where `output_hidden_states` looks, from 0 to the number of blocks.
            patience_s: how long to look for a chain when servers are full or failing.
            standby: servers that stand by for each hop of a chain and keep up with it: a death
                then costs a moment, however long the text is. They compute everything as well.
            cache_dir: where known models and hashes are kept (default: ~/.cache/shoal).

        Raises:
            ConfigError: a wrong argument, or the swarm serves another model.
            ModelError: unknown, broken or unsupported.
            NoRouteError: nobody has some of the blocks.
            PeerError: no server answers.
        """
        place = Joining.parse(join, swarm, invite) if isinstance(join, str | Sequence) else join
        directory = default_cache_dir({}) if cache_dir is None else Path(cache_dir)
        source = open_source(model, directory, Hub()) if isinstance(model, str | Path) else model
        name = model_hash(source, directory)
        config = ClientConfig(
            model=name,
            num_blocks=num_blocks(source.config),
            hidden_size=int(source.config.hidden_size),
            patience_s=patience_s,
            tending=TendConfig(standby=standby),
        )
        connection = Connection(place, config)
        try:
            visit = connection.visit
            given = str(model) if isinstance(model, str | Path) else "the given model"
            check_served(visit.snapshot, given=given, model=name, num_blocks=config.num_blocks)
            encoding = _dtype_name(dtype) or common_encoding(visit.snapshot, name)
            head = load_head(source, dtype=encoding, device=device)
            chains = Chains(
                client=visit.client,
                head=head,
                encoding=encoding,
                inner_encoding=INT8_BLOCK if compress else None,
            )
            opened = DistributedModelForCausalLM(
                source.config,
                head=head,
                connection=connection,
                chains=chains,
                model_name=name,
                borders=None if borders is None else _whole(borders, config.num_blocks),
                load_tokenizer=source.tokenizer,
            )
        except BaseException:
            connection.close()
            raise
        opened.generation_config = _generation_config(source)
        return opened


def _whole(borders: Sequence[int], num_blocks: int) -> tuple[int, ...]:
    chosen = tuple(borders)
    if sorted(set(chosen)) != list(chosen) or (chosen[:1], chosen[-1:]) != ((0,), (num_blocks,)):
        raise ConfigError(f"borders {chosen}: give rising numbers, from 0 to {num_blocks}")
    return chosen


def _dtype_name(dtype: str | torch.dtype) -> str | None:
    if dtype == "auto":
        return None
    for name, known in DTYPES.items():
        if dtype in (name, known):
            return name
    raise ConfigError(f"dtype {dtype!r} is not 'auto' or one of {', '.join(DTYPES)}")


def _generation_config(source: ModelSource) -> Any:
    """What the model's files say about generation, as transformers reads it."""
    directory = source.files[0].parent if source.files else None
    if directory is not None and (directory / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(directory)
    else:
        config = GenerationConfig.from_model_config(source.config)
    if config.cache_implementation is not None:
        logger.info("cache_implementation of the model is not used: the cache is at the servers")
        config.cache_implementation = None
    if config.eos_token_id is None and source.eos_token_ids:
        config.eos_token_id = list(source.eos_token_ids)
    return config
