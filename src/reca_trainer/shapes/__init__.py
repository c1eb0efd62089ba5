"""The embedded default: a tiny world of rendered scenes, its captions, its detector and its score."""

from reca_trainer.shapes.world import World

__all__ = ["World"]
