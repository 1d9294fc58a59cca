"""Suspects wait for one another, and for nobody else."""

from __future__ import annotations

import asyncio

import pytest

from cluster.gateway import quarantine
from cluster.gateway.quarantine import Quarantine
from cluster.identity import WorkerId

A, B, C = (WorkerId("p", index, 1) for index in range(3))


async def test_suspects_of_one_worker_go_one_at_a_time():
    ward = Quarantine()
    together = most = 0

    async def suspect(*workers: WorkerId) -> None:
        nonlocal together, most
        async with ward.turn(workers):
            together += 1
            most = max(most, together)
            await asyncio.sleep(0)
            together -= 1

    pairs = ((A, B), (B, C), (B,), (A, B))
    await asyncio.gather(*(suspect(*workers) for workers in pairs * 5))
    assert most == 1


async def test_suspects_of_unlike_workers_do_not_wait():
    ward = Quarantine()
    async with asyncio.timeout(1), ward.turn([A]), ward.turn([B, C]):
        pass


async def test_one_that_is_cancelled_or_fails_leaves_its_place():
    ward = Quarantine()
    with pytest.raises(ZeroDivisionError):
        async with ward.turn([A]):
            raise ZeroDivisionError
    async with ward.turn([A]):
        waiting = asyncio.create_task(ward.turn([A]).__aenter__())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(1), ward.turn([A]):
        pass


async def test_nobody_waits_for_ever(monkeypatch):
    monkeypatch.setattr(quarantine, "TURN_WITHIN_S", 0.01)
    ward = Quarantine()
    async with asyncio.timeout(1), ward.turn([A]), ward.turn([A]):
        pass
