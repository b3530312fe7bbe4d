"""The demo's text holds the answers to the demo's questions."""

from mcp_vllm.demo.document import QUESTIONS, research_ship_manual

ANSWERS = ("Marta Lindqvist", "Anna and Bertha", "Puffin", "LMQH7")


def test_each_question_has_its_answer_in_the_document() -> None:
    assert len(QUESTIONS) == len(ANSWERS)
    manual = research_ship_manual()
    assert all(answer in manual for answer in ANSWERS)
