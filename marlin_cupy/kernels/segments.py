"""Who computes which tiles: stripes over those that do not divide evenly, then whole ones.

Host twin of cuda_src/schedule/segments.cuh, which draws it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segments:
    """How many blocks (or clusters) share how many tiles, and how many of these each computes alone.

    Attributes:
        tiles: of the whole product.
        blocks: that are launched; those beyond the SMs' room wait.
        whole: tiles that each block computes alone; what ``whole * blocks`` does not cover is shared by all.
    """

    tiles: int
    blocks: int
    whole: int

    @staticmethod
    def alone(tiles: int, room: int) -> Segments:
        """Every tile by one block, in as few blocks as need no more rounds than ``room`` of them."""
        rounds = -(-tiles // room)
        return Segments(tiles, -(-tiles // rounds), rounds)

    @staticmethod
    def striped(tiles: int, steps: int, room: int) -> Segments:
        """``room`` blocks, or as many as there are steps of K; all have the same to do."""
        blocks = min(room, tiles * steps)
        return Segments(tiles, blocks, tiles // blocks)

    @property
    def shared(self) -> int:
        """Tiles that are put together from parts."""
        return max(0, self.tiles - self.whole * self.blocks)

    def struct(self, steps: int) -> tuple[int, int, int, int, int, int]:
        """The fields of the C++ struct Schedule for tiles of ``steps`` steps of K."""
        return self.tiles, steps, self.blocks, self.whole, *divmod(self.shared * steps, self.blocks)
