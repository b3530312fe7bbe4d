"""A move to a host with a disk ends only when the session would survive there: kill -9 of the
target at once after the answer, and of the source, loses nothing."""

import contextlib
from collections.abc import Iterator

from restartable_agent import EXPECTED, RestartableAgent, contents, give_session, started
from simulated import settings
from simulated_sessions import ALICE, call

from mcp_vllm.config import Config


@contextlib.contextmanager
def pair_with_disks(folder) -> Iterator[tuple[RestartableAgent, RestartableAgent]]:
    agents = []
    for name in "ab":
        disk = {"path": folder / f"disk-{name}", "bytes": 1 << 30}
        agents.append(RestartableAgent(folder, name, settings(codec="raw", disk=disk)))
    for agent, peer in zip(agents, reversed(agents), strict=True):
        tree = agent._config.model_dump() | {"peers": [peer.address]}
        agent._config = Config.model_validate(tree)
    with started(*agents):
        yield agents[0], agents[1]


async def test_the_target_is_killed_as_soon_as_it_has_answered(tmp_path):
    with pair_with_disks(tmp_path) as (a, b):
        await give_session(a)
        status, moved = await call(a, "POST", f"{ALICE}/move", {"to": b.address})
        b.kill()
        a.kill()
        assert (status, moved["num_sent"]) == (200, len(EXPECTED))
        a.start()
        b.start()
        assert (await call(a, "GET", ALICE))[0] == 404
        assert await contents(b, ALICE) == EXPECTED


async def test_it_comes_back_the_same_way(tmp_path):
    with pair_with_disks(tmp_path) as (a, b):
        await give_session(a)
        for source, target in ((a, b), (b, a), (a, b)):
            status, _ = await call(source, "POST", f"{ALICE}/move", {"to": target.address})
            target.kill()
            assert status == 200
            target.start()
            assert await contents(target, ALICE) == EXPECTED
