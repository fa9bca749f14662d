"""LoRA adapters of a model whose blocks are at servers, as transformers' models have them.

An adapter is brought to the servers by whoever opens sessions with it, or it is one that they
serve. Each cache and session keeps the adapter that it began with; different ones run side by
side. Training new ones is `shoal.hf.tuning_model` and `docs/finetuning.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from shoal.base.adapters import AdapterName, AdapterPart, adapter_name
from shoal.base.errors import BadInput, ConfigError
from shoal.client.adapters import find_adapter
from shoal.hf.chain_row import Chains
from shoal.hf.connection import Connection
from shoal.model.adapter_files import read_peft

DEFAULT: Final = "default"
"""What an adapter is called that was given no name, as in transformers."""

_chosen: ContextVar[str | None] = ContextVar("chosen_adapter", default=None)
"""The adapter of the running `generate`; None: the active one."""


class WithAdapters:
    """The adapter half of `DistributedModelForCausalLM`."""

    connection: Connection
    config: Any
    _chains: Chains

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._adapters: dict[str, AdapterName] = {}
        self._brought: set[str] = set()
        """Names of those that we bring ourselves."""
        self._active = ""
        self._is_disabled = False

    def load_adapter(
        self, peft_model_id: str | Path | AdapterPart, adapter_name: str = DEFAULT
    ) -> None:
        """Take an adapter, and use it in all sessions that begin from now on.

        Args:
            peft_model_id: a directory as PEFT saves it, the name of an adapter that servers
                serve, or tensors (`shoal.model.adapter_tensors.adapter_of`).
            adapter_name: what to call it here.

        Raises:
            AdapterBad: the directory holds none that can be used.
            ConfigError: nobody has it, or the name is taken.
        """
        if adapter_name in self._adapters or not adapter_name:
            raise ConfigError(f"adapter name {adapter_name!r} is taken, or empty: give another one")
        self.connection.check_open()
        part = peft_model_id if isinstance(peft_model_id, AdapterPart) else None
        if part is None and Path(str(peft_model_id)).is_dir():
            part = read_peft(Path(str(peft_model_id)), self.config)
        if part is not None:
            self._adapters[adapter_name] = self.connection.loop.run(self._offer(part))
            self._brought.add(adapter_name)
        else:
            found = self.connection.loop.run(self._find(str(peft_model_id)))
            self._adapters[adapter_name] = found
        self.set_adapter(adapter_name)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Use this adapter in sessions that begin from now on.

        Raises:
            ConfigError: none of that name, or several at once.
        """
        if not isinstance(adapter_name, str):
            raise ConfigError("one adapter at a time: sessions have one or none")
        self._known(adapter_name)
        self._active, self._is_disabled = adapter_name, False

    def disable_adapters(self) -> None:
        """Sessions that begin from now on have none, until `enable_adapters`."""
        self._is_disabled = True

    def enable_adapters(self) -> None:
        """Use the active adapter again."""
        self._is_disabled = False

    def active_adapters(self) -> list[str]:
        """The adapter of sessions that begin now; empty for none."""
        return [self._active] if self._active and not self._is_disabled else []

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Forget adapters. Sessions that have them may fail when a server is lost.

        Raises:
            ConfigError: none of that name.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            found = self._known(name)
            if name in self._brought:
                self.connection.loop.run(self._withdraw(found))
            self._brought.discard(name)
            del self._adapters[name]
            if self._active == name:
                self._active = ""

    @contextmanager
    def _using(self, adapter: str | None) -> Iterator[None]:
        """Sessions that begin inside have this adapter; None: no change."""
        token = _chosen.set(_chosen.get() if adapter is None else adapter)
        try:
            yield
        finally:
            _chosen.reset(token)

    def _chains_with(self, adapter: str | None) -> Chains:
        """Chains whose sessions have this adapter; empty: none; None: the one in force."""
        label = _chosen.get() if adapter is None else adapter
        if label is None:
            label = self._active if self.active_adapters() else ""
        name = self._known(label) if label else b""
        return replace(self._chains, adapter=name)

    def _check_no_adapter(self) -> None:
        """Refuse to train beside an adapter.

        Raises:
            BadInput: one is in force.
        """
        if self._chains_with(None).adapter:
            raise BadInput(
                "an adapter is in use, and whole sequences with gradients or padding run without "
                "one: call disable_adapters(), or give the adapter as tuning"
            )

    def _known(self, name: str) -> AdapterName:
        found = self._adapters.get(name) or adapter_name(name)
        if found is None:
            known = ", ".join(sorted(self._adapters)) or "none"
            raise ConfigError(f"no adapter is called {name!r} here (there is {known})")
        return found

    async def _find(self, text: str) -> AdapterName:
        return find_adapter(self._chains.client.view(), text)

    async def _offer(self, part: AdapterPart) -> AdapterName:
        return self._chains.client.adapters.add(part)

    async def _withdraw(self, name: AdapterName) -> None:
        self._chains.client.adapters.remove(name)
