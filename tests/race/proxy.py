# SPDX-License-Identifier: Apache-2.0
"""A TCP proxy in front of a control port that delays messages, drops them and cuts connections."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter

_GREETING_NBYTES = 64
_MORE, _LONG, _COMMAND = 1, 2, 4
"""Flags of a frame of ZMTP 3."""


class Proxy:
    """One control port as a peer sees it. Runs in a thread of its own.

    Args:
        seed: of what goes wrong.
        calm_s: mean time between two spells in which something does.

    Attributes:
        port: where it listens; messages go on to ``target``.
        did: how often it held, swallowed and cut.
        disturbs: whether anything goes wrong at all.
    """

    def __init__(self, seed: int, calm_s: float = 1.0) -> None:
        self.port = 0
        self.target = ("127.0.0.1", 0)
        self.did: Counter[str] = Counter()
        self.disturbs = True
        self._random = random.Random(seed)
        self._calm_s = calm_s
        self._spell = ""
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="proxy", daemon=True)
        self._thread.start()
        started.wait(10)

    def close(self) -> None:
        """Cut everything and listen no more."""
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._over = asyncio.Event()
        self._loop.run_until_complete(self._live(started))
        self._loop.close()

    async def _live(self, started: threading.Event) -> None:
        server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        spells = asyncio.ensure_future(self._spells())
        await self._over.wait()
        server.close()
        for writer in self._writers:
            writer.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        spells.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _spells(self) -> None:
        """Now and then, for a while, messages are held or swallowed, and now and then every connection is cut."""
        while True:
            await asyncio.sleep(self._random.expovariate(1 / self._calm_s))
            if not self.disturbs:
                continue
            spell = self._random.choice(["hold", "swallow", "swallow up", "swallow down", "cut"])
            if spell == "cut":
                for writer in self._writers:
                    writer.close()
                self.did["cut"] += 1
                continue
            self._spell = spell
            await asyncio.sleep(self._random.uniform(0.1, 1.5))
            self._spell = ""

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection(*self.target)
        except OSError:
            writer.close()
            return
        both = {writer, up_writer}
        self._writers |= both
        pumps = [self._pump(reader, up_writer, "up"), self._pump(up_reader, writer, "down")]
        try:
            await asyncio.wait([asyncio.ensure_future(pump) for pump in pumps], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._writers -= both
            for each in both:
                each.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            left = _GREETING_NBYTES
            while left:
                greeting = await reader.read(left)
                if not greeting:
                    return
                left -= len(greeting)
                writer.write(greeting)
            swallowing = False
            first = True
            while True:
                head = await reader.readexactly(2)
                if head[0] & _LONG:
                    head += await reader.readexactly(7)
                body = await reader.readexactly(int.from_bytes(head[1:], "big"))
                command = head[0] & _COMMAND
                if first and not command:
                    swallowing = self.disturbs and self._spell in ("swallow", f"swallow {way}")
                    self.did["swallowed"] += swallowing
                first = bool(command) or not head[0] & _MORE
                if swallowing and not command:
                    continue
                if self.disturbs and self._spell == "hold" and not command:
                    self.did["held"] += 1
                    while self._spell == "hold" and self.disturbs:  # noqa: ASYNC110 - another thread ends it
                        await asyncio.sleep(0.01)
                writer.write(head + body)
                await writer.drain()
