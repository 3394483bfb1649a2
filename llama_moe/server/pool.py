"""The models of a server: loaded when they are used, as many as fit, and unloaded when nobody needs them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import llama_moe
from llama_moe import errors
from llama_moe._sizes import format_size

from .discovery import ModelFile, find_models
from .errors import ApiError, shutting_down
from .loading import MemoryBudget, load_engine
from .request_meter import note_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from llama_moe import Engine, MemoryReport, Model

    from .settings import ServerSettings

logger = logging.getLogger("llama_moe.server")

_LISTED_NAMES = 8
# After a look at the model folders, which names that do not exist ask for too, there is none for this many times as long as it took, but
# not for longer than this.
_REST = 10.0
_LONGEST_REST_SECONDS = 1.0


@dataclass(slots=True, eq=False)
class ServedModel:
    """A loaded model.

    Attributes:
        name: what requests call it.
        file: where it was loaded from.
        engine: what generates; it is closed when the model is unloaded.
        memory: bytes by device and role.
        loaded_at: in seconds since 1970.
    """

    name: str
    file: ModelFile
    engine: Engine
    memory: MemoryReport
    loaded_at: float = field(default_factory=time.time)

    @property
    def model(self) -> Model:
        """The weights and the vocabulary."""
        return self.engine.model


@dataclass(slots=True, eq=False)
class _Place:
    """A model from the start of its load to the end of its unloading."""

    file: ModelFile
    users: int = 0  # requests that have it, or wait for its load
    served: ServedModel | None = None
    progress: float = 0.0
    last_used: float = field(default_factory=time.monotonic)
    leaving: bool = False  # who comes now waits until it is gone, and then for its next load
    load: asyncio.Task[ServedModel] | None = None
    unused: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class PoolListener(Protocol):
    """Who wants to know which models come and go; it is told on the event loop."""

    def on_load(self, served: ServedModel) -> None:
        """A model was loaded."""

    def on_unload(self, served: ServedModel) -> None:
        """A model was closed."""


class ModelPool:
    """Gives requests the models that they name. All of it runs on one event loop; what takes long, on threads.

    Args:
        settings: which models there are, how they are loaded, and how much memory they may take.
        listeners: told of each model that is loaded or closed.
    """

    def __init__(self, settings: ServerSettings, listeners: Sequence[PoolListener] = ()) -> None:
        self._settings = settings
        self._listeners = listeners
        self._files: dict[str, ModelFile] = {}
        self._places: dict[str, _Place] = {}
        self._budget = MemoryBudget(settings)
        self._one_load = asyncio.Lock()
        self._one_scan = asyncio.Lock()
        self._next_scan: asyncio.Task[dict[str, ModelFile]] | None = None
        self._rested_at = 0.0
        self._changed = asyncio.Event()
        self._reaper: asyncio.Task[None] | None = None
        self._unloading: set[asyncio.Task[None]] = set()  # which asyncio itself would forget
        self._started = False
        self._closing = False

    async def start(self) -> None:
        """Connects to the workers, looks for models and loads the first one that is named. Idempotent.

        Raises:
            FileNotFoundError: a file or folder is not there.
            LlamaMoeError: the model cannot be loaded, or a worker does not answer.
        """
        if self._started:
            return
        self._started = True
        for endpoint in self._settings.rpc:
            await asyncio.to_thread(llama_moe.add_rpc_device, endpoint)
        await self.files()
        if self._settings.ttl is not None:
            self._reaper = asyncio.create_task(self._unload_unused(self._settings.ttl))
        if self._settings.models:
            first = next(iter(self._files.values()))
            self._release(await self._take(first))

    async def files(self) -> dict[str, ModelFile]:
        """Every model that there is now, by its name, loaded or not. All who ask before the next look at the folders begins share it."""
        if self._next_scan is None:
            self._next_scan = asyncio.create_task(self._scan())
            self._next_scan.add_done_callback(_look_at_outcome)
        return dict(await asyncio.shield(self._next_scan))

    async def _scan(self) -> dict[str, ModelFile]:
        async with self._one_scan:
            await asyncio.sleep(max(self._rested_at - time.monotonic(), 0))
            self._next_scan = None  # who comes from here on may know of a file that this one does not see
            begin = time.monotonic()
            try:
                self._files = await asyncio.to_thread(find_models, self._settings)
            finally:
                end = time.monotonic()
                self._rested_at = end + min(_REST * (end - begin), _LONGEST_REST_SECONDS)
            return self._files

    def loaded(self) -> list[ServedModel]:
        """The models that are loaded now."""
        return [place.served for place in self._places.values() if place.served is not None]

    def loading(self) -> dict[str, float]:
        """The share done, 0 to 1, of each model that is being loaded or waits for that."""
        return {name: place.progress for name, place in self._places.items() if place.served is None}

    @contextlib.asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[ServedModel]:
        """Gives a model, which is not unloaded inside of the `with` block; loads it first if need be.

        Args:
            name: of the model; None: the only one there is.

        Raises:
            ApiError: there is no such model (404), it cannot be loaded, or the server shuts down.
        """
        file = await self._find(name)
        note_model(file.name)
        try:
            place = await self._take(file)
        except (errors.LlamaMoeError, OSError) as error:
            if self._closing:
                raise shutting_down() from None
            logger.error("%r cannot be loaded: %s", file.name, error)
            raise _load_error(file, error) from error
        served = place.served
        try:
            if served is None:  # closed as soon as it was loaded
                raise shutting_down()
            yield served
        except errors.DecodeError:
            if served is not None and served.engine.lost:
                self._give_up(place)
            raise
        finally:
            self._release(place)

    async def close(self) -> None:
        """Closes every model: what runs ends as cancelled. Idempotent."""
        self._closing = True
        if self._reaper is not None:
            self._reaper.cancel()
        places = list(self._places.values())
        loads = [place.load for place in places if place.load is not None]
        # A load heeds `_closing` at its next step; one that still waits for its turn, or for memory, does not begin.
        for place in places:
            place.unused.set()
            place.gone.set()
        await asyncio.gather(*loads, return_exceptions=True)
        await asyncio.gather(*(self._close_engine(place) for place in places), *self._unloading)
        self._places.clear()

    async def _find(self, name: str | None) -> ModelFile:
        if name is None:
            files = self._files or await self.files()
            if len(files) == 1:
                return next(iter(files.values()))
            raise ApiError(400, f"model is not given; {_names(files)}", param="model", code="model_required")
        if name not in self._files:
            await self.files()
        if name not in self._files:
            raise _not_found(name, self._files)
        return self._files[name]

    async def _take(self, file: ModelFile) -> _Place:
        """Counts a user of the model, once it is loaded."""
        while True:
            if self._closing:
                raise shutting_down()
            place = self._places.get(file.name)
            if place is None:
                place = self._places[file.name] = _Place(file)
                place.load = asyncio.create_task(self._load(place))
                place.load.add_done_callback(_look_at_outcome)
            if not place.leaving:
                break
            await place.gone.wait()
        place.users += 1
        place.unused.clear()
        try:
            assert place.load is not None  # noqa: S101
            # Others may wait for the load too: it goes on when this one is cancelled.
            await asyncio.shield(place.load)
        except BaseException:
            self._release(place)
            raise
        return place

    def _release(self, place: _Place) -> None:
        place.users -= 1
        place.last_used = time.monotonic()
        if place.users == 0:
            place.unused.set()
            self._changed.set()

    async def _load(self, place: _Place) -> ServedModel:
        """Makes room for a model and loads it, after those that came before."""
        name = place.file.name

        def on_progress(share: float) -> None:
            place.progress = share
            if self._closing:
                raise errors.ClosedError("the server shuts down")

        try:
            async with self._one_load:
                # A link may lead elsewhere by now, or the file be gone.
                files = await self.files()
                if name not in files:
                    raise _not_found(name, files)
                place.file = files[name]
                await self._make_room(place.file)
                begin = time.monotonic()
                engine = await asyncio.to_thread(load_engine, self._settings, place.file.path, on_progress)
        except BaseException as error:
            self._forget(place)
            if not place.users:  # nobody else tells of it
                logger.warning("%r was not loaded: %s", name, error)
            raise
        place.served = ServedModel(name, place.file, engine, engine.memory())
        for listener in self._listeners:
            listener.on_load(place.served)
        logger.info("loaded %r in %.1f s: %s", name, time.monotonic() - begin, format_size(place.served.memory.total_bytes))
        self._changed.set()
        return place.served

    async def _make_room(self, file: ModelFile) -> None:
        """Unloads others, those that nobody uses first and of these the least recently used, until the model fits."""
        while True:
            if self._closing:
                raise shutting_down()
            others = [place for place in self._places.values() if place.served is not None]
            missing = await asyncio.to_thread(self._budget.missing, file, [model.memory for model in self.loaded()])
            if missing is None:
                return
            if not others:
                raise missing
            await self._unload(min(others, key=lambda place: (not place.leaving, place.users > 0, place.last_used)))

    async def _unload(self, place: _Place) -> None:
        """Closes a model when those that have it are done, or waits until another's call has; who comes now waits for its next load."""
        if place.leaving:
            await place.gone.wait()
            return
        place.leaving = True
        if place.users:
            await place.unused.wait()
        await self._close_engine(place)
        self._forget(place)
        logger.info("unloaded %r", place.file.name)

    def _give_up(self, place: _Place) -> None:
        """Unloads a model whose engine can compute nothing any more; who asks for it next loads it anew, on the devices that are left.

        Closing such an engine may take seconds, which nobody has to wait for.
        """
        if not place.leaving and not self._closing:
            logger.error("the engine of %r is lost; it will be loaded anew", place.file.name)
            unloading = asyncio.create_task(self._unload(place))
            self._forget(place)
            self._unloading.add(unloading)
            unloading.add_done_callback(self._unloading.discard)

    async def _close_engine(self, place: _Place) -> None:
        if place.served is None:
            return
        await asyncio.to_thread(place.served.engine.close)
        served, place.served = place.served, None
        if served is not None:  # nobody else closed it meanwhile
            for listener in self._listeners:
                listener.on_unload(served)

    def _forget(self, place: _Place) -> None:
        if self._places.get(place.file.name) is place:
            del self._places[place.file.name]
        place.gone.set()

    async def _unload_unused(self, ttl: float) -> None:
        """Unloads what nobody used for `ttl` seconds, for as long as the pool is open."""
        while True:
            self._changed.clear()
            now = time.monotonic()
            unused = [place for place in self._places.values() if place.served is not None and not place.users and not place.leaving]
            for place in unused:
                if now - place.last_used >= ttl:
                    await self._unload(place)
            waits = [place.last_used + ttl - now for place in unused if not place.gone.is_set()]
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(waits, default=None))


def _look_at_outcome(task: asyncio.Task[Any]) -> None:
    """Keeps asyncio from telling of a failure for which nobody waited any more."""
    if not task.cancelled():
        task.exception()


def _not_found(name: str, files: dict[str, ModelFile]) -> ApiError:
    return ApiError(404, f"the model {name!r} does not exist; {_names(files)}", param="model", code="model_not_found")


def _load_error(file: ModelFile, error: Exception) -> ApiError:
    # Where the file lies is of no concern to clients.
    reason = str(error).replace(str(file.path), file.name)
    message = f"the model {file.name!r} cannot be loaded: {reason}"
    if isinstance(error, errors.DoesNotFitError):
        return ApiError(503, message, code="model_does_not_fit")
    return ApiError(500, message, code="model_load_failed")


def _names(files: dict[str, ModelFile]) -> str:
    if not files:
        return "there are none"
    shown = ", ".join(map(repr, sorted(files)[:_LISTED_NAMES]))
    return f"there are {shown}" + (f" and {len(files) - _LISTED_NAMES} more" if len(files) > _LISTED_NAMES else "")
