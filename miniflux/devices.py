"""The device to compute on, and the dtype to compute in, where nothing else is asked for."""

import torch

# The dtypes that networks compute in, as the commands name them.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(name: torch.device | str | None = None) -> torch.device:
    """The device of that name; default: CUDA, then MPS, then the CPU.

    Raises ValueError for a device that this machine lacks."""
    if name is not None:
        try:
            torch.empty(0, device=name)
            return torch.device(name)
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            if "Expected one of" in reason:                 # PyTorch lists twenty; three matter
                reason = "expected cuda, mps or cpu"
            raise ValueError(f"the device {str(name)!r} cannot be used here: {reason}") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """What is computed in where nothing else is asked for."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16
