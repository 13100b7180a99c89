"""Eigenvalues and eigenvectors of covariances, which every solver fails on now and then."""

import torch
from torch import Tensor


def eigen(A: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n), ascending, and eigenvectors (..., n, n) of symmetric matrices, in their dtype.

    In fp32 solvers fail on some matrices of low rank, as the covariance of a few gradients is (cuSOLVER, as seen on an
    H200 and in PyTorch's issue 105359; MKL, issue 145801). Those are solved in fp64, and where that fails too, by the
    host's solver. Raises torch's error where none can, as for entries that are not finite. Waits for the device.
    """
    for device in dict.fromkeys((A.device, torch.device("cpu"))):
        for dtype in dict.fromkeys((A.dtype, torch.float64)):
            try:
                values, vectors = torch.linalg.eigh(A.to(device, dtype))
            except RuntimeError as error:  # cuSOLVER's failures are not always a LinAlgError
                failure = error
            else:
                return values.to(A), vectors.to(A)
    raise failure
