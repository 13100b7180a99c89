"""python -m muonlab.optim.check mine.py:mine: does an optimizer keep what a training loop relies on? A table."""

import torch

from muonlab.command import argument_parser, run_command
from muonlab.errors import MuonlabError
from muonlab.optim.conformance import Subject, Violation
from muonlab.optim.optimizers import OPTIMIZERS
from muonlab.optim.torch_contract import CHECKS
from muonlab.plugins import load_plugin, plugin_fault

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> int:
    """Exit code: 0 every check holds, 2 one does not, or a mistake in the command."""
    parser = argument_parser("muonlab.optim.check", __doc__.partition(": ")[2])
    parser.add_argument(
        "optimizer",
        help="FILE.py:NAME, FILE.py where it registers one optimizer, PLUGIN:NAME of an installed plug-in, or the NAME"
        " of one of the package's own",
    )
    subject = Subject(find_optimizer(parser.parse_args().optimizer))
    torch.set_num_threads(1)
    width = max(map(len, CHECKS))
    print(f"{subject.name:<{width}}  " + "  ".join(f"{dtype:<6}" for dtype in DTYPES))
    failures = []
    for title in CHECKS:
        found = {dtype: fault_of(title, subject, dtype) for dtype in DTYPES}
        cells = ("FAILS" if fault else "holds" for fault in found.values())
        print(f"{title:<{width}}  " + "  ".join(f"{cell:<6}" for cell in cells), flush=True)
        failures += [f"{title}, {dtype}: {fault}" for dtype, fault in found.items() if fault]
    for failure in failures:
        print(failure)
    if failures:
        raise MuonlabError(
            f"{len(failures)} of {len(CHECKS) * len(DTYPES)} checks of {subject.name} do not hold"
        )
    return 0


def find_optimizer(place: str) -> str:
    """The registered name of what `place` names, whose plug-in is imported.

    Raises MuonlabError for an unknown name and for a file that registers no optimizer, or several where none is named.
    """
    before, colon, name = place.rpartition(":")
    plugin = place if not colon and place.endswith(".py") else before
    if not plugin:
        OPTIMIZERS.section(place)
        return place
    registered = sorted(entry for kind, entry in load_plugin(plugin).entries if kind == "optimizer")
    if colon and name in registered:
        return name
    if colon or len(registered) != 1:
        names = ", ".join(registered) or "none"
        raise MuonlabError(f"{place} does not say which optimizer is meant; {plugin} registers {names}")
    return registered[0]


def fault_of(title: str, subject: Subject, dtype: str) -> str:
    """What is wrong with the optimizer by one check, in a sentence; "" if nothing is."""
    try:
        CHECKS[title](subject, DTYPES[dtype])
    except (Violation, MuonlabError) as error:
        return str(error)
    except Exception as error:
        if (fault := plugin_fault(error)) is not None:
            return str(fault)
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""


if __name__ == "__main__":
    run_command(main)
