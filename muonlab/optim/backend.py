"""How an orthogonalisation is computed: which form, how many matrices at once, which products halved.

The choice depends on shape, dtype, device and schedule alone, never on a timing taken at run time, so a run
makes the same choice everywhere. The constants are measurements; `make bench-optim` takes them again.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from muonlab.errors import MuonlabError, unknown_name
from muonlab.optim.schedule_design import Row

logger = logging.getLogger(__name__)

FORMS = ("plain", "gram")

# The Gram form multiplies the rounding error of X Xᵀ by a² a step; it starts again from X before that passes
# this.
MAX_ERROR_GROWTH = 0.05

# Strips are narrower products, which cost more a multiplication than whole ones: what a strip product of
# a symmetric n x n result costs, relative to the whole product, in fp32 on an AVX-512 core.
STRIP = 128
STRIP_COST = 0.72
STRIP_FROM = 320

# Working set of a stack on a CPU, in bytes. The optimum is flat: stacks of 12 to 24 matrices of 64 x 64, of
# 3 or 4 of 128 x 128, were fastest with a second-level cache of 2 MiB.
CACHE_BYTES = 5 * 2**18

# The same elsewhere: enough work to hide the calls, bounded for the sake of memory. Chosen, not measured.
DEVICE_BYTES = 2**28


@cache
def bf16_unit() -> str:
    """What multiplies bf16 on this CPU, "AMX" or "AVX512-BF16"; "" where it is emulated.

    `make bench-optim` measures what it brings here.
    """
    capabilities = torch.cpu.get_capabilities()
    units = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
    return next((unit for name, unit in units.items() if capabilities.get(name)), "")


@dataclass(frozen=True)
class Backend:
    """One way to compute.

    `form` is "plain" (every step multiplies X) or "gram" (steps act on X Xᵀ, X is multiplied once). `stack`
    is the largest number of matrices in one batched product; 0 means all. `strip` is the strip height of
    symmetric products; 0 computes them whole.
    """

    form: str = "plain"
    stack: int = 0
    strip: int = 0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise unknown_name("orthogonalisation form", self.form, FORMS)
        if self.stack < 0 or self.strip < 0:
            raise MuonlabError(f"stack and strip must not be negative, got {self.stack} and {self.strip}")


def blocks(rows: Sequence[Row], form: str, dtype: torch.dtype) -> list[tuple[Row, ...]]:
    """The rows cut where X is multiplied out and X Xᵀ taken anew: after every row in the plain form.

    In the Gram form R = X Xᵀ carries rounding of one unit `eps`, and a tiny eigenvalue of R, right or wrong,
    grows by a² a step. A cut comes where that would exceed MAX_ERROR_GROWTH: never within five Jordan steps
    in fp32, after every second one in fp16.
    """
    if form == "plain":
        return [(row,) for row in rows]
    ended: list[tuple[Row, ...]] = []
    current: list[Row] = []
    error = eps = torch.finfo(dtype).eps
    for row in rows:
        if error > MAX_ERROR_GROWTH and current:
            ended.append(tuple(current))
            current, error = [], eps
        current.append(row)
        error *= row[0] ** 2
    return [*ended, tuple(current)]


def count_products(rows: Sequence[Row], form: str, dtype: torch.dtype) -> tuple[int, int]:
    """How many products one matrix needs: of the long side (X Xᵀ and X Q, in equal parts), and of n x n
    matrices."""
    cut = blocks(rows, form, dtype)
    squares = sum(c != 0 for _, _, c in rows)
    return 2 * len(cut), squares + 3 * (
        len(rows) - len(cut)
    )  # R², and Q W and R W W of the later rows of a block


def cost(n: int, m: int, rows: Sequence[Row], form: str, dtype: torch.dtype, symmetric: float = 1.0) -> float:
    """Floating-point operations on one matrix with short side n and long side m.

    `symmetric` is what a product with a symmetric result costs relative to a general one. At symmetric = 1
    the plain form needs steps (4 n² m + 2 n³), the Gram form without restart 4 n² m + (8 steps - 6) n³.
    """
    long, short = count_products(rows, form, dtype)
    return n * n * m * long * (1 + symmetric) + 2 * n**3 * short * symmetric


def choose_backend(n: int, m: int, rows: tuple[Row, ...], dtype: torch.dtype, device_type: str) -> Backend:
    """The backend that measurements favour for short side n and long side m; each new choice is logged (INFO)."""
    rule = _rule if torch.compiler.is_compiling() else _remembered_rule
    return rule(n, m, rows, dtype, device_type)


def _rule(n: int, m: int, rows: tuple[Row, ...], dtype: torch.dtype, device_type: str) -> Backend:
    on_cpu = device_type == "cpu"
    strip = STRIP if on_cpu and n >= STRIP_FROM and dtype in (torch.float32, torch.float64) else 0
    symmetric = STRIP_COST if strip else 1.0
    form = min(FORMS, key=lambda form: cost(n, m, rows, form, dtype, symmetric))
    # plain: X twice, R and Q; the Gram form has four n x n matrices, and meets X at its ends only
    numbers = 2 * n * m + 2 * n * n if form == "plain" else n * m + 4 * n * n
    stack = max(1, (CACHE_BYTES if on_cpu else DEVICE_BYTES) // (dtype.itemsize * numbers))
    return Backend(form, stack, strip)


@cache
def _remembered_rule(n: int, m: int, rows: tuple[Row, ...], dtype: torch.dtype, device_type: str) -> Backend:
    backend = _rule(n, m, rows, dtype, device_type)
    logger.info(
        "orthogonalisation of %d x %d on %s in %s, %d steps: %s", n, m, device_type, dtype, len(rows), backend
    )
    return backend
