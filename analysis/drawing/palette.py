"""One colour, dash and marker for every arm, the same in every figure.

The first four optimizers have colours of Okabe and Ito's (2008), distinct under the common colour-blindnesses;
the dashes and markers distinguish arms in grey. The solid line is plain Muon, the short dashes the baseline.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.colors import to_hex, to_rgb

Dash = str | tuple[float, tuple[float, ...]]


@dataclass(frozen=True)
class Style:
    """How one arm is drawn; `dash` is a matplotlib line style, in units of the line's width."""

    label: str
    colour: str
    dash: Dash
    marker: str

    @property
    def points(self) -> dict[str, Any]:
        """How its points are drawn, without a line; a white edge would leave nothing of a letter or a star."""
        edge = self.colour if self.marker[0] in "$*" else "white"
        return {"color": self.colour, "marker": self.marker, "mec": edge, "ls": "none"}


ARMS = {
    "adamw": Style("AdamW", "#4d4d4d", (0, (2.2, 1.1)), "s"),
    "adamwclip": Style("AdamW + QK-Clip", "#009e73", (0, (4, 1.1, 1, 1.1)), "D"),
    "adamw-qknorm": Style("AdamW, QK-norm", "#8a8a8a", (0, (4, 2)), "p"),
    "muon": Style("Muon", "#d55e00", "-", "o"),
    "muonclip": Style("MuonClip", "#0072b2", (0, (6, 1.4)), "^"),
    "muon-qknorm": Style("Muon, QK-norm", "#7b3294", (0, (3, 1, 1, 1, 1, 1)), "P"),
    "muon-softcap": Style("Muon, soft-cap", "#e69f00", (0, (2.5, 1.2)), "X"),
    "muon-decay": Style("Muon, weight decay", "#cc79a7", (0, (1.2, 1.2)), "v"),
    "muon-slowqk": Style("Muon, Q/K lr / 10", "#999933", (0, (7, 1.5, 3, 1.5)), "<"),
    "muon-perhead": Style("Muon, per head", "#7a3b00", (0, (5, 1, 1, 1)), ">"),
    "muon-adamwqk": Style("AdamW on Q and K", "#1b7837", (0, (2, 2)), "h"),
    "muon-quack": Style("Muon, QuacK", "#3f9fd6", (0, (3, 2)), "H"),
    "muon-gate": Style("Muon, gated attention", "#5c4d9e", (0, (6, 2, 1, 2)), "d"),
    "muon-sink": Style("Muon, sink", "#b35806", (0, (1, 1.8)), "8"),
    "muonh": Style("MuonH", "#008080", (0, (5, 1)), "$h$"),
    "muonh-clip": Style("MuonH + QK-Clip", "#4a9a9a", (0, (2, 1, 4, 1)), "$c$"),
    "muown": Style("Muown", "#9a3324", (0, (2.6, 1.4)), "$w$"),
    "normuon": Style("NorMuon", "#c51b7d", (0, (4.5, 1.2)), "$n$"),
    "adamuon": Style("AdaMuon", "#4d9221", (0, (1.4, 1)), "$a$"),
    "namo": Style("NAMO", "#35978f", (0, (6, 1.2, 2, 1.2)), "$o$"),
    "contra_muon": Style("Contra-Muon", "#8c510a", (0, (3.4, 1)), "$k$"),
    "muon2": Style("Muon²", "#762a83", (0, (2, 1.6, 2, 0.8)), "$2$"),
    "aurora": Style("Aurora", "#2166ac", (0, (1.8, 1.1)), "$r$"),
    "pmuon": Style("PMuon", "#5aae61", (0, (5.5, 1.6)), "$p$"),
    "dion": Style("Dion", "#b2182b", (0, (3.8, 1.4, 1, 1.4)), "$d$"),
    "lion": Style("Lion", "#b15928", (0, (3, 0.8)), "$L$"),
    "signum": Style("Signum", "#a6761d", (0, (1.6, 0.8)), "$S$"),
    "ademamix": Style("AdEMAMix", "#117733", (0, (5, 1.4)), "$A$"),
    "nadamw": Style("NAdamW", "#666633", (0, (2, 0.9, 1, 0.9)), "$N$"),
    "schedulefree_adamw": Style("Schedule-free AdamW", "#44aa99", (0, (4, 1.6)), "$F$"),
    "scion": Style("Scion", "#aa4499", (0, (6, 1, 1, 1)), "$C$"),
    "soap": Style("SOAP", "#332288", (0, (5, 2.2)), "$O$"),
    "soap_muon": Style("SOAP-Muon", "#6699cc", (0, (3, 1.5, 1, 1.5)), "$M$"),
    "shampoo": Style("Shampoo", "#882255", (0, (1.8, 1.5)), "$H$"),
    "kl_shampoo": Style("KL-Shampoo", "#cc6677", (0, (7, 2)), "$K$"),
}
UNKNOWN = Style("", "#000000", (0, (1, 1)), "*")
UNKNOWN_COLOURS = ("#000000", "#6a3d9a", "#1f78b4", "#33a02c")
VARIANT_DASHES: tuple[Dash, ...] = ((0, (3, 1.2)), (0, (5, 1.2, 1.2, 1.2)), (0, (1.1, 1.1)))
VARIANT_MARKERS = ("d", "H", "8")


def styles(arms: Iterable[str]) -> dict[str, Style]:
    """The style of each arm, in the order given.

    An arm's name is one of `ARMS`, or one of them and what varies after a space or a hyphen ("muonclip tau=10",
    "muonclip-tau100"): then it keeps the optimizer's colour, and the second and later variants of one optimizer are
    lighter with dashes and markers of their own. Names outside the palette, such as an optimizer of one's own, are
    dotted stars, the first one black, the next in other colours.
    """
    by_arm: dict[str, Style] = {}
    variants: dict[str, int] = {}
    unknown: dict[str, Style] = {}
    for arm in dict.fromkeys(arms):
        name, detail = split_arm(arm)
        if name not in ARMS and name not in unknown:
            colour = UNKNOWN_COLOURS[len(unknown) % len(UNKNOWN_COLOURS)]
            unknown[name] = replace(UNKNOWN, label=name.replace("-", " "), colour=colour)
        base = ARMS.get(name) or unknown[name]
        rank = variants.get(name, 0)
        variants[name] = rank + 1
        style = replace(base, label=f"{base.label}, {detail}" if detail else base.label)
        if rank:
            dash = VARIANT_DASHES[(rank - 1) % len(VARIANT_DASHES)]
            marker = VARIANT_MARKERS[(rank - 1) % len(VARIANT_MARKERS)]
            colour = lighter(base.colour, min(0.25 * rank, 0.5))
            style = replace(style, colour=colour, dash=dash, marker=marker)
        by_arm[arm] = style
    return by_arm


def split_arm(arm: str) -> tuple[str, str]:
    """The longest name of `ARMS` that the arm begins with, and the rest of it ("tau100": "τ = 100"; "" for
    nothing). An arm of another name is that name up to the first space."""
    for name in sorted(ARMS, key=len, reverse=True):
        if re.match(rf"{name}(?![a-z0-9])", arm):
            detail = arm[len(name) :].strip(" -")
            return name, re.sub(r"^tau(\d+)$", r"τ = \1", detail)
    name, _, detail = arm.partition(" ")
    return name, detail


def lighter(colour: str, share: float) -> str:
    """`colour` moved towards white by `share` in [0, 1]."""
    red, green, blue = (channel + (1 - channel) * share for channel in to_rgb(colour))
    return to_hex((red, green, blue))
