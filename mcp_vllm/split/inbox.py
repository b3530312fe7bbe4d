"""What comes on one connection, for the thread that works on it."""

from __future__ import annotations

import threading
from collections import deque

from mcp_vllm.split.channel import Channel, Message, Patience
from mcp_vllm.split.errors import SplitError, StageLost
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
        self._waiting: deque[Message | SplitError] = deque()

    def take(self) -> Message:
        """The next message; the worker alone calls this.

        Raises:
            StageLost: the connection is gone, or the other side has said good-bye.
            WireError: what comes is not the protocol, or too large.
        """
        with self._receiving:
            found = self._waiting.popleft() if self._waiting else self._channel.receive()
        if isinstance(found, SplitError):
            raise found
        if found.kind == Kind.BYE:
            raise StageLost("the engine said good-bye")
        return found

    def look(self) -> None:
        """Receive what has come already, unless the worker does so itself."""
        if not self._receiving.acquire(blocking=False):
            return
        try:
            while len(self._waiting) < MOST_WAITING:
                message = self._channel.poll(Patience())
                if message is None:
                    return
                self._waiting.append(message)
        except SplitError as error:
            self._waiting.append(error)
        finally:
            self._receiving.release()
