"""Registration of a new kind of tower."""

from collections.abc import Callable

from miniclip.config import SECTIONS
from miniclip.model import TOWERS, Tower


def register_tower(base: type, tells: Callable[[dict], bool], section: type, tower: type[Tower]):
    """Builds `tower` where `tells(values)` is true of the values of a model config's `base` section (VisionConfig or
    TextConfig), which are read as the dataclass `section`. tests/towers/test_toy_tower.py is an example."""
    SECTIONS.append((base, tells, section))
    TOWERS[section] = tower
