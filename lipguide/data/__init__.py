"""House numbers: SVHN as it is published, and Synthetic House Numbers, its twin that needs no download."""

from lipguide.data.cards import SHN_CARD, SVHN_TERMS
from lipguide.data.contact_sheet import contact_sheet
from lipguide.data.digits import Digits, digits
from lipguide.data.facts import svhn_facts
from lipguide.data.geometry import geometry, geometry_table
from lipguide.data.items import BACKGROUND, Annotation, Scene
from lipguide.data.real import REAL, first, folder_of, real
from lipguide.data.scenes import Scenes, scenes
from lipguide.data.shn import SyntheticHouseNumbers
from lipguide.data.shn.difficulty import Difficulty
from lipguide.data.svhn import SVHN, PictureError
from lipguide.data.svhn.download import DownloadError, download_svhn

__all__ = [
    "BACKGROUND",
    "SHN_CARD",
    "SVHN",
    "SVHN_TERMS",
    "Annotation",
    "Difficulty",
    "Digits",
    "DownloadError",
    "PictureError",
    "REAL",
    "Scene",
    "Scenes",
    "SyntheticHouseNumbers",
    "contact_sheet",
    "digits",
    "download_svhn",
    "first",
    "folder_of",
    "geometry",
    "geometry_table",
    "real",
    "scenes",
    "svhn_facts",
]
