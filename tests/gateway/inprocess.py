"""The whole service in one process, without Ray: the engine in a thread, control plane and HTTP in a loop.

Knows how the parts fit. The way users start it is cluster/ and cli.py, tested end to end elsewhere.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager

import uvicorn

from twinkle_serve.config import Config
from twinkle_serve.console.app import add_console
from twinkle_serve.control.service import ControlPlane
from twinkle_serve.engine.engine import Engine
from twinkle_serve.gateway.app import create_app
from twinkle_serve.protocol.work import Failure, ModelInfo, Outcome, Tick, TickReport
from twinkle_serve.storage.catalog import Catalog


class EngineGroup:
    """A group of one rank: an engine behind a thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1)

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    async def check_loss(self, graph: str) -> Failure | None:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._engine.check_loss, graph)

    async def run(self, tick: Tick) -> AsyncIterator[Outcome | TickReport]:
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[Outcome | TickReport | None] = asyncio.Queue()

        def work() -> None:
            try:
                for item in self._engine.run(tick):
                    loop.call_soon_threadsafe(items.put_nowait, item)
            finally:
                loop.call_soon_threadsafe(items.put_nowait, None)

        done = loop.run_in_executor(self._thread, work)
        while (item := await items.get()) is not None:
            yield item
        await done


@asynccontextmanager
async def control_plane(config: Config) -> AsyncIterator[ControlPlane]:
    groups = {model.name: EngineGroup(Engine(model)) for model in config.models}
    catalog = Catalog(config.storage.root, config.storage.catalog_url)
    plane = ControlPlane(groups, catalog, config)
    await plane.start()
    try:
        yield plane
    finally:
        await plane.close()
        catalog.close()


@contextmanager
def serving(config: Config, planes: list[ControlPlane] | None = None) -> Iterator[str]:
    """The service in a thread until the block ends; its URL. planes: where its control plane is put, to be
    looked at."""
    url: Future[str] = Future()
    stop = threading.Event()

    async def serve() -> None:
        async with control_plane(config) as plane:
            if planes is not None:
                planes.append(plane)
            app = create_app(lambda: plane, config)
            add_console(app)
            server = uvicorn.Server(
                uvicorn.Config(app, port=config.http.port, log_level="warning", lifespan="off")
            )
            running = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            url.set_result(f"http://127.0.0.1:{config.http.port}")
            await asyncio.to_thread(stop.wait)
            # Held polls of clients that are still there would keep it for their whole hold.
            server.should_exit = server.force_exit = True
            await running

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if url.done():
                raise
            url.set_exception(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield url.result(60)
    finally:
        stop.set()
        thread.join(30)
