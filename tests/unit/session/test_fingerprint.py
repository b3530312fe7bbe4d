from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_vllm.session.fingerprint import DIGEST_BYTES, FieldDifference, Fingerprint

fields = st.dictionaries(
    st.text(max_size=5), st.sampled_from(["", "(absent)", "bf16", "fp8"]) | st.text(), max_size=5
)


@given(fields, st.randoms(use_true_random=False))
@settings(derandomize=True, deadline=None)
def test_the_digest_does_not_depend_on_the_order(mapping: dict[str, str], random) -> None:
    items = list(mapping.items())
    random.shuffle(items)
    assert Fingerprint(mapping).digest == Fingerprint(dict(items)).digest
    assert len(Fingerprint(mapping).digest) == DIGEST_BYTES


@given(fields, fields)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_digests_differ_exactly_when_a_field_does(one: dict[str, str], two: dict[str, str]) -> None:
    ours, theirs = Fingerprint(one), Fingerprint(two)
    difference = ours.first_difference(theirs)
    assert (difference is None) == (one == two) == (ours.digest == theirs.digest)


def test_a_field_that_says_absent_is_not_an_absent_field() -> None:
    assert Fingerprint({"a": "(absent)"}).first_difference(Fingerprint({})) is not None


def test_the_first_difference_is_the_first_in_our_order() -> None:
    ours = Fingerprint({"model": "a", "dtype": "bf16", "block": "16"})
    theirs = Fingerprint({"block": "32", "dtype": "fp16", "model": "a"})
    difference = ours.first_difference(theirs)
    assert difference == FieldDifference("dtype", "bf16", "fp16")
    assert str(difference) == "dtype: ours is 'bf16', theirs is 'fp16'"


def test_a_field_that_only_they_have_comes_last() -> None:
    difference = Fingerprint({"a": "1"}).first_difference(Fingerprint({"z": "2", "a": "1"}))
    assert difference == FieldDifference("z", "(absent)", "2")


def test_the_closest_shares_most_fields() -> None:
    ours = Fingerprint({"model": "a", "dtype": "bf16", "block": "16"})
    far, near = Fingerprint({"model": "b"}), Fingerprint({"model": "a", "dtype": "fp8"})
    assert ours.closest([far, near]) is near
    assert ours.closest([]) is None
