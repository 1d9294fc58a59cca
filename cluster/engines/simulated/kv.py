"""The block cache of a simulated engine: prefix hashing, LRU, pins under a lease.

A block is known by the key of the ids it holds (model.block_keys) and carries `content`: the key
of the ids its KV was really computed for. The two differ only when a peer sent wrong KV.

Decode may grow past the capacity by the blocks of its own output instead of preempting; prompts
never do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Block:
    id: int
    key: bytes | None = None  # set while it is in the prefix cache
    content: bytes = b""
    users: int = 0


# (keys, parent key, index of the first block in its sequence)
StoredListener = Callable[[Sequence[bytes], bytes | None, Sequence[int]], None]
RemovedListener = Callable[[Sequence[bytes]], None]


@dataclass(slots=True)
class BlockCache:
    """Not thread-safe: one event loop owns it."""

    capacity_blocks: int
    block_size_tokens: int
    on_stored: StoredListener
    on_removed: RemovedListener
    _cached: dict[bytes, Block] = field(default_factory=dict)
    _idle: OrderedDict[bytes, Block] = field(default_factory=OrderedDict)  # oldest first
    _free_ids: list[int] = field(default_factory=list)
    _next_id: int = 1  # vLLM keeps block 0 as its null block
    used_blocks: int = 0

    @property
    def usage(self) -> float:
        return min(1.0, self.used_blocks / self.capacity_blocks)

    def hits(self, keys: Sequence[bytes], prompt_tokens: int) -> int:
        """Leading blocks that are here. The last prompt token is always computed again, so a
        wholly cached prompt still misses its last block, as in vLLM."""
        limit = (prompt_tokens - 1) // self.block_size_tokens
        for count, key in enumerate(keys[:limit]):
            if key not in self._cached:
                return count
        return min(limit, len(keys))

    def fits(self, keys: Sequence[bytes], prompt_tokens: int) -> bool:
        held = self.hits(keys, prompt_tokens)
        already_used = sum(self._cached[key].users > 0 for key in keys[:held])
        return self.used_blocks + len(keys) - already_used <= self.capacity_blocks

    def take(self, keys: Sequence[bytes], prompt_tokens: int) -> tuple[list[Block], int]:
        """Blocks for a prompt: those already held (their count is returned), then new ones."""
        held = self.hits(keys, prompt_tokens)
        blocks = [self._cached[key] for key in keys[:held]]
        for block in blocks:
            self._use(block)
        blocks += [self._new() for _ in keys[held:]]
        return blocks, held

    def grow(self, blocks: list[Block]) -> None:
        blocks.append(self._new())

    def store(
        self,
        blocks: Sequence[Block],
        keys: Sequence[bytes],
        first: int,
        contents: Sequence[bytes],
        ids: Sequence[int],
    ) -> None:
        """The full blocks from `first` on hold KV now: later prompts may find them.

        `keys`, `contents` and `ids` cover the whole sequence; a partial last block is left out.
        """
        full = min(len(ids) // self.block_size_tokens, len(blocks))
        fresh: list[bytes] = []
        begin = first
        for index in range(first, full):
            block, key = blocks[index], keys[index]
            block.content = contents[index]
            if key in self._cached:  # another request computed the same block meanwhile
                self._announce(fresh, keys, begin, ids)
                fresh, begin = [], index + 1
                continue
            block.key = key
            self._cached[key] = block
            fresh.append(key)
        self._announce(fresh, keys, begin, ids)

    def _announce(
        self, fresh: list[bytes], keys: Sequence[bytes], begin: int, ids: Sequence[int]
    ) -> None:
        if fresh:
            size = self.block_size_tokens
            parent = keys[begin - 1] if begin else None
            self.on_stored(fresh, parent, ids[begin * size : (begin + len(fresh)) * size])

    def release(self, blocks: Sequence[Block]) -> None:
        """One user less. Cached blocks stay findable until their room is needed, tails first."""
        for block in reversed(blocks):
            block.users -= 1
            if block.users:
                continue
            self.used_blocks -= 1
            if block.key is not None:
                self._idle[block.key] = block
            else:
                self._free_ids.append(block.id)

    def _use(self, block: Block) -> None:
        if not block.users:
            self.used_blocks += 1
            if block.key is not None:
                del self._idle[block.key]
        block.users += 1

    def _new(self) -> Block:
        if self.used_blocks + len(self._idle) >= self.capacity_blocks and self._idle:
            key, oldest = self._idle.popitem(last=False)
            self._forget(oldest)
            self.on_removed([key])
        if self._free_ids:
            number = self._free_ids.pop()
        else:
            number = self._next_id
            self._next_id += 1
        self.used_blocks += 1
        return Block(number, users=1)

    def _forget(self, block: Block) -> None:
        assert block.key is not None
        del self._cached[block.key]
        block.key = None
        self._free_ids.append(block.id)
