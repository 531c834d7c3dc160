"""The compiled kernels: whether they are here, what they take, and how they are called.

    python -m miniflux.engine.native        what is built, what is used on this machine, and why not the rest

`miniflux._cpu` (csrc/cpu) computes norm, rotation and attention in one call, and the layers between the attentions of a small
network. `miniflux._cuda` (csrc/cuda) has a ladder of kernels for the former, from `naive` over `tiles` and `mma` to `wgmma`, for an H100.
Of the first three `attention` is the highest that takes the tensors: `mma` for float16 and bfloat16 with heads of 32, 64 or 128 channels.
Both are built when the package is installed, where there is a compiler; without them PyTorch's own operations do the same.
`networks.attention` and `networks.layers` choose; the former checks what it hands over.

Tensors: qkv (B, S, 3, H, D) float32 or bfloat16, pe (S, D/2, 2, 2) float32, image and text (2, D): the scales of queries
and keys; those of text are for the first L rows.
"""

import argparse
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor


def find(name: str) -> tuple[ModuleType | None, str]:
    """A compiled module, or why it is not there."""
    try:
        return import_module(name), ""
    except ImportError as error:
        return None, str(error)


_cpu, WHY_NOT = find("miniflux._cpu")
_cuda, WHY_NOT_CUDA = find("miniflux._cuda") if torch.version.cuda else (None, "this PyTorch is built without CUDA")

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
WIDEST = 256               # channels of a head that the CUDA kernels take


def refusal(qkv: Tensor) -> str | None:
    """Why the kernels cannot take this tensor; None if they can."""
    if type(qkv) is not Tensor:
        return f"it takes plain tensors, not a {type(qkv).__name__}"
    if (kind := qkv.device.type) not in ("cpu", "cuda"):
        return f"it computes on the CPU and with CUDA, and the tensors are on {kind}"
    if kind == "cpu" and _cpu is None:
        return f"miniflux._cpu is not built ({WHY_NOT}): install a C++ compiler, then miniflux again"
    if kind == "cuda" and _cuda is None:
        return f"miniflux._cuda is not built ({WHY_NOT_CUDA}): install the CUDA toolkit, then miniflux again"
    if qkv.dtype not in DTYPES or kind == "cpu" and qkv.dtype == torch.float16:
        return f"it takes float32 and bfloat16, with CUDA float16 too, not {qkv.dtype}"
    if kind == "cuda" and qkv.shape[-1] > WIDEST:
        return f"it takes heads of up to {WIDEST} channels, not {qkv.shape[-1]}"
    if qkv.stride(-1) != 1:
        return f"the channels of a head must be neighbours in memory, not {qkv.stride(-1)} numbers apart"
    return None


def needs_gradients(qkv: Tensor, image: Tensor, text: Tensor) -> bool:
    return torch.is_grad_enabled() and (qkv.requires_grad or image.requires_grad or text.requires_grad)


RUNGS = ("naive", "tiles", "mma", "wgmma")                 # of the CUDA ladder, for `attend`


def call(kernel: str, qkv: Tensor, pe: Tensor, image: Tensor, text: Tensor, L: int, out: Tensor) -> None:
    B, S, _, H, D = qkv.shape
    # Note: contiguous tensors are kept in variables until the kernel is done with their addresses.
    pe, image, text = pe.contiguous(), image.to(qkv.dtype).contiguous(), text.to(qkv.dtype).contiguous()
    arguments = ((B, H, S, L, D), qkv.data_ptr(), qkv.stride()[:4], text.data_ptr(), image.data_ptr(), pe.data_ptr(), out.data_ptr())
    if qkv.is_cpu:
        getattr(_cpu, f"{kernel}_{DTYPES[qkv.dtype]}")(*arguments)
    else:
        with torch.cuda.device(qkv.device):
            stream = torch.cuda.current_stream().cuda_stream
            getattr(_cuda, f"{kernel}_{DTYPES[qkv.dtype]}")(*arguments, stream)


def attend(qkv: Tensor, pe: Tensor, image: Tensor, text: Tensor, L: int, kernel: str = "attention") -> Tensor:
    B, S, _, H, D = qkv.shape
    out = qkv.new_empty(B, S, H * D)
    call(kernel, qkv, pe, image, text, L, out)
    return out


def attention(qkv: Tensor, pe: Tensor, image: Tensor, text: Tensor, L: int) -> Tensor:
    """softmax(R norm(q) (R norm(k))ᵀ / √D) v -> (B, S, H·D), also in a compiled graph and with gradients."""
    # Note: called directly where possible: the way through PyTorch's dispatcher costs five times as much.
    traced = torch.compiler.is_compiling() or torch.is_grad_enabled() and any(x.requires_grad for x in (qkv, text, image))
    return (torch.ops.miniflux.attention if traced else attend)(qkv, pe, image, text, L)


