"""SmartCache behind vLLM's own manager of host chunks. Needs vLLM, and no engine."""

import random
from types import SimpleNamespace

import pytest

from mcp_vllm.config import Config
from mcp_vllm.link.prefill import PrefillCost

base = pytest.importorskip("vllm.v1.kv_offload.base")
cpu = pytest.importorskip("vllm.v1.kv_offload.cpu.manager")
settings = pytest.importorskip("mcp_vllm.vllm_plugin.settings")

CHUNK_TOKENS = 16
COST = PrefillCost(step_s=0.01, token_s=1e-4, context_s=1e-8, step_tokens=2048)


class Engine:
    """What the scheduler and the connector do for one request after the other."""

    def __init__(self, num_chunks: int, num_groups: int = 1) -> None:
        self.manager = cpu.CPUOffloadingManager(
            num_chunks, settings.POLICY, cache_policy_module_path=settings.POLICY_MODULE
        )
        self.num_groups = num_groups
        self.capacity = num_chunks

    @property
    def policy(self):
        return self.manager._policy

    def keys(self, path: str, group: int) -> list[bytes]:
        """One a character: a key determines all before it, as vLLM's hashes do."""
        names = (path[: end + 1].encode().ljust(16) for end in range(len(path)))
        return [base.make_offload_key(name, group) for name in names]

    def begin(self, name: str, path: str):
        context = base.ReqContext(req_id=name)
        chains = [self.keys(path, group) for group in range(self.num_groups)]
        for chain in chains:
            for at, key in enumerate(chain):
                context.set_offload_key_position(key, (at + 1) * CHUNK_TOKENS)
        self.policy.begin(name, chains, [CHUNK_TOKENS] * self.num_groups, COST)
        return context, chains

    def hits(self, path: str) -> int:
        """Leading chunks that every group has."""
        context = base.ReqContext(req_id="look")
        found = 0
        for row in zip(*(self.keys(path, group) for group in range(self.num_groups)), strict=True):
            if any(self.manager.lookup(k, context) is not base.LookupResult.HIT for k in row):
                break
            found += 1
        return found

    def serve(self, name: str, path: str, is_stored: bool = True) -> bool:
        """A whole request; whether its chunks were stored."""
        context, chains = self.begin(name, path)
        keys = [key for chain in chains for key in chain]
        self.policy.finish(name, chains, 5)
        stored = self.manager.prepare_store(keys, context)
        if stored is not None:
            self.manager.complete_store(stored.keys_to_store, context, is_stored)
        self.manager.on_request_finished(context)
        self.policy.forget([name])
        self.check()
        return stored is not None

    def check(self) -> None:
        policy = self.policy
        policy._tell_fresh()
        policy._cache.check_integrity()
        assert len(policy._cache) == len(policy._chunks) <= self.capacity
        assert all(key in policy._cache for key in policy._chunks)
        assert policy._busy == {key for key, chunk in policy._chunks.items() if chunk.ref_cnt}


def paths(seed: int, number: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abc", k=draw.randint(1, 5))) for _ in range(number)]


@pytest.mark.parametrize("num_groups", [1, 3])
def test_what_is_held_is_always_the_beginning_of_chains_and_never_too_much(num_groups):
    engine = Engine(24, num_groups)
    for number, path in enumerate(paths(1, 200)):
        assert engine.serve(f"r{number}", path)
        assert engine.hits(path) == len(path), "what was stored last is there"
        for key in engine.policy._chunks:
            name, group = key[:16].rstrip(), base.get_offload_group_idx(key)
            if len(name) > 1:
                parent = base.make_offload_key(name[:-1].ljust(16), group)
                assert parent in engine.policy._chunks
    assert not engine.policy._requests
    assert not engine.policy._places
    assert not engine.policy._busy


def test_chunks_that_are_read_stay_and_so_does_what_is_before_them():
    engine = Engine(6)
    engine.serve("first", "abcd")
    context, _ = engine.begin("reader", "abcd")
    keys = engine.keys("abcd", 0)
    engine.manager.prepare_load(keys[3:], context)
    assert engine.serve("second", "xy")
    assert not engine.serve("third", "uvwz"), "there is room for two only"
    assert engine.hits("abcd") == 4
    engine.manager.complete_load(keys[3:], context)
    assert engine.serve("fourth", "uvwz")


def test_a_chunk_that_continues_a_held_chain_does_not_push_out_its_parent():
    engine = Engine(3)
    engine.serve("first", "ab")
    engine.serve("other", "x")
    context, chains = engine.begin("next", "abc")
    stored = engine.manager.prepare_store(chains[0][2:], context)
    assert stored is not None
    assert engine.policy.get(chains[0][1]) is not None
    assert engine.policy.get(engine.keys("x", 0)[0]) is None


def test_what_could_not_be_written_is_forgotten():
    engine = Engine(4)
    assert engine.serve("failed", "abc", is_stored=False)
    assert not engine.policy._chunks
    engine.serve("again", "abc")
    assert engine.hits("abc") == 3


def test_a_reset_empties_it_and_it_goes_on():
    engine = Engine(4)
    engine.serve("first", "abcd")
    engine.manager.reset_cache()
    engine.check()
    assert engine.hits("abcd") == 0
    assert engine.serve("second", "abxy")


def test_a_request_that_stores_nothing_leaves_nothing():
    engine = Engine(4)
    engine.begin("cancelled", "abc")
    engine.policy.forget(["cancelled"])
    assert not engine.policy._requests


def test_one_time_prompts_do_not_push_out_what_comes_back():
    engine = Engine(24)
    for number in range(400):
        engine.serve(f"hot-{number}", f"chat{number % 3}")
        engine.serve(f"once-{number}", chr(200 + number) * 8)
    assert sum(engine.hits(f"chat{number}") for number in range(3)) == 15


@pytest.mark.parametrize(
    ("extra", "config", "policy"),
    [
        ({}, {}, settings.POLICY),
        ({}, {"host_cache_policy": "lru"}, None),
        ({"eviction_policy": "arc"}, {}, "arc"),
    ],
)
def test_who_chooses_another_policy_gets_it(extra, config, policy):
    extra = {**extra, "mcp": config}
    settings.complete(SimpleNamespace(kv_connector_extra_config=extra))
    assert extra.get("eviction_policy") == policy
    assert ("cache_policy_module_path" in extra) == (policy == settings.POLICY)
    assert Config.load({**config}).host_cache_policy == config.get("host_cache_policy", "smart")
