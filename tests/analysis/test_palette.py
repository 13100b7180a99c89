"""Arms differ in colour, in grey and by their dash, and look the same in every figure."""

from itertools import combinations

from matplotlib.colors import to_rgb

from analysis.drawing.palette import ARMS, styles
from muonlab.optim import list_optimizers


def luminance(colour):
    red, green, blue = to_rgb(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_an_arms_style_does_not_depend_on_its_company():
    assert styles(["muonclip"])["muonclip"] == styles(["adamw", "muon", "muonclip"])["muonclip"]
    assert list(styles(["muon", "adamw", "muon"])) == ["muon", "adamw"]


def test_no_two_arms_share_colour_dash_or_marker():
    for attribute in ("label", "colour", "dash", "marker"):
        values = [getattr(style, attribute) for style in ARMS.values()]
        assert len(set(values)) == len(values), attribute


def test_lines_are_dark_enough_to_print():
    assert max(luminance(style.colour) for style in ARMS.values()) < 0.65


def test_variants_keep_the_colour_family_and_differ_in_shade_and_dash():
    found = styles(["muonclip tau=30", "muonclip tau=100", "muonclip tau=10"])
    labels = [style.label for style in found.values()]
    assert labels == ["MuonClip, tau=30", "MuonClip, tau=100", "MuonClip, tau=10"]
    shades = [luminance(style.colour) for style in found.values()]
    assert shades == sorted(shades)
    for one, other in combinations(found.values(), 2):
        assert one.colour != other.colour
        assert one.dash != other.dash
    assert found["muonclip tau=30"].colour == ARMS["muonclip"].colour


def test_an_unknown_arm_is_drawn_and_named():
    style = styles(["mine lr=0.1"])["mine lr=0.1"]
    assert (style.label, style.colour) == ("mine, lr=0.1", "#000000")
    mine, yours = styles(["mine", "yours"]).values()
    assert mine.colour != yours.colour


def test_every_optimizer_by_name_is_in_the_palette():
    assert not set(list_optimizers()) - set(ARMS)


def test_an_arm_of_the_palette_is_found_by_its_longest_name():
    found = styles(["muon-qknorm", "muon-vo-mlp", "muonclip-tau100", "adamw-qknorm", "muonish"])
    labels = [style.label for style in found.values()]
    assert labels == ["Muon, QK-norm", "Muon, vo-mlp", "MuonClip, τ = 100", "AdamW, QK-norm", "muonish"]
    assert found["muon-qknorm"] == ARMS["muon-qknorm"]
    assert found["muonclip-tau100"].colour == ARMS["muonclip"].colour
