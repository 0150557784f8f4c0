"""What a user of the data must know: terms of SVHN, and the card of Synthetic House Numbers."""

from __future__ import annotations

__all__ = ["SHN_CARD", "SVHN_TERMS"]

SVHN_TERMS = """\
SVHN, the Street View House Numbers data set (http://ufldl.stanford.edu/housenumbers), is for non-commercial use only.
It was made from Google Street View pictures by Netzer, Wang, Coates, Bissacco, Wu and Ng; whoever publishes results
on it cites: Reading Digits in Natural Images with Unsupervised Feature Learning, NIPS Workshop on Deep Learning and
Unsupervised Feature Learning, 2011.
"""

SHN_CARD = """\
**Synthetic House Numbers (SHN), versions 1 to 3**

*What it is.* Pictures of house numbers drawn by a program, with a box, a label and a mask for every digit:
33,402 for training, 13,068 for testing, as many as SVHN has. Sizes, digits per number, label frequencies, aspect
ratios, gaps, slants and margins are drawn from the published statistics of SVHN's annotations, for train and test
each. Walls, plates, typefaces, shadows, occluders, blur, noise and compression are drawn by rules; no photograph, and
no weight learnt from one, is in it.

*Versions.* SHN 1 (`version=1`) was drawn without a real picture at hand. SHN 2 (`version=2`) has the same numbers in
the same places and other looks: its colours, plates, blur and grain were set by hand so that brightness,
colourfulness, contrast, sharpness, grain and the share of dark ink come near to those of the 554 digits in 256
pictures of SVHN's training split. SHN 3 comes when no version is asked for, and the networks that ship were trained
on it. It takes the looks of both in turn, scene by scene, those of SHN 1 with the typefaces of enamelled plates too,
and has more of what networks of both misread in the 256 pictures: threes with a flat top, and digits askew. How like
SVHN each version is, by what networks that saw nothing else read and find on the 256 pictures, is measured by
`python -m lipguide data compare`; the chapter `house-numbers` has the figures. As choices were made by the 256
pictures, they are no test of SHN 3, and of SHN 2 only in part. All versions are frozen: another look is another
version.

*What it is for.* Running every chapter offline, with masks that SVHN lacks, and without its terms of use.

*What it is not.* A replacement for SVHN in a comparison with published figures, or a sample of real streets: its
typefaces are those of matplotlib and some drawn here, its walls are patterns, its weather and cameras are formulas.
Neighbouring letters and cut digits carry no label, as in SVHN. Accuracy on SHN says nothing about real streets until
it is measured there: `python -m lipguide data compare --svhn DIR` does.

*How it repeats.* The scene of (version, seed, split, index) depends on nothing else. Versions of NumPy, SciPy, Pillow
and matplotlib may change single pixels; the cache keeps them apart.

*Licence.* MIT, as the package; the typefaces' licences (DejaVu, STIX, Computer Modern) allow pictures of their
glyphs. *Cite* the package; and SVHN, by Netzer et al. (2011), whose published statistics it follows.
"""
