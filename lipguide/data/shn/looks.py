"""What the versions of Synthetic House Numbers look like: all numbers and choices in which they differ.

A version that is frozen draws the same pictures for ever, for weights were trained on them. SHN 1 was drawn without a
real picture at hand; SHN 2 follows what was seen and measured on real ones. SHN 3 takes both in turn, those of SHN 1
with the typefaces of enamelled plates too, and has more of what networks of both misread: threes with a flat top, and
digits askew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["DEFAULT", "LOOKS", "Look", "look_of"]

Colour = tuple[int, int, int]  # sRGB


@dataclass(frozen=True, eq=False)
class Look:
    """One version's colours, shares and strengths; a share is of scenes, from 0 to 1, if nothing else is said.

    Args:
        walls: name of the material, colour, relative share.
        numbers: name of the paint or metal, colour, relative share.
        plates: colour of the plate, of the number on it, relative share.
        makes: for a material, or else "", which walls are made of it: name in `walls.MAKES`, relative share.
        faces: by how much the typefaces of each kind count.
        sheared: how often a rising line of digits is a wall seen from down the street, not a number hung askew.
        slant: deviation of the shear of digits.
        askew: how often a number is askew, and the deviations of what is then added to slant and rise.
        tight: by the split, the least share of its box's height and width that a digit takes; boxes of test are wider.
        texture: how much of a wall's texture is seen (1: all).
        plated: how often a number hangs on a plate.
        tiled: how often each digit has a plate of its own, where there is one.
        lined: how often the plate has a line around the number, in the number's colour.
        hindrances: leaves, bars, dirt, glare; of a knob `occlusion` of 1.
        shades: up to which draw the edge of a shadow lies over the scene, and up to which dappled light; likewise.
        apart: by how much at least the brightness of number and ground differ, and how much more at most.
        haze: how much contrast is lost at least, and how much more at most; of a knob `contrast` of 1.
        exposure: mean and deviation of the logarithm of the exposure.
        warmth: mean and deviation of red against blue.
        defocus: least blur, how much more, and how much a blurred one has more, in heights of a digit; how often.
        shaken: how often the camera moved.
        sharpened: how often, and how much more at most, edges are sharpened.
        grain: least noise, and how much more at most, in units of the full range; of a knob `noise` of 1.
        loss: least loss of JPEG quality, and how much more at most; likewise.
    """

    walls: tuple[tuple[str, Colour, float], ...]
    numbers: tuple[tuple[str, Colour, float], ...]
    plates: tuple[tuple[Colour, Colour, float], ...]
    makes: dict[str, tuple[tuple[str, float], ...]]
    faces: dict[str, float]
    sheared: float
    slant: float
    askew: tuple[float, float, float]
    tight: dict[str, tuple[float, float]]
    texture: float
    plated: float
    tiled: float
    lined: float
    hindrances: tuple[float, float, float, float]
    shades: tuple[float, float]
    apart: tuple[float, float]
    haze: tuple[float, float]
    exposure: tuple[float, float]
    warmth: tuple[float, float]
    defocus: tuple[float, float, float, float]
    shaken: float
    sharpened: tuple[float, float]
    grain: tuple[float, float]
    loss: tuple[float, float]


SHN_1 = Look(
    walls=(
        ("white paint", (226, 224, 218), 8),
        ("cream", (214, 203, 178), 8),
        ("beige", (190, 174, 146), 9),
        ("sand", (168, 150, 122), 6),
        ("light grey", (182, 183, 184), 6),
        ("grey", (132, 133, 134), 6),
        ("dark grey", (78, 80, 85), 6),
        ("stone", (158, 149, 134), 6),
        ("red brick", (138, 78, 62), 7),
        ("dark brick", (102, 62, 52), 4),
        ("orange brick", (172, 112, 84), 4),
        ("brown", (108, 76, 52), 6),
        ("dark wood", (66, 46, 36), 5),
        ("green paint", (86, 106, 88), 3),
        ("dark green", (38, 58, 48), 4),
        ("navy", (40, 50, 82), 4),
        ("blue grey", (108, 124, 142), 5),
        ("pale blue", (158, 178, 194), 3),
        ("black", (34, 34, 38), 6),
        ("ochre", (198, 164, 102), 3),
        ("salmon", (198, 152, 138), 3),
        ("maroon", (94, 38, 38), 3),
        ("dark glass", (52, 58, 66), 5),
        ("pale green", (172, 184, 160), 2),
    ),
    numbers=(
        ("black", (26, 26, 29), 22),
        ("white", (236, 235, 230), 20),
        ("brass", (178, 142, 76), 7),
        ("gold", (214, 178, 98), 7),
        ("bronze", (82, 62, 44), 6),
        ("silver", (178, 180, 184), 7),
        ("chrome", (208, 211, 216), 4),
        ("navy", (32, 44, 92), 4),
        ("red", (158, 40, 38), 4),
        ("green", (32, 84, 56), 2),
        ("yellow", (222, 188, 74), 3),
        ("cream", (224, 212, 182), 5),
        ("copper", (158, 94, 64), 2),
        ("grey", (112, 113, 116), 4),
        ("blue", (40, 74, 150), 3),
    ),
    plates=(
        ((232, 231, 226), (28, 28, 32), 8),
        ((30, 46, 104), (236, 236, 234), 6),
        ((30, 30, 34), (232, 230, 224), 5),
        ((184, 150, 84), (30, 26, 22), 4),
        ((34, 74, 56), (234, 232, 222), 2),
        ((62, 64, 68), (222, 222, 222), 3),
        ((112, 78, 50), (226, 214, 186), 3),
        ((226, 214, 184), (58, 42, 34), 3),
        ((214, 214, 214), (36, 58, 128), 3),
        ((150, 34, 34), (236, 232, 226), 2),
        ((176, 178, 180), (40, 40, 44), 3),
        ((238, 236, 228), (148, 36, 34), 2),
        ((96, 100, 104), (30, 30, 32), 2),
        ((68, 52, 42), (204, 168, 92), 3),
    ),
    makes={
        "red brick": (("brick", 8), ("plaster", 2)),
        "dark brick": (("brick", 8), ("plaster", 2)),
        "orange brick": (("brick", 8), ("plaster", 2)),
        "stone": (("stone", 6), ("plaster", 4)),
        "dark glass": (("glass", 8), ("sheet", 2)),
        "dark wood": (("wood", 6), ("boards", 4)),
        "brown": (("wood", 6), ("boards", 4), ("brick", 2)),
        "": (
            ("plaster", 42),
            ("boards", 20),
            ("sheet", 14),
            ("brick", 9),
            ("stone", 7),
            ("wood", 4),
            ("tiles", 4),
            ("glass", 3),
        ),
    },
    faces={"print": 1.0, "book": 1.0, "poster": 1.0, "italic": 1.0, "pen": 1.0, "enamel": 0.0, "flat": 0.0},
    sheared=0.0,
    slant=0.05,
    askew=(0.0, 0.0, 0.0),
    tight={"train": (0.90, 0.86), "test": (0.88, 0.76)},
    texture=1.0,
    plated=0.3,
    tiled=0.25,
    lined=0.4,
    hindrances=(0.05, 0.06, 0.12, 0.07),
    shades=(0.22, 0.32),
    apart=(0.18, 0.17),
    haze=(0.02, 0.55),
    exposure=(-0.03, 0.22),
    warmth=(-0.055, 0.05),
    defocus=(0.01, 0.036, 0.04, 0.25),
    shaken=0.14,
    sharpened=(0.35, 1.4),
    grain=(0.003, 0.024),
    loss=(4.0, 44.0),
)
SHN_2 = Look(
    walls=(
        ("white paint", (222, 222, 222), 14),
        ("cream", (212, 202, 180), 6),
        ("beige", (186, 172, 148), 8),
        ("sand", (160, 146, 122), 6),
        ("light grey", (178, 180, 184), 12),
        ("grey", (132, 133, 136), 12),
        ("dark grey", (82, 82, 88), 8),
        ("stone", (150, 144, 132), 10),
        ("red brick", (118, 84, 78), 10),
        ("dark brick", (86, 62, 60), 10),
        ("orange brick", (158, 122, 98), 4),
        ("brown", (98, 76, 58), 5),
        ("dark wood", (58, 46, 40), 5),
        ("dark green", (42, 58, 52), 2),
        ("blue grey", (112, 122, 142), 4),
        ("black", (36, 36, 40), 5),
        ("ochre", (190, 160, 90), 2),
        ("salmon", (184, 160, 150), 2),
        ("maroon", (120, 44, 40), 2),
        ("blue paint", (48, 74, 128), 1),
        ("green paint", (120, 146, 120), 1),
        ("dark glass", (48, 52, 60), 4),
    ),
    numbers=(
        ("black", (30, 30, 33), 46),
        ("white", (228, 228, 226), 8),
        ("brass", (176, 146, 92), 4),
        ("bronze", (78, 64, 50), 10),
        ("silver", (172, 174, 180), 3),
        ("navy", (44, 54, 100), 8),
        ("red", (140, 50, 48), 2),
        ("green", (40, 76, 60), 1),
        ("grey", (104, 105, 110), 6),
    ),
    plates=(
        ((214, 214, 220), (48, 48, 54), 38),
        ((216, 218, 228), (62, 72, 122), 18),
        ((50, 58, 114), (214, 216, 224), 13),
        ((46, 48, 56), (212, 212, 212), 5),
        ((190, 186, 176), (54, 52, 52), 10),
        ((140, 138, 134), (48, 48, 50), 4),
        ((210, 202, 180), (64, 54, 48), 3),
        ((116, 52, 52), (216, 212, 210), 2),
        ((66, 84, 74), (212, 214, 208), 1),
        ((70, 62, 56), (180, 154, 104), 2),
    ),
    makes={
        "red brick": (("brick", 7), ("plaster", 3)),
        "dark brick": (("brick", 7), ("plaster", 3)),
        "orange brick": (("brick", 7), ("plaster", 3)),
        "stone": (("stone", 5), ("plaster", 5)),
        "dark glass": (("glass", 5), ("sheet", 5)),
        "dark wood": (("wood", 4), ("sheet", 6)),
        "brown": (("wood", 4), ("boards", 2), ("sheet", 4)),
        "": (("plaster", 54), ("sheet", 24), ("boards", 8), ("stone", 6), ("brick", 4), ("tiles", 2), ("wood", 2)),
    },
    faces={"print": 0.6, "book": 1.4, "poster": 1.3, "italic": 0.3, "pen": 0.35, "enamel": 2.0, "flat": 0.0},
    sheared=0.5,
    slant=0.09,
    askew=(0.0, 0.0, 0.0),
    tight={"train": (0.82, 0.83), "test": (0.80, 0.74)},
    texture=0.75,
    plated=0.64,
    tiled=0.08,
    lined=0.5,
    hindrances=(0.025, 0.035, 0.06, 0.05),
    shades=(0.08, 0.12),
    apart=(0.2, 0.16),
    haze=(0.45, 0.7),
    exposure=(-0.11, 0.27),
    warmth=(-0.045, 0.04),
    defocus=(0.013, 0.042, 0.095, 0.23),
    shaken=0.14,
    sharpened=(0.55, 1.6),
    grain=(0.003, 0.010),
    loss=(4.0, 20.0),
)
ASKEW = (0.3, 0.2, 0.22)
SHN_3 = (
    replace(SHN_1, askew=ASKEW, faces=SHN_1.faces | {"enamel": 1.0, "flat": 1.5}),
    replace(SHN_2, askew=ASKEW, faces=SHN_2.faces | {"flat": 2.0}),
)
LOOKS = {1: (SHN_1,), 2: (SHN_2,), 3: SHN_3}  # by version: its scenes take them in turn
DEFAULT = 3


def look_of(version: int, index: int = 0) -> Look:
    """The look of a scene of a version, or ValueError.

    >>> [look_of(3, index).plated for index in range(4)]
    [0.3, 0.64, 0.3, 0.64]
    """
    if version not in LOOKS:
        raise ValueError(f"version must be one of {', '.join(map(str, LOOKS))}, not {version!r}")
    turns = LOOKS[version]
    return turns[index % len(turns)]
