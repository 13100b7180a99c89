"""How evenly a mixture loads its experts, and how sharply its router decides, over steps."""

from analysis.figures.registry import Drawing, figure
from analysis.figures.spectra import draw_spectra
from analysis.frames import Frames
from muonlab.errors import MuonlabError


@figure("balance")
def draw_balance(
    frames: Frames, title: str = "", x: str = "", over: str = "mean", window: int = 25
) -> Drawing:
    """Load violation of the experts and entropy of the router over steps."""
    recorded = [
        c
        for c in ("balance/violation", "router/entropy")
        if any(n.startswith(c) for n in frames.steps.columns)
    ]
    if not recorded:
        raise MuonlabError("no run recorded expert loads; they are those of mixtures of experts")
    return draw_spectra(frames, [f"{name}/*" for name in recorded], title, x, over, window)
