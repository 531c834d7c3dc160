"""The compiled kernels: which are here, which tensors they take, how they are called.

    python -m miniflux.networks.native        lists what is built and what is used on this machine

`miniflux._cpu` (csrc/cpu) computes norm, rotation and attention in one call, and the layers between
the attentions of a small network. `miniflux._cuda` (csrc/cuda) has a ladder of attention kernels:
`naive`, `tiles`, `mma`, and `wgmma` for an H100. Of the first three, `attention` is the highest
that takes the tensors: `mma` for float16 and bfloat16 with heads of 32, 64 or 128 channels.
Both are built when the package is installed, where there is a compiler. Without them PyTorch's own
operations do the same.

The kernels follow addresses, so each function here checks its tensors first: type, dtype, device,
shape, strides and alignment. The attention kernels raise a ValueError for tensors that they cannot
take; the layers fall back to PyTorch's operations, which raise PyTorch's own errors. Results are
allocated in the dtype and on the device of the input, whatever PyTorch's defaults are.

Shapes of attention: qkv (B, S, 3, H, D), pe (S, D/2, 2, 2) in float32, img_scale and txt_scale
(2, D): the scales of queries and keys. Those of txt_scale are for the first L tokens.
"""

import argparse
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


def find(name: str) -> tuple[ModuleType | None, str]:
    """A compiled module, or the reason why it is missing."""
    try:
        return import_module(name), ""
    except ImportError as error:
        return None, str(error)


_cpu, WHY_NOT = find("miniflux._cpu")
if torch.version.cuda:
    _cuda, WHY_NOT_CUDA = find("miniflux._cuda")
else:
    _cuda, WHY_NOT_CUDA = None, "this PyTorch is built without CUDA"

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
RUNGS = ("naive", "tiles", "mma", "wgmma")                  # of the CUDA ladder, for `attend`
WIDEST = 256                                                # channels of a head, with CUDA
PLAIN = (Tensor, torch.nn.Parameter)                        # subclasses may hold something else


# ------------------------------------------------------------------------------ what may be called


def is_eager() -> bool:
    """Whether an operation is simply computed when it is called.

    It is not in compiled graphs, traces, modes that intercept operations (fake tensors, counters),
    function transforms (vmap, grad), forward-mode differentiation and autocast. There a kernel that
    PyTorch cannot see would be left out, or would compute on addresses that hold nothing."""
    if torch.compiler.is_compiling():                       # Note: first, so that it is not traced
        return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    )


def needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def elements_overlap(x: Tensor) -> bool:
    """Whether two elements may share an address, as in an expanded tensor."""
    end = 1
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size > 1 and stride < end:
            return True
        end = max(end, stride * (size - 1) + end)
    return False


# ---------------------------------------------------------------------------------- attention


