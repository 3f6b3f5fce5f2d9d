"""Work in slices lets the loop do what is due in between."""

import asyncio

from tlstunnel.tunnel.slices import Slices


def test_a_slice_is_over_after_its_time() -> None:
    assert Slices(0.0).is_over
    assert not Slices(3600.0).is_over


def test_others_get_a_turn_in_a_pause() -> None:
    async def run() -> list[str]:
        said: list[str] = []
        slices = Slices(0.0)
        for number in range(3):
            asyncio.get_running_loop().call_soon(said.append, f"other {number}")
            await slices.pause()
            said.append(f"slice {number}")
        return said

    assert asyncio.run(run()) == ["other 0", "slice 0", "other 1", "slice 1", "other 2", "slice 2"]
