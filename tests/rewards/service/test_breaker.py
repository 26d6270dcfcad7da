"""Requests wait while a server does not answer."""

import asyncio
import time

from rewards.service.breaker import Breaker


def test_one_probe_at_a_time_until_one_succeeds():
    async def play():
        breaker = Breaker(limit=2, pause=0.02)
        sent = []
        ended = []

        async def ask():
            async with breaker.admit():
                was_open = breaker.is_open
                sent.append((was_open, time.monotonic()))
                await asyncio.sleep(0.01)
                # The third one, the first probe, fails as well.
                breaker.report(has_failed=len(ended) < 3)
                ended.append(time.monotonic())

        await ask()
        await ask()
        assert breaker.is_open
        await asyncio.gather(*[ask() for _ in range(5)])
        return sent, ended, breaker.is_open

    sent, ended, is_open = asyncio.run(play())
    assert not is_open
    assert [was_open for was_open, _ in sent] == [False, False, True, True, False, False, False]
    # Each probe comes a pause after the failure before it, and the rest after the success.
    assert sent[2][1] - ended[1] >= 0.019
    assert sent[3][1] - ended[2] >= 0.019
    assert all(moment >= ended[3] for _, moment in sent[4:])


def test_a_probe_that_is_cancelled_leaves_its_place_to_another():
    async def play():
        breaker = Breaker(limit=1, pause=0.001)
        breaker.report(has_failed=True)
        await asyncio.sleep(0.002)
        entered = []

        async def ask(seconds):
            async with breaker.admit():
                entered.append(seconds)
                await asyncio.sleep(seconds)

        lost = asyncio.create_task(ask(60))
        await asyncio.sleep(0.001)
        other = asyncio.create_task(ask(0))
        await asyncio.sleep(0.005)
        assert entered == [60]
        lost.cancel()
        await asyncio.wait_for(other, timeout=1)
        return entered

    assert asyncio.run(play()) == [60, 0]
