"""Owns the figures the assistant looks up: population and area of the fifty states of the USA.

Sources, entered by hand as facts (figures of the federal government, in the public domain):

- Population: resident population on 1 April 2020, U.S. Census Bureau, 2020 Census. The fifty states add up to
  330,759,736, which with the District of Columbia (689,545) is the published 331,449,281. A test checks the sum.
- Area: total area (land and water) in square miles, U.S. Census Bureau, "State Area Measurements", 2010 boundaries.
  The published total without the District of Columbia is 3,796,674; the fifty entries add up to two more, as figures
  rounded one by one to a whole square mile may.

It knows nothing about questions, tools or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Field = Literal["population", "area"]
FIELDS: tuple[Field, ...] = ("population", "area")

POPULATION_OF_THE_FIFTY_STATES = 330_759_736
PUBLISHED_AREA_OF_THE_FIFTY_STATES_SQ_MI = 3_796_674


@dataclass(frozen=True)
class State:
    """One state: residents on 1 April 2020 and total area in square miles."""

    name: str
    population_2020: int
    area_sq_mi: int

    def figure(self, field: Field) -> int:
        """The population (residents) or the area (square miles)."""
        return self.population_2020 if field == "population" else self.area_sq_mi


STATES: tuple[State, ...] = (
    State("Alabama", 5_024_279, 52_420),
    State("Alaska", 733_391, 665_384),
    State("Arizona", 7_151_502, 113_990),
    State("Arkansas", 3_011_524, 53_179),
    State("California", 39_538_223, 163_695),
    State("Colorado", 5_773_714, 104_094),
    State("Connecticut", 3_605_944, 5_543),
    State("Delaware", 989_948, 2_489),
    State("Florida", 21_538_187, 65_758),
    State("Georgia", 10_711_908, 59_425),
    State("Hawaii", 1_455_271, 10_932),
    State("Idaho", 1_839_106, 83_569),
    State("Illinois", 12_812_508, 57_914),
    State("Indiana", 6_785_528, 36_420),
    State("Iowa", 3_190_369, 56_273),
    State("Kansas", 2_937_880, 82_278),
    State("Kentucky", 4_505_836, 40_408),
    State("Louisiana", 4_657_757, 52_378),
    State("Maine", 1_362_359, 35_380),
    State("Maryland", 6_177_224, 12_406),
    State("Massachusetts", 7_029_917, 10_554),
    State("Michigan", 10_077_331, 96_714),
    State("Minnesota", 5_706_494, 86_936),
    State("Mississippi", 2_961_279, 48_432),
    State("Missouri", 6_154_913, 69_707),
    State("Montana", 1_084_225, 147_040),
    State("Nebraska", 1_961_504, 77_348),
    State("Nevada", 3_104_614, 110_572),
    State("New Hampshire", 1_377_529, 9_349),
    State("New Jersey", 9_288_994, 8_723),
    State("New Mexico", 2_117_522, 121_590),
    State("New York", 20_201_249, 54_555),
    State("North Carolina", 10_439_388, 53_819),
    State("North Dakota", 779_094, 70_698),
    State("Ohio", 11_799_448, 44_826),
    State("Oklahoma", 3_959_353, 69_899),
    State("Oregon", 4_237_256, 98_379),
    State("Pennsylvania", 13_002_700, 46_054),
    State("Rhode Island", 1_097_379, 1_545),
    State("South Carolina", 5_118_425, 32_020),
    State("South Dakota", 886_667, 77_116),
    State("Tennessee", 6_910_840, 42_144),
    State("Texas", 29_145_505, 268_596),
    State("Utah", 3_271_616, 84_897),
    State("Vermont", 643_077, 9_616),
    State("Virginia", 8_631_393, 42_775),
    State("Washington", 7_705_281, 71_298),
    State("West Virginia", 1_793_716, 24_230),
    State("Wisconsin", 5_893_718, 65_496),
    State("Wyoming", 576_851, 97_813),
)


def find_state(name: str) -> State | None:
    """The state of that name, whatever its case and spacing; None where there is none."""
    wanted = " ".join(name.split()).casefold()
    return next((state for state in STATES if state.name.casefold() == wanted), None)
