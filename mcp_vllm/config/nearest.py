"""What the user probably meant: the known name nearest to an unknown one."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """A remark in brackets that names the nearest known name, or lists `known` when none is near.

    A key written in the wrong section (`listen` for `agent.listen`, which is `elsewhere`) is found
    too: an equal last part comes first, then a similar whole name, then a similar last part.
    """
    known = list(known)
    candidates = [*known, *elsewhere]
    near = [each for each in candidates if _leaf(each) == _leaf(name)]
    near = near or difflib.get_close_matches(name, candidates, n=1)
    if not near:
        leaves = difflib.get_close_matches(_leaf(name), map(_leaf, candidates), n=1)
        near = [each for each in candidates if _leaf(each) in leaves]
    return f'(did you mean "{near[0]}"?)' if near else f"(known: {', '.join(known)})"


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
