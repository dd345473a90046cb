"""How are matrices multiplied? Through cuBLASLt itself, for the epilogues that PyTorch does not reach.

PyTorch offers the bias epilogue only. Here a product can also add to its output (gradients of micro-steps, the
residual stream), write GELU and its input at once, or take GELU's gradient on the way out. PyTorch's CUDA wheels
bring the library, so that a binding through ctypes needs no compiler. `reference` is the same in plain PyTorch.
"""

import ctypes
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# cublasLt.h: cublasComputeType_t, cudaDataType, cublasLtMatmulDescAttributes_t, cublasLtEpilogue_t
COMPUTE_32F = 68
DATA_TYPES = {torch.float32: 0, torch.bfloat16: 14, torch.float8_e4m3fn: 28}
TRANSPOSE_A, TRANSPOSE_B, EPILOGUE, BIAS, AUX, AUX_STRIDE = 3, 4, 7, 8, 11, 12
A_SCALE, B_SCALE, FAST_ACCUMULATION, BIAS_TYPE, A_SCALE_MODE, B_SCALE_MODE = 17, 18, 25, 26, 31, 32
SCALE_BY_ROW = 3  # CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F, for Hopper since CUDA 12.9
EPILOGUES = {"": 1, "bias": 4, "gelu": 164, "dgelu": 192}
WORKSPACE_BYTES = 64 * 1024**2
CANDIDATES = 16  # of cuBLASLt's own proposals
# Which of cuBLASLt's proposals `benchmarks/tune_matmul.py` found fastest, where it is not the first. The table is
# fixed, since a choice timed at start would differ from run to run, and the last bits of the results with it.
TUNED = Path(__file__).with_name("kernels_matmul.json")


@dataclass(frozen=True)
class Product:
    """One kind of product: D (M, N) = epilogue(op(A) op(B) + bias + beta D), all matrices row-major."""

    m: int
    n: int
    k: int
    transpose_a: bool
    transpose_b: bool
    epilogue: str = ""
    accumulate: bool = False
    dtype_a: torch.dtype = torch.bfloat16
    dtype_b: torch.dtype = torch.bfloat16
    dtype_d: torch.dtype = torch.bfloat16
    scaled: bool = False  # each row of op(A) and each column of op(B) has its own fp32 scale

    @property
    def name(self) -> str:
        """A key for the table of tuned choices, such as "16384x4800x1600 nt bias bf16"."""
        letters = "nt"[self.transpose_a] + "nt"[self.transpose_b]
        kinds = "/".join(str(t).removeprefix("torch.") for t in (self.dtype_a, self.dtype_b, self.dtype_d))
        plus = (" +" if self.accumulate else "") + (" scaled" if self.scaled else "")
        return f"{self.m}x{self.n}x{self.k} {letters} {self.epilogue or '-'}{plus} {kinds}"


def multiply(
    a: Tensor,
    b: Tensor,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    add: Tensor | None = None,
    epilogue: str = "",
    aux: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """op(a) op(b), through the epilogue; the product's kind decides which algorithm runs.

    Added to the product before an activation: `bias` (N,) and `add` (M, N), which may be `out` itself.
    "gelu" writes GELU's input to `aux`. "dgelu" takes GELU's gradient at `aux`. `scales`, of fp8 operands: what
    the rows of op(a) and the columns of op(b) are to be multiplied by.
    """
    product = kind_of(a, b, transpose_a, transpose_b, bias, out, add, epilogue, scales)
    if out is None:
        out = torch.empty(product.m, product.n, dtype=product.dtype_d, device=a.device)
    plan(product, a.device.index or 0)(a, b, out, add, bias, aux, scales)
    return out


def kind_of(
    a: Tensor,
    b: Tensor,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    add: Tensor | None = None,
    epilogue: str = "",
    scales: tuple[Tensor, Tensor] | None = None,
) -> Product:
    """The kind of product that `multiply` makes of its arguments."""
    m, k = a.shape[::-1] if transpose_a else a.shape
    n = b.shape[0] if transpose_b else b.shape[1]
    made = out.dtype if out is not None else a.dtype if scales is None else torch.bfloat16
    epilogue = epilogue or ("bias" if bias is not None else "")
    return Product(
        m, n, k, transpose_a, transpose_b, epilogue, add is not None, a.dtype, b.dtype, made, scales is not None
    )


class Library:
    """cuBLASLt with its handle and workspace, for one device."""

    def __init__(self, device: int) -> None:
        torch.cuda.current_blas_handle()  # loads the library that PyTorch itself uses
        self.lib = ctypes.CDLL(_loaded_library("libcublasLt.so"))
        self.lib.cublasLtGetVersion.restype = ctypes.c_size_t
        self.version = int(self.lib.cublasLtGetVersion())
        self.handle = ctypes.c_void_p()
        check(self.lib.cublasLtCreate(ctypes.byref(self.handle)))
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=f"cuda:{device}")
        self.card = torch.cuda.get_device_name(device)

    @functools.cache  # noqa: B019
    def tuned(self) -> dict[str, int]:
        """Ranks by product, measured on this card with this version; empty for any other."""
        tables = json.loads(TUNED.read_text()) if TUNED.exists() else {}
        return dict(tables.get(f"{self.card}, cuBLASLt {self.version}", {}))


