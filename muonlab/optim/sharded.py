"""Parameters that are spread over ranks (DTensor, as FSDP2 makes them): the part that is here, and the whole.

A tensor that knows its device mesh is one of them; asking for the class would import DTensor, which takes half a
second, where nobody has one.
"""

from typing import Any

from torch import Tensor

from muonlab.errors import MuonlabError


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank may hold only a part of the tensor."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor: Tensor) -> Tensor:
    """The rows that this rank holds, as a view to be written to; a tensor of one process is all here."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank, detached; a collective where it is sharded."""
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()  # type: ignore[attr-defined]


def spread_like(param: Tensor, value: Tensor) -> Tensor:
    """A whole tensor of the parameter's shape, held as the parameter is: this rank keeps its rows."""
    if not is_sharded(param) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every rank has the whole of it, so nothing need be sent.
    return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)  # type: ignore[attr-defined]


def check_placement(param: Tensor, name: str) -> None:
    """Raise MuonlabError for a parameter that is spread in another way than by rows over one group of ranks."""
    if not is_sharded(param):
        return
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise MuonlabError(
            f"{name} is spread over ranks as {placements}; Muon takes parameters that are whole on every rank (DDP),"
            " or cut along their first dimension over one group of ranks (FSDP2)"
        )


def gathered(state: Any, keep: bool = True) -> Any:
    """The same nested state with whole tensors on the CPU, so that it loads at every world size; a collective.

    keep: whether this rank wants it; the others take part and keep None in each sharded tensor's place.
    """
    if isinstance(state, dict):
        return {key: gathered(value, keep) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered(value, keep) for value in state)
    if not isinstance(state, Tensor):
        return state
    everything = whole(state)
    return everything.cpu() if keep else None
