"""The half of both torch backends that holds adapters beside the open sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from shoal.base.adapters import AdapterId, AdapterManifest, AdapterPart
from shoal.base.backend import SequenceId
from shoal.base.errors import InternalError
from shoal.base.spans import Span
from shoal.model.device_thread import DeviceThread
from shoal.model.lora_rows import LoraLayers
from shoal.model.sequences import C, Sequences


class AdaptedSequences(Sequences[C]):
    """Sequences whose rows may go through adapters; see BlockBackend."""

    def __init__(
        self,
        served: Span,
        new_cache: Callable[[Span], C],
        fork: Callable[[C, int], C],
        layers: LoraLayers,
        thread: DeviceThread,
    ) -> None:
        super().__init__(served, new_cache, fork)
        self._layers = layers
        self._lora_thread = thread
        self._loaded: set[AdapterId] = set()

    def open(self, sequence: SequenceId, span: Span, adapter: AdapterId | None = None) -> None:
        """Start an empty sequence over `span`, with a loaded adapter or none."""
        if adapter is not None and adapter not in self._loaded:
            raise InternalError(f"adapter {adapter} is not loaded")
        super().open(sequence, span, adapter)

    def check_adapter(self, manifest: AdapterManifest) -> None:
        """See that an adapter fits our blocks."""
        self._layers.check(manifest)

    async def load_adapter(self, adapter: AdapterId, part: AdapterPart) -> None:
        """Take the tensors in, block by block between passes."""
        if adapter in self._loaded:
            raise InternalError(f"adapter {adapter} is loaded already")
        self._layers.check(part.manifest)
        run = self._lora_thread.run
        try:
            for block in part.manifest.within(self._served):
                for size in self._layers.unprobed(part.manifest, block):
                    steps = self._layers.probe(size)
                    while not await run(partial(next, steps, True)):
                        pass  # passes of others have their turn between steps
                data = part.blocks[block.index]
                await run(partial(self._layers.load, adapter, part.manifest, block, data))
        except BaseException:
            await run(partial(self._layers.drop, adapter))
            raise
        self._loaded.add(adapter)

    async def drop_adapter(self, adapter: AdapterId) -> None:
        """Free an adapter."""
        self._loaded.discard(adapter)
        await self._lora_thread.run(partial(self._layers.drop, adapter))

    async def _drop_adapters(self) -> None:
        """Leave the layers as they were: another backend may run them from now on."""
        for adapter in list(self._loaded):
            await self.drop_adapter(adapter)

    def holds_adapter(self, adapter: AdapterId) -> bool:
        """Whether it is loaded as a whole."""
        return adapter in self._loaded
