"""What the user probably meant: the known name nearest to an unknown one."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """A remark in brackets that names the nearest known name, or lists `known` when none is near.

    Whole names are compared first, then last dotted parts, so that a key written in the wrong
    section (`listen` for `agent.listen`, which is `elsewhere`) is found too.
    """
    known = list(known)
    candidates = [*known, *elsewhere]
    near = difflib.get_close_matches(name, candidates, n=1)
    if not near:
        by_leaf = {_leaf(each): each for each in candidates}
        near = [by_leaf[leaf] for leaf in difflib.get_close_matches(_leaf(name), by_leaf, n=1)]
    return f'(did you mean "{near[0]}"?)' if near else f"(known: {', '.join(known)})"


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
