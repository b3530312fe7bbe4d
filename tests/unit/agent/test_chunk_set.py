"""The compact set against a plain dictionary, whatever is done to both."""

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mcp_vllm.agent import chunk_set
from mcp_vllm.agent.chunk_set import ABSENT, ChunkSet, hash_keys

HASHES = st.lists(st.integers(0, 40).map(lambda n: n * (1 << 58)), max_size=12)
STEPS = st.lists(st.tuples(HASHES, st.integers(0, 4)), max_size=30)


def array(hashes: list[int]) -> np.ndarray:
    return np.array(hashes, dtype=np.uint64)


@pytest.mark.parametrize("merge_at", [1, 5, 1000])
@given(STEPS)
def test_it_holds_what_a_dictionary_would(merge_at: int, steps) -> None:
    chunks, truth = ChunkSet(), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_set, "MERGE_AT", merge_at)
        for hashes, rank in steps:
            if rank == 4:
                chunks.remove(array(hashes))
                truth = {each: old for each, old in truth.items() if each not in hashes}
            else:
                chunks.add(array(hashes), rank)
                truth |= dict.fromkeys(hashes, rank)
            asked = array([n * (1 << 58) for n in range(41)])
            found = chunks.ranks_of(asked).tolist()
            assert found == [truth.get(each, ABSENT) for each in asked.tolist()]
        assert chunks.weight >= len(truth)
        frozen = chunks.snapshot()
        chunks.add(array([7]), 0)
        assert dict(zip(frozen.hashes.tolist(), frozen.ranks.tolist(), strict=True)) == truth
        assert (np.diff(frozen.hashes.astype(object)) > 0).all()


def test_keys_have_the_same_hash_on_every_host() -> None:
    assert hash_keys([b"key"], "acme").tolist() == [xxhash.xxh3_64_intdigest(b"acme\0key")]
    names = [n.to_bytes(36, "big") for n in range(10_000)]
    assert len(set(hash_keys(names).tolist())) == 10_000