def _loaded_library(name: str) -> str:
    """The path of a library that this process has loaded."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if name in line:
            return line.split()[-1]
    raise RuntimeError(f"{name} is not loaded: this PyTorch has no CUDA")


class Algorithm(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64 * 8)]


class Proposal(ctypes.Structure):
    _fields_ = [
        ("algorithm", Algorithm),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


@functools.cache
def library(device: int) -> Library:
    return Library(device)


@functools.cache
def plan(product: Product, device: int) -> "Plan":
    owner = library(device)
    made = Plan(product, owner)
    if product.name in owner.tuned():
        made.algorithm = made.propose()[owner.tuned()[product.name]]
    return made


class Plan:
    """A product's descriptors and its algorithm, ready to run on any tensors of these shapes.

    cuBLASLt thinks in columns: a row-major D = A B is its D' = B' A', so our B is its first operand.
    """

    def __init__(self, product: Product, owner: Library) -> None:
        self.product, self.owner, lib = product, owner, owner.lib
        self.description = ctypes.c_void_p()
        check(lib.cublasLtMatmulDescCreate(ctypes.byref(self.description), COMPUTE_32F, 0))
        self.set(TRANSPOSE_A, ctypes.c_int32(product.transpose_b))
        self.set(TRANSPOSE_B, ctypes.c_int32(product.transpose_a))
        self.set(EPILOGUE, ctypes.c_int32(EPILOGUES[product.epilogue]))
        if "gelu" in product.epilogue:
            self.set(AUX_STRIDE, ctypes.c_int64(product.n))
            self.set(AUX, ctypes.c_void_p(owner.workspace.data_ptr()))
        if product.dtype_a.itemsize == 1:
            self.set(FAST_ACCUMULATION, ctypes.c_int8(1))
        if product.scaled:
            for attribute in (A_SCALE_MODE, B_SCALE_MODE):
                self.set(attribute, ctypes.c_int32(SCALE_BY_ROW))
            self.set(A_SCALE, ctypes.c_void_p(owner.workspace.data_ptr()))
            self.set(B_SCALE, ctypes.c_void_p(owner.workspace.data_ptr()))
        if product.epilogue not in ("", "dgelu"):
            self.set(BIAS_TYPE, ctypes.c_int32(DATA_TYPES[torch.bfloat16]))
            self.set(BIAS, ctypes.c_void_p(owner.workspace.data_ptr()))
        m, n, k = product.m, product.n, product.k
        self.b = self.layout(product.dtype_b, *((k, n) if product.transpose_b else (n, k)))
        self.a = self.layout(product.dtype_a, *((m, k) if product.transpose_a else (k, m)))
        self.d = self.layout(product.dtype_d, n, m)
        self.alpha, self.beta = ctypes.c_float(1.0), ctypes.c_float(1.0 if product.accumulate else 0.0)
        self.algorithm = self.propose()[0]

    def set(self, attribute: int, value: "ctypes._SimpleCData") -> None:  # type: ignore[type-arg]
        size = ctypes.sizeof(value)
        check(
            self.owner.lib.cublasLtMatmulDescSetAttribute(
                self.description, attribute, ctypes.byref(value), ctypes.c_size_t(size)
            )
        )

    def layout(self, dtype: torch.dtype, rows: int, columns: int) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        check(
            self.owner.lib.cublasLtMatrixLayoutCreate(
                ctypes.byref(made), DATA_TYPES[dtype], ctypes.c_uint64(rows), ctypes.c_uint64(columns),
                ctypes.c_int64(rows),
            )
        )  # fmt: skip
        return made

    def propose(self) -> list[Algorithm]:
        """cuBLASLt's algorithms for this product, by its own estimate best first."""
        lib, preference = self.owner.lib, ctypes.c_void_p()
        check(lib.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)))
        limit = ctypes.c_uint64(WORKSPACE_BYTES)
        check(lib.cublasLtMatmulPreferenceSetAttribute(preference, 1, ctypes.byref(limit), ctypes.c_size_t(8)))
        found, count = (Proposal * CANDIDATES)(), ctypes.c_int()
        check(
            lib.cublasLtMatmulAlgoGetHeuristic(
                self.owner.handle, self.description, self.b, self.a, self.d, self.d, preference, CANDIDATES,
                found, ctypes.byref(count),
            ),
            self.product.name,
        )  # fmt: skip
        lib.cublasLtMatmulPreferenceDestroy(preference)
        if not count.value:
            raise RuntimeError(f"cuBLASLt has no algorithm for {self.product.name}")
        return [found[i].algorithm for i in range(count.value) if found[i].state == 0]

    def __call__(
        self,
        a: Tensor,
        b: Tensor,
        d: Tensor,
        add: Tensor | None = None,
        bias: Tensor | None = None,
        aux: Tensor | None = None,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        if bias is not None:
            self.set(BIAS, ctypes.c_void_p(bias.data_ptr()))
        if aux is not None:
            self.set(AUX, ctypes.c_void_p(aux.data_ptr()))
        if scales is not None:
            self.set(A_SCALE, ctypes.c_void_p(scales[1].data_ptr()))
            self.set(B_SCALE, ctypes.c_void_p(scales[0].data_ptr()))
        owner, out = self.owner, ctypes.c_void_p(d.data_ptr())
        addend = out if add is None else ctypes.c_void_p(add.data_ptr())
        check(
            owner.lib.cublasLtMatmul(
                owner.handle, self.description, ctypes.byref(self.alpha), ctypes.c_void_p(b.data_ptr()), self.b,
                ctypes.c_void_p(a.data_ptr()), self.a, ctypes.byref(self.beta), addend, self.d, out, self.d,
                ctypes.byref(self.algorithm), ctypes.c_void_p(owner.workspace.data_ptr()),
                ctypes.c_size_t(WORKSPACE_BYTES), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            ),
            self.product.name,
        )  # fmt: skip


def check(status: int, what: str = "") -> None:
    if status:
        raise RuntimeError(f"cuBLASLt failed with status {status} {what}")


def reference(
    a: Tensor,
    b: Tensor,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    add: Tensor | None = None,
    epilogue: str = "",
    aux: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What `multiply` computes, in plain PyTorch."""
    value = (a.t() if transpose_a else a).float() @ (b.t() if transpose_b else b).float()
    if scales is not None:
        value = value * scales[0][:, None] * scales[1]
    if epilogue == "dgelu":
        assert aux is not None
        with torch.enable_grad():
            h = aux.float().requires_grad_()
            value = torch.autograd.grad(F.gelu(h, approximate="tanh"), h, value)[0]
    if bias is not None:
        value = value + bias.float()
    if add is not None:
        value = value + add.float()
    if epilogue == "gelu":
        assert aux is not None
        aux.copy_(value)
        value = F.gelu(value, approximate="tanh")
    if out is not None:
        return out.copy_(value)
    return value.to(a.dtype if scales is None else torch.bfloat16)
