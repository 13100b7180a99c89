"""Whether a run outgrew its GPU or met other processes on it, from the message of torch's allocator."""

import pytest
import torch

from muonlab.errors import EnvironmentFault
from muonlab.train.ending import ending_of

MESSAGE = (
    "CUDA out of memory. Tried to allocate {refused}. GPU 0 has a total capacity of 79.15 GiB of which 147.75 MiB is"
    " free. {holders}Of the allocated memory {allocated} GiB is allocated by PyTorch, and 512.00 MiB is reserved by"
    " PyTorch but unallocated. If reserved but unallocated memory is large try something else."
)


@pytest.mark.parametrize(
    ("holders", "allocated", "refused", "status"),
    [
        ("Including non-PyTorch memory, this process has 78.98 GiB memory in use. ", 78, "518.00 MiB", "out-of-memory"),
        ("Process 483452 has 78.98 GiB memory in use. ", 78, "518.00 MiB", "out-of-memory"),  # seen from the host
        ("", 78, "800.00 MiB", "out-of-memory"),
        ("", 20, "128.00 GiB", "out-of-memory"),
        (
            "Process 17 has 38.00 GiB memory in use. Including non-PyTorch memory, this process has 40.98 GiB memory in"
            " use. ", 40, "1.50 GiB", "interrupted",
        ),
        ("Process 17 has 38.00 GiB memory in use. Process 18 has 40 GiB memory in use. ", 40, "1 GiB", "interrupted"),
        ("", 40, "1.50 GiB", "interrupted"),
    ],
)  # fmt: skip
def test_a_gpus_memory_is_an_outcome_where_the_run_alone_asked_for_more_than_there_is(
    holders, allocated, refused, status
):
    error = torch.OutOfMemoryError(MESSAGE.format(holders=holders, allocated=allocated, refused=refused))
    assert ending_of(error, 3).status == status


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    ],
)
def test_a_gpu_that_other_runs_left_no_memory_for_a_library_is_tried_again(text):
    ending = ending_of(RuntimeError(text), 3)
    assert ending.status == "interrupted"
    assert isinstance(ending.error, EnvironmentFault)
