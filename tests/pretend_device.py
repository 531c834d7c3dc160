"""A pretend accelerator: tensors that claim to be on another device and compute on the CPU.

    with PretendDevice() as device:
        flux = load("tiny", device="pretend:0", dtype=torch.float32)
        z = generate(flux, "a fox", steps=2, output="latents")          # z.raw equals the CPU's
    device.reads                            # Counter: "generate.py:57 the source line" -> times

What a GPU or MPS refuses is refused here: an operation on tensors of two devices, float64 and
complex numbers on the device. What makes the host wait for a GPU is counted: every element that is
read back (`.item()`, `float(x)`, a comparison in Python).

Limits: it knows no inference tensors (`torch.inference_mode`), and no compiled graphs.
"""

import collections
import traceback
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import miniflux

_setup_privateuseone_for_python_backend("pretend")
# Note: once a backend is registered, PyTorch asks it for its random state in every process's tests.
torch.pretend.get_rng_state = lambda device=None: torch.empty(0, dtype=torch.uint8)
torch.pretend.set_rng_state = lambda state, device=None: None
DEVICE = torch.device("pretend:0")
CPU = torch.device("cpu")
PACKAGE = str(Path(miniflux.__file__).parent)
READS = "aten._local_scalar_dense"                          # the operation behind every read
MAKERS = (torch.tensor, torch.as_tensor, torch.asarray)     # numbers -> a tensor
COPIES = ("aten._to_copy", "aten.copy_")                    # the operations that cross devices


class PretendTensor(torch.Tensor):
    """Wraps a tensor of the CPU, `raw`."""

    @staticmethod
    def __new__(cls, raw: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(),
            dtype=raw.dtype, device=DEVICE, requires_grad=False)

    def __init__(self, raw: torch.Tensor):
        self.raw = raw

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {}, None)


class PretendDevice(TorchDispatchMode):
    """Within it, "pretend:0" is a device; `reads` counts the elements that were read back."""

    def __init__(self):
        super().__init__()
        self.reads: collections.Counter[str] = collections.Counter()
        self.constructors = Constructors(self.reads)

    def __enter__(self):
        self.constructors.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.constructors.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {}, self.reads)


class Constructors(TorchFunctionMode):
    """Python numbers -> tensors and back, as on a GPU: made on the host and then copied, or the
    other way round. The dispatcher does not see these functions."""

    def __init__(self, reads: collections.Counter):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in MAKERS and is_pretend(kwargs.get("device")):
            return func(*args, **kwargs | {"device": CPU}).to(DEVICE)
        if args and isinstance(args[0], PretendTensor):
            if func is torch.Tensor.new_tensor:
                return func(args[0].raw, *args[1:], **kwargs).to(DEVICE)
            if func is torch.Tensor.tolist:
                self.reads[own_line()] += 1
                return args[0].raw.tolist()
        return func(*args, **kwargs)


def is_pretend(device) -> bool:
    return device is not None and torch.device(device).type == "pretend"


def own_line() -> str:
    """The line of miniflux that is being executed."""
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
    if not frames:
        return "outside"
    return f"{frames[-1].filename.removeprefix(PACKAGE + '/')}:{frames[-1].lineno} {frames[-1].line}"


def run(func, args: tuple, kwargs: dict, reads: collections.Counter | None):
    name = str(func)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = any(isinstance(x, PretendTensor) for x in tensors)
    # Note: a GPU takes a number of the host's, a tensor without dimensions, wherever it takes a number.
    theirs = [x for x in tensors if not isinstance(x, PretendTensor) and x.ndim > 0]
    if ours and theirs and not name.startswith(COPIES):
        raise RuntimeError(f"{name}: tensors on the pretend device and on {theirs[0].device}")
    if ours and reads is not None and name.startswith(READS):
        reads[own_line()] += 1

    target = kwargs.get("device")
    if is_pretend(target):
        kwargs = {**kwargs, "device": CPU}
    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if func._schema.is_mutable and args and isinstance(args[0], PretendTensor):
        return args[0]
    if not (ours if target is None else is_pretend(target)):
        return out
    for x in tree_leaves(out):
        if isinstance(x, torch.Tensor) and (x.dtype == torch.float64 or x.is_complex()):
            raise RuntimeError(f"{name}: {x.dtype} on the device")
    return tree_map(wrap, out)


def unwrap(x):
    return x.raw if isinstance(x, PretendTensor) else x


def wrap(x):
    return PretendTensor(x) if isinstance(x, torch.Tensor) else x
