"""A chat load for caches: sessions that come back, some far more often than others, and prompts
that never do. Deterministic in the seed. Used by `eviction_live.py`.

- A few assistants, each with a system prompt that its sessions share.
- A fixed number of open chats. Which one speaks next is drawn by Zipf's law over the chats; a chat
  that has had its turns ends, and another, new one takes its place.
- A turn's prompt is the whole chat so far and a new message; the answer is part of the script, so
  that the requests do not depend on what a model says.
- Between them, prompts that are asked once: documents to be summed up, evaluations, crawlers.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from dataclasses import dataclass

ALPHABET = string.ascii_lowercase + " "


@dataclass(frozen=True)
class ChatLoad:
    """Sizes are characters, which are tokens for a byte-level tokenizer.

    Attributes:
        open_chats: chats that may speak next, at any time.
        zipf: exponent of the law; larger means that fewer chats speak most of the time.
        once_share: share of the requests whose prompt is never used again.
    """

    num_requests: int
    open_chats: int = 24
    zipf: float = 0.8
    once_share: float = 0.4
    once_chars: int = 900
    assistants: int = 3
    system_chars: int = 256
    message_chars: int = 96
    answer_chars: int = 64
    first_chars: int = 300
    most_turns: int = 8
    seed: int = 1

    @property
    def mean_chat_chars(self) -> float:
        """Of a chat's prompt, over its turns."""
        turn = self.message_chars + self.answer_chars
        return self.system_chars + self.first_chars + (self.most_turns - 1) / 2 * turn

    def requests(self) -> Iterator[tuple[str, str]]:
        """(name of the chat, or "" for a prompt of its own; prompt) one after the other."""
        draw = random.Random(self.seed)
        systems = [_text(draw, self.system_chars) for _ in range(self.assistants)]
        weights = [1 / (rank + 1) ** self.zipf for rank in range(self.open_chats)]
        chats = [_Chat(self, draw, systems, number) for number in range(self.open_chats)]
        num_chats = self.open_chats
        for chat in chats:  # they are under way, not all at their first turn
            chat.skip(draw, draw.randrange(self.most_turns))
        for _ in range(self.num_requests):
            if draw.random() < self.once_share:
                yield "", _text(draw, self.once_chars)
                continue
            (rank,) = draw.choices(range(self.open_chats), weights)
            chat = chats[rank]
            yield chat.name, chat.prompt
            chat.skip(draw, 1)
            if chat.turns >= self.most_turns:
                chats[rank] = _Chat(self, draw, systems, num_chats)
                num_chats += 1


class _Chat:
    def __init__(
        self, load: ChatLoad, draw: random.Random, systems: list[str], number: int
    ) -> None:
        self.name = f"chat-{number}"
        self.turns = 0
        self.prompt = draw.choice(systems) + _text(draw, load.first_chars)
        self._load = load

    def skip(self, draw: random.Random, turns: int) -> None:
        for _ in range(turns):
            self.turns += 1
            self.prompt += _text(draw, self._load.answer_chars + self._load.message_chars)


def _text(draw: random.Random, size: int) -> str:
    return "".join(draw.choices(ALPHABET, k=size))
