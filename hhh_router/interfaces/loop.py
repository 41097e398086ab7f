"""An event loop on a thread of its own: what blocks, or lives on another loop, can share one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from hhh_router.errors import HHHRouterError

T = TypeVar("T")


class LoopThread:
    """Runs coroutines of callers on other threads, until it is closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="hhh-router-sdk", daemon=True)
        self._thread.start()
        self._started.wait()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._started.set()
        await self._stop.wait()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for what it returns; an interrupt cancels it."""
        future = self._begin(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """As `run`, for a caller on another event loop; whoever cancels the wait cancels the work."""
        return await asyncio.wrap_future(self._begin(work))

    def leave(self, work: Coroutine[Any, Any, None]) -> None:
        """Have it run there and wait for nothing; once this is closed, there is nothing left to do."""
        try:
            self._begin(work)
        except HHHRouterError:
            return

    def _begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop is None:
            work.close()
            raise HHHRouterError("this router is closed", hint="open a new one")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Run one last coroutine, then end the thread; what still runs is cancelled. Does nothing the second time."""
        with self._lock:
            if self._loop is None:
                last.close()
                return
            try:
                self.run(last)
            finally:
                loop, self._loop = self._loop, None
                loop.call_soon_threadsafe(self._stop.set)
                self._thread.join()
