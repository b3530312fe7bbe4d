"""The OpenAPI document and docs/api.md say what the agent serves."""

import json
from pathlib import Path

from simulated import get_json, running_agent, settings

from mcp_vllm.agent import openapi

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
# Between agents, not for operators.
INTERNAL = {
    ("GET", f"{openapi.ONE}/manifest"),
    ("POST", f"{openapi.ONE}/pull"),
    ("POST", f"{openapi.ONE}/release"),
}


def test_the_page_is_what_the_code_says():
    assert PAGE.read_text(encoding="utf-8") == openapi.page(), "run `make docs`"


async def test_every_route_is_documented_and_every_documented_one_is_served(tmp_path):
    async with running_agent(settings(), tmp_path / "a.sock") as agent:
        document = await get_json(agent, "/v1/openapi.json")
        assert document == json.loads(json.dumps(openapi.document()))
        served = {
            (route.method, route.resource.canonical)
            for route in agent.application.router.routes()
            if route.resource.canonical.startswith(
                ("/v1/sessions", "/v1/blocks/{", "/v1/drain", "/v1/peers", "/v1/placements")
            )
        }
    documented = {(each.method, each.path) for each in openapi.OPERATIONS}
    assert {each for each in served if each[0] != "HEAD"} == documented | INTERNAL


def test_every_reference_resolves():
    text = json.dumps(openapi.document())
    schemas = openapi.document()["components"]["schemas"]
    for reference in text.split('"#/components/schemas/')[1:]:
        assert reference.partition('"')[0] in schemas
