"""What comes on one connection, for the thread that works on it."""

from __future__ import annotations

import threading
from collections import deque

from mcp_vllm.split.channel import Channel, Message, Patience
from mcp_vllm.split.errors import StageLost
from mcp_vllm.split.wire import Kind

# Messages kept for the worker while it works.
MOST_WAITING = 4


class Inbox:
    """The worker receives for itself: to be handed each message by another thread would cost it a
    wake-up, a tenth of a millisecond in the middle of every step. While it works, another thread
    has to `look` again and again: pings are answered so, and a lost connection is noticed.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._receiving = threading.Lock()
        self._waiting: deque[Message | Exception] = deque()
        self._ended = False

    def take(self) -> Message:
        """The next message; the worker alone calls this.

        Raises:
            StageLost: the connection is gone, or the other side has said good-bye.
            WireError: what comes is not the protocol, or too large.
        """
        if not self._waiting:  # what is there must not wait for what only begins to come
            with self._receiving:
                if not self._waiting:
                    self._waiting.append(self._channel.receive())
        found = self._waiting.popleft()
        if isinstance(found, Exception):
            raise found
        if found.kind == Kind.BYE:
            raise StageLost("the engine said good-bye")
        return found

    def look(self) -> None:
        """Receive what has come already, unless the worker does so itself. Nothing after an error,
        which the worker gets to see in its place."""
        if self._ended or not self._receiving.acquire(blocking=False):
            return
        try:
            while len(self._waiting) < MOST_WAITING:
                message = self._channel.poll(Patience())
                if message is None:
                    return
                self._waiting.append(message)
        except Exception as error:
            self._ended = True
            self._waiting.append(error)
        finally:
            self._receiving.release()
