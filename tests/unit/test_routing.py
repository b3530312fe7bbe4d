"""The routing hook: the engine with the first token soonest goes first."""

from mcp_vllm.routing import Ranked, rank
from mcp_vllm.session.api import Placement

AGENTS = {"http://a": "h1:1", "http://b": "h2:1", "http://c": "h3:1"}


def placement(agent: str, held_tokens: int, cost_s: float) -> Placement:
    return Placement(agent, 0, held_tokens, 4096, cost_s, 2.0)


HELD = [placement("", 4096, 0.0), placement("h2:1", 2048, 0.3)]


def test_the_engine_that_has_most_goes_first_and_one_nobody_knows_of_last():
    assert rank(HELD, AGENTS, asked="h1:1") == [
        Ranked("http://a", 4096, 0.0),
        Ranked("http://b", 2048, 0.3),
        Ranked("http://c", 0, 2.0),
    ]


def test_a_queue_is_weighed_against_what_an_engine_has():
    def first(waiting_s: float) -> str:
        return rank(HELD, AGENTS, asked="h1:1", waiting_s={"http://a": waiting_s})[0].engine

    assert first(0.29) == "http://a"
    assert first(0.31) == "http://b"


def test_without_any_knowledge_every_engine_costs_its_queue():
    ranked = rank([], AGENTS, asked="h1:1", waiting_s={"http://a": 1.0})
    assert [(each.engine, each.cost_s) for each in ranked] == [
        ("http://b", 0.0),
        ("http://c", 0.0),
        ("http://a", 1.0),
    ]
