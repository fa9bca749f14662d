"""Models of the Hugging Face hub, named `ORG/NAME` or `ORG/NAME@REVISION`.

`huggingface_hub` does the transfer and keeps its own cache, with its own settings (HF_HOME,
HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE). Here is decided what is taken: config, tokenizer and
safetensors, never pickles, never code. Config and index come first, so that a model which
cannot be served is refused before its weights travel.

All weights are fetched, whatever span is served: a model is named by the hashes of all its
tensors. Who wants only a span's tensors takes them from peers (`cli/peer_weights.py`).
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from shoal.base.errors import ConfigError, ModelUnsupported
from shoal.model.hub_errors import translated
from shoal.model.hub_files import CONFIG, INDEX, HubId, choose_files, files_of_index, is_whole
from shoal.model.known import Progress

logger = logging.getLogger(__name__)

_FILES_AT_ONCE: Final = 4
"""Each file is a connection or more; and Ctrl-C waits until each has its next 10 MB."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """How the hub is reached; None: as `huggingface_hub` is set up."""

    endpoint: str | None = None
    """Address of the hub, `https://...`."""
    cache_dir: Path | None = None
    """Where `huggingface_hub` keeps repositories."""
    progress: Progress | None = None
    """Told how far a download is; None: `huggingface_hub` shows its own bars."""

    def resolve(self, hub_id: HubId) -> Path:
        """The model's directory: the cached one, without asking anybody, else fetched.

        Raises:
            ModelError, ConfigError: as `fetch`.
        """
        return self.cached(hub_id) or self.fetch(hub_id)

    def cached(self, hub_id: HubId) -> Path | None:
        """The snapshot in the cache, if its config and all its weights are there."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            hub_id.repo, CONFIG, cache_dir=self.cache_dir, revision=hub_id.revision
        )
        if not isinstance(found, str):
            return None
        directory = Path(found).parent
        return directory if is_whole(directory) else None

    def fetch(self, hub_id: HubId) -> Path:
        """Ask the hub what the revision is now, download what is missing of it.

        Files that are finished are kept if it fails. Without a network a cached snapshot
        must do, which is logged.

        Raises:
            ModelUnknown: no such repository or revision.
            ModelUnsupported: no safetensors, or an architecture that can't be served.
            ModelCorrupt: files that can't be.
            ConfigError: gated, offline, no network, no room; says how to go on.
        """
        try:
            listing = self._listing(hub_id)
        except ConfigError as error:
            cached = self.cached(hub_id)
            if cached is None:
                raise
            logger.warning("the cached copy of %s is used: %s", hub_id, error.detail)
            return cached
        small, weights = choose_files(hub_id, listing.sizes)
        directory = self._fetch_small(hub_id, listing, small)
        if weights is None:
            weights = files_of_index(directory / INDEX, listing.sizes)
        self._download(hub_id, listing, weights)
        # Last, so that an update which is interrupted leaves the name at the older snapshot.
        self._snapshot(hub_id, hub_id.revision, [CONFIG], None)
        return directory

    def preview(self, hub_id: HubId) -> Path:
        """A directory with config and tokenizer; weights may be missing.

        Raises:
            ModelError, ConfigError: as `fetch`.
        """
        cached = self.cached(hub_id)
        if cached is not None:
            return cached
        listing = self._listing(hub_id)
        small, _ = choose_files(hub_id, listing.sizes)
        return self._fetch_small(hub_id, listing, small)

    def _listing(self, hub_id: HubId) -> _Listing:
        from huggingface_hub import HfApi

        with translated(str(hub_id), self.endpoint):
            info = HfApi(endpoint=self.endpoint).model_info(
                hub_id.repo, revision=hub_id.revision, files_metadata=True
            )
        if info.sha is None or info.siblings is None:
            raise ConfigError(f"{hub_id}: the hub names no commit or no files: try again later")
        sizes = {one.rfilename: one.size or 0 for one in info.siblings}
        return _Listing(commit=info.sha, sizes=sizes)

    def _fetch_small(self, hub_id: HubId, listing: _Listing, names: Sequence[str]) -> Path:
        from shoal.model.families import family_of
        from shoal.model.safetensors_source import read_config

        directory = self._download(hub_id, listing, names)
        try:
            family_of(read_config(directory))
        except ModelUnsupported as error:
            raise ModelUnsupported(f"{hub_id}: {error.detail}") from error
        return directory

    def _download(self, hub_id: HubId, listing: _Listing, names: Sequence[str]) -> Path:
        directory = self._snapshot(hub_id, listing.commit, names, listing)
        # Where the hub fails early, `snapshot_download` may give the folder as it was.
        missing = [name for name in names if not (directory / name).exists()]
        if missing:
            raise ConfigError(
                f"{hub_id}: the hub did not send {missing[0]}: try again; finished files are kept"
            )
        return directory

    def _snapshot(
        self, hub_id: HubId, revision: str | None, names: Sequence[str], listing: _Listing | None
    ) -> Path:
        from huggingface_hub import snapshot_download

        total = 0 if listing is None else self._missing_bytes(hub_id, listing, names)

        def download(stop: threading.Event) -> str:
            return snapshot_download(
                hub_id.repo,
                revision=revision,
                allow_patterns=list(names),
                cache_dir=self.cache_dir,
                endpoint=self.endpoint,
                max_workers=_FILES_AT_ONCE,
                tqdm_class=_bar_class(self.progress, total, stop),
            )

        with translated(str(hub_id), self.endpoint):
            return Path(_stoppable(download))

    def _missing_bytes(self, hub_id: HubId, listing: _Listing, names: Sequence[str]) -> int:
        from huggingface_hub import constants, try_to_load_from_cache

        def is_here(name: str) -> bool:
            found = try_to_load_from_cache(
                hub_id.repo, name, cache_dir=self.cache_dir, revision=listing.commit
            )
            return isinstance(found, str)

        missing_bytes = sum(listing.sizes[name] for name in names if not is_here(name))
        folder = Path(self.cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free_bytes = shutil.disk_usage(existing).free
        if missing_bytes > free_bytes:
            raise ConfigError(
                f"{hub_id}: {folder} has {free_bytes} bytes free, {missing_bytes} are needed: make "
                "room, or set HF_HOME to another disk"
            )
        return missing_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listing:
    """The files of one commit."""

    commit: str
    sizes: Mapping[str, int]
    """Bytes, by path in the repository."""


def _stoppable(work: Callable[[threading.Event], _T]) -> _T:
    """Run `work` in a thread; when this one is interrupted, tell it to stop and wait for it.

    The downloads are threads of `huggingface_hub`, which nobody else could interrupt.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="hub") as pool:
        try:
            return pool.submit(work, stop).result()
        except BaseException as error:
            stop.set()
            if not isinstance(error, Exception):
                _abort_xet()
            raise


def _abort_xet() -> None:
    # The hub's own transport checks for signals, but only the main thread gets those.
    try:
        from huggingface_hub.utils._xet import abort_xet_session
    except ImportError:
        logger.info("this huggingface_hub cannot abort: the files at hand are finished first")
        return
    abort_xet_session()  # type: ignore[no-untyped-call]


def _bar_class(progress: Progress | None, total: int, stop: threading.Event) -> type:
    """A bar as `huggingface_hub` wants them, that tells `progress` and heeds `stop`."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        """One of them counts files, others bytes."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            self._is_bytes = kwargs.get("unit") == "B"
            if progress is not None:
                kwargs["disable"] = True
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise KeyboardInterrupt
            if progress is None:
                return super().update(n)  # type: ignore[no-any-return]
            if self._is_bytes:
                self.n += n or 0
                progress("downloading", min(int(self.n), total), total)
            return None

    return Bar