def norm_rope(qkv: Tensor, pe: Tensor, image: Tensor, text: Tensor, L: int) -> Tensor:
    """Normalises and turns queries and keys in place; returns qkv."""
    if needs_gradients(qkv, image, text):
        raise ValueError("norm_rope overwrites queries and keys and has no gradients: use the attention backend 'native'")
    if torch.compiler.is_compiling():
        torch.ops.miniflux.norm_rope(qkv, pe, image, text, L)
    else:
        call("norm_rope", qkv, pe, image, text, L, qkv)
    return qkv


@torch.library.custom_op("miniflux::attention", mutates_args=())
def attention_op(qkv: Tensor, pe: Tensor, image: Tensor, text: Tensor, L: int) -> Tensor:
    from ..networks.attention import check
    check(qkv, pe, image, text, L, "native")
    # Note: with CUDA keys, and on the lower rungs queries, are normalised and turned where they lie: this op has promised not to.
    return attend(qkv.clone() if qkv.is_cuda else qkv, pe, image, text, L)


@attention_op.register_fake
def _(qkv: Tensor, pe: Tensor, image: Tensor, text: Tensor, L: int) -> Tensor:
    B, S, _, H, D = qkv.shape
    return qkv.new_empty(B, S, H * D)


def keep(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.L = inputs
    ctx.save_for_backward(*tensors)


def recompute(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the same function in PyTorch's operations."""
    from ..networks.attention import attention
    with torch.enable_grad():
        qkv, pe, image, text = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        out = attention(qkv, pe, image, text, ctx.L, backend="sdpa")
    return *torch.autograd.grad(out, (qkv, pe, image, text), gradient, allow_unused=True), None


attention_op.register_autograd(recompute, setup_context=keep)


@torch.library.custom_op("miniflux::norm_rope", mutates_args=("qkv",))
def norm_rope_op(qkv: Tensor, pe: Tensor, image: Tensor, text: Tensor, L: int) -> None:
    from ..networks.attention import check
    check(qkv, pe, image, text, L, "norm_rope")
    call("norm_rope", qkv, pe, image, text, L, qkv)


# ------------------------------------------------------------------------------------ layers of small networks, in float32


SMALL = 2**19  # numbers in a weight: 2 MiB, which a core's own cache holds


def takes(*tensors: Tensor | None) -> bool:
    """Whether the kernels below can be called: on float32 on the CPU, without gradients and outside compiled graphs."""
    for x in tensors:
        if x is None or not x.is_cpu or x.dtype is not torch.float32:
            return False
    return _cpu is not None and type(tensors[0]) is Tensor and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def takes_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` is faster than PyTorch's: for small weights that are stored by columns.

    Measured from 1 to 1536 rows: 1.0 to 1.2 times as fast on one core, 1.2 to 1.6 times on two."""
    return weight.stride(0) == 1 and weight.numel() <= SMALL and weight.shape[0] % 16 == 0 and takes(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x Wᵀ + b for x (..., K), weight (N, K) with strides (1, N), bias (N) -> (..., N)."""
    N, K = weight.shape
    x, out = x.contiguous(), x.new_empty((*x.shape[:-1], N))
    _cpu.linear_float32((x.numel() // K, K, N), x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr())
    return out


def gelu(x: Tensor) -> Tensor:
    """gelu(x) with the tanh formula, for rows that may be parts of wider ones: x (..., N) -> (..., N)."""
    rows, out = x.reshape(-1, x.shape[-1]), torch.empty(x.shape)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    _cpu.gelu_float32(*rows.shape, rows.stride(0), rows.data_ptr(), out.data_ptr())
    return out


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) · LayerNorm(x) + shift for x (B, S, n), shift and scale (B, 1, n) -> (B, S, n)."""
    x, out = x.contiguous(), torch.empty(x.shape)
    if shift.stride() != scale.stride() or shift.stride(-1) != 1:
        shift, scale = shift.contiguous(), scale.contiguous()
    _cpu.modulate_float32((*x.shape, shift.stride(0)), x.data_ptr(), shift.data_ptr(), scale.data_ptr(), out.data_ptr())
    return out


def main() -> None:
    argparse.ArgumentParser(prog="python -m miniflux.engine.native",
                            description="Say which compiled kernels there are and which of them are used here.").parse_args()
    if _cpu is None:
        print(f"miniflux._cpu   not built: {WHY_NOT}\n                attention runs on PyTorch's own operations; "
              "install a C++ compiler with OpenMP, then miniflux again")
    else:
        print(f"miniflux._cpu   {_cpu.__file__}\n                used on the CPU in float32 and bfloat16, "
              f"with {_cpu.instructions()} and {torch.get_num_threads()} threads")
    if _cuda is not None:
        print(f"miniflux._cuda  {_cuda.__file__}\n                used where the attention backends native and norm_rope are asked for by name")
    else:
        built = "built, but not used" if not torch.version.cuda and find("miniflux._cuda")[0] else "not used"
        print(f"miniflux._cuda  {built}: {WHY_NOT_CUDA}\n                with CUDA, attention runs on PyTorch's own operations")
    print(f"MPS             {'here' if torch.backends.mps.is_available() else 'not here'}; no kernels of its own")


if __name__ == "__main__":
    main()