def check(qkv: Tensor, pe: Tensor, img_scale: Tensor, txt_scale: Tensor, L: int) -> None:
    """Raises ValueError for tensors that do not fit together, whichever backend computes."""
    shape = tuple(qkv.shape)
    if len(shape) != 5 or shape[2] != 3 or shape[4] % 2 or not qkv.is_floating_point():
        raise ValueError(f"qkv is {qkv.dtype} {shape}: expected floating-point numbers "
                         "(B, S, 3, H, D) with an even D")
    S, D = shape[1], shape[4]
    if pe.shape != (S, D // 2, 2, 2) or pe.dtype is not torch.float32:
        raise ValueError(f"the RoPE table is {pe.dtype} {tuple(pe.shape)}: expected float32 "
                         f"{(S, D // 2, 2, 2)}, a matrix for each token and pair of channels")
    if img_scale.shape != (2, D) or txt_scale.shape != (2, D) or not 0 <= L <= S:
        raise ValueError(f"the scales of image and text are {tuple(img_scale.shape)} and "
                         f"{tuple(txt_scale.shape)}, for {L} text tokens of {S}: expected {(2, D)} "
                         f"each, for queries and keys, and 0 to {S} text tokens")
    if not (img_scale.is_floating_point() and txt_scale.is_floating_point()):
        raise ValueError(f"the scales of image and text are {img_scale.dtype} and "
                         f"{txt_scale.dtype}: expected floating-point numbers")
    if not qkv.device == pe.device == img_scale.device == txt_scale.device:
        raise ValueError(f"qkv, RoPE table and scales lie on {qkv.device}, {pe.device}, "
                         f"{img_scale.device} and {txt_scale.device}: expected one device")


def refusal(*tensors: Tensor, eager: bool | None = None) -> str | None:
    """The reason why the attention kernels cannot take qkv and the other tensors; None if they can.

    eager: the result of `is_eager`, if it was called before."""
    qkv = tensors[0]
    on_cpu, dtype = qkv.is_cpu, qkv.dtype
    if not on_cpu and not qkv.is_cuda:
        return f"it computes on the CPU and with CUDA, and the tensors are on {qkv.device.type}"
    if on_cpu and _cpu is None:
        return (f"miniflux._cpu is not built ({WHY_NOT}): "
                "install a C++ compiler, then miniflux again")
    if not on_cpu and _cuda is None:
        return (f"miniflux._cuda is not built ({WHY_NOT_CUDA}): "
                "install the CUDA toolkit, then miniflux again")
    if dtype not in DTYPES or on_cpu and dtype is torch.float16:
        return f"it takes float32 and bfloat16, with CUDA float16 too, not {dtype}"
    eager = is_eager() if eager is None else eager
    for x in tensors:
        if type(x) not in PLAIN:
            return f"it takes plain tensors, not a {type(x).__name__}"
        if x.layout is not torch.strided:
            return f"it takes dense tensors, not {x.layout}"
        if eager and x.is_neg():
            return "it does not take views that negate their elements: call resolve_neg() first"
    if not on_cpu and qkv.shape[-1] > WIDEST:
        return f"it takes heads of up to {WIDEST} channels, not {qkv.shape[-1]}"
    if qkv.stride(-1) != 1:
        return ("the channels of a head must be neighbours in memory, "
                f"not {qkv.stride(-1)} numbers apart")
    if eager and not is_aligned(qkv):                       # elsewhere there are no real addresses
        return "the elements of qkv must lie at multiples of their size: clone() it first"
    return None


def is_aligned(x: Tensor) -> bool:
    """Whether there are elements (a freed storage has none), each at a multiple of its size."""
    address = x.data_ptr()
    return (address != 0 or x.numel() == 0) and address % x.element_size() == 0


def require(backend: str, qkv: Tensor, pe: Tensor, img_scale: Tensor, txt_scale: Tensor,
            L: int, in_place: bool, eager: bool | None = None) -> None:
    """Raises ValueError for what the kernel cannot take."""
    check(qkv, pe, img_scale, txt_scale, L)
    reason = refusal(qkv, pe, img_scale, txt_scale, eager=eager)
    if reason is None and in_place and elements_overlap(qkv):
        reason = "it overwrites qkv, whose elements share their memory: clone() it first"
    if reason is None and forward_ad._current_level >= 0:
        reason = "it has no forward-mode derivatives"
    if reason:
        raise ValueError(f"the attention backend {backend!r} cannot be used here: {reason}")


def launch(kernel: str, qkv: Tensor, pe: Tensor, img_scale: Tensor, txt_scale: Tensor, L: int,
           out: Tensor) -> None:
    """Calls a compiled kernel on tensors that were checked."""
    B, S, _, H, D = qkv.shape
    # Note: dense tensors are kept in variables until the kernel is done with their addresses.
    pe = dense(pe, torch.float32)
    img_scale = dense(img_scale, qkv.dtype)
    txt_scale = dense(txt_scale, qkv.dtype)
    arguments = ((B, H, S, L, D), qkv.data_ptr(), qkv.stride()[:4], txt_scale.data_ptr(),
                 img_scale.data_ptr(), pe.data_ptr(), out.data_ptr())
    if qkv.is_cpu:
        getattr(_cpu, f"{kernel}_{DTYPES[qkv.dtype]}")(*arguments)
    else:
        with torch.cuda.device(qkv.device):
            stream = torch.cuda.current_stream().cuda_stream
            getattr(_cuda, f"{kernel}_{DTYPES[qkv.dtype]}")(*arguments, stream)


def dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same elements in this dtype, contiguous and aligned."""
    if x.dtype is not dtype:                                # Note: `to` takes long to do nothing
        x = x.to(dtype)
    x = x.contiguous()
    return x if is_aligned(x) else x.clone()


def compute(kernel: str, qkv: Tensor, pe: Tensor, img_scale: Tensor, txt_scale: Tensor,
            L: int) -> Tensor:
    """The result of a kernel on tensors that were checked."""
    B, S, _, H, D = qkv.shape
    out = qkv.new_empty(B, S, H * D)
    if out.numel():
        launch(kernel, qkv, pe, img_scale, txt_scale, L, out)
    return out


def attend(qkv: Tensor, pe: Tensor, img_scale: Tensor, txt_scale: Tensor, L: int,
           kernel: str = "attention") -> Tensor:
    """The attention of one kernel, without gradients. With CUDA qkv is overwritten."""
    require("native", qkv, pe, img_scale, txt_scale, L, in_place=qkv.is_cuda)
    if needs_gradients(qkv, pe, img_scale, txt_scale):
        raise ValueError("`attend` has no gradients: use `attention`")
    return compute(kernel, qkv, pe, img_scale, txt_scale, L)


def attention(qkv: Tensor, pe: Tensor, img_scale: Tensor, txt_scale: Tensor, L: int,
              checked: bool = False) -> Tensor:
    """softmax(R norm(q) (R norm(k))ᵀ / √D) v -> (B, S, H·D), in compiled graphs and with gradients.

    With CUDA qkv is overwritten where nothing needs gradients. checked: `select_backend` has chosen
    this kernel: the tensors fit, and none needs gradients."""
    # Note: called directly where possible: PyTorch's dispatcher takes five times as long.
    if checked:
        direct = not torch.compiler.is_compiling()
    else:
        eager = is_eager()
        direct = eager and not needs_gradients(qkv, pe, img_scale, txt_scale)
        in_place = direct and qkv.is_cuda
        require("native", qkv, pe, img_scale, txt_scale, L, in_place, eager)
    if direct:
        return compute("attention", qkv, pe, img_scale, txt_scale, L)
    return torch.ops.miniflux.attention(qkv, pe, img_scale, txt_scale, L)


def norm_rope(qkv: Tensor, pe: Tensor, img_scale: Tensor, txt_scale: Tensor, L: int) -> Tensor:
    """Normalises and rotates queries and keys in place; returns qkv."""
    eager = is_eager()
    require("norm_rope", qkv, pe, img_scale, txt_scale, L, in_place=True, eager=eager)
    if needs_gradients(qkv, pe, img_scale, txt_scale):
        raise ValueError("norm_rope overwrites queries and keys and has no gradients: "
                         "use the attention backend 'native'")
    if not eager:
        torch.ops.miniflux.norm_rope(qkv, pe, img_scale, txt_scale, L)
    elif qkv.numel():
        launch("norm_rope", qkv, pe, img_scale, txt_scale, L, qkv)
        if not qkv.is_inference():
            torch.autograd.graph.increment_version(qkv)     # as PyTorch's in-place operations do
    return qkv


@torch.library.custom_op("miniflux::attention", mutates_args=())
def attention_op(qkv: Tensor, pe: Tensor, img_scale: Tensor, txt_scale: Tensor, L: int) -> Tensor:
    # Note: with CUDA the kernel overwrites keys, and on the lower rungs queries; an op must not.
    return attend(qkv.clone() if qkv.is_cuda else qkv, pe, img_scale, txt_scale, L)


@attention_op.register_fake
def _(qkv: Tensor, pe: Tensor, img_scale: Tensor, txt_scale: Tensor, L: int) -> Tensor:
    B, S, _, H, D = qkv.shape
    return qkv.new_empty(B, S, H * D)


def register_gradients(reference: Callable[..., Tensor]) -> None:
    """Differentiates the op through `reference`: the same function in PyTorch's operations."""

    def keep(ctx, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.L = inputs
        ctx.save_for_backward(*tensors)

    def recompute(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            out = reference(*inputs, ctx.L)
        return *torch.autograd.grad(out, inputs, gradient, allow_unused=True), None

    attention_op.register_autograd(recompute, setup_context=keep)


@torch.library.custom_op("miniflux::norm_rope", mutates_args=("qkv",))
def norm_rope_op(qkv: Tensor, pe: Tensor, img_scale: Tensor, txt_scale: Tensor, L: int) -> None:
    require("norm_rope", qkv, pe, img_scale, txt_scale, L, in_place=True)
    if qkv.numel():
        launch("norm_rope", qkv, pe, img_scale, txt_scale, L, qkv)


# ------------------------------------------------------------ layers of small networks, in float32


SMALL = 2**19  # elements of a weight: 2 MiB, which a core's own cache holds


def takes(*tensors: Tensor | None) -> bool:
    """Whether kernels may compute on these tensors: plain, dense float32 on the CPU, without
    gradients, outside compiled graphs and the like."""
    if _cpu is None or not is_eager():
        return False
    grad = torch.is_grad_enabled()
    for x in tensors:
        if (
            type(x) not in PLAIN
            or x.dtype is not torch.float32
            or not x.is_cpu
            or x.layout is not torch.strided
            or grad and x.requires_grad
            or x.is_neg()
        ):
            return False
        address = x.data_ptr()
        if not address or address & 3:                      # empty, freed, or not aligned
            return False
    return True


def takes_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` calls the kernel: for small weights that are stored by columns.

    Measured from 1 to 1536 rows: 1.0 to 1.2 times as fast on one core, 1.2 to 1.6 times on two."""
    if not takes(x, weight, bias) or weight.ndim != 2 or x.ndim == 0:
        return False
    N, K = weight.shape
    return (
        N * K <= SMALL
        and N % 16 == 0
        and weight.stride() == (1, N)
        and x.shape[-1] == K
        and bias.shape == (N,)
        and bias.is_contiguous()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b for x (..., K), weight (N, K), bias (N) -> (..., N)."""
    if not takes_linear(x, weight, bias):
        return F.linear(x, weight, bias)
    N, K = weight.shape
    *rows, _ = x.shape
    x, out = x.contiguous(), x.new_empty(*rows, N)
    sizes = x.numel() // K, K, N
    _cpu.linear_float32(sizes, x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr())
    return out


def gelu(x: Tensor) -> Tensor:
    """x / 2 · (1 + tanh(√(2/π) (x + 0.044715 x³))): the GELU with the tanh formula."""
    if x.ndim == 0 or not takes(x):
        return F.gelu(x, approximate="tanh")
    n, out = x.shape[-1], x.new_empty(*x.shape)
    if x.is_contiguous():
        rows, step = x, n
    else:
        rows = x.reshape(-1, n)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        step = rows.stride(0)
    _cpu.gelu_float32(x.numel() // n, n, step, rows.data_ptr(), out.data_ptr())
    return out


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) · LayerNorm(x) + shift for x (B, S, n), shift and scale (B, 1, n)."""
    if not (
        x.ndim == 3
        and shift.shape == scale.shape == (x.shape[0], 1, x.shape[2])
        and takes(x, shift, scale)
    ):
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return torch.addcmul(shift, normed, 1 + scale)      # shift + normed * (1 + scale)
    x, out = x.contiguous(), x.new_empty(*x.shape)
    steps = shift.stride()
    if steps[2] != 1 or steps != scale.stride():
        shift, scale = shift.contiguous(), scale.contiguous()
        steps = shift.stride()
    sizes = (*x.shape, steps[0])
    _cpu.modulate_float32(sizes, x.data_ptr(), shift.data_ptr(), scale.data_ptr(), out.data_ptr())
    return out


# ----------------------------------------------------------------------------------- the command


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")           # one line, without the usage


def list_kernels() -> list[str]:
    """What is built and what is used on this machine, line by line."""
    if _cpu is None:
        lines = [
            f"miniflux._cpu   not built: {WHY_NOT}",
            "                attention runs on PyTorch's own operations; "
            "install a C++ compiler with OpenMP, then miniflux again",
        ]
    else:
        lines = [
            f"miniflux._cpu   {_cpu.__file__}",
            "                used on the CPU in float32 and bfloat16, "
            f"with {_cpu.instructions()} and {torch.get_num_threads()} threads",
        ]
    if _cuda is not None:
        lines += [
            f"miniflux._cuda  {_cuda.__file__}",
            "                used where the attention backends native and norm_rope "
            "are asked for by name",
        ]
    else:
        built = not torch.version.cuda and find("miniflux._cuda")[0]
        lines += [
            f"miniflux._cuda  {'built, but not used' if built else 'not used'}: {WHY_NOT_CUDA}",
            "                with CUDA, attention runs on PyTorch's own operations",
        ]
    mps = "here" if torch.backends.mps.is_available() else "not here"
    return [*lines, f"MPS             {mps}; no kernels of its own"]


def main() -> None:
    Parser(
        prog="python -m miniflux.networks.native",
        description="List the compiled kernels and which of them are used here.",
    ).parse_args()
    print("\n".join(list_kernels()))


if __name__ == "__main__":
    main()
