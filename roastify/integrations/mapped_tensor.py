"""Tensors whose values lie in temporary files, so that the system can take their memory back."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from roastify.errors import ConversionError
from roastify.files import reason_of

# Smaller tensors are not worth a file.
_LEAST_BYTES = 1 << 20


def in_file(tensor: Tensor) -> Tensor:
    """Return a tensor with the same values in a temporary file, which vanishes with it; small tensors as they are.

    Raises:
        ConversionError: there is no room for the file.
    """
    if os.name == "nt" or tensor.nbytes < _LEAST_BYTES or tensor.device.type != "cpu":
        return tensor
    tensor = tensor.detach().contiguous()
    try:
        descriptor, name = tempfile.mkstemp(prefix="roastify-")
        try:
            with open(descriptor, "wb") as file:
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            storage = torch.UntypedStorage.from_file(name, shared=True, nbytes=tensor.nbytes)
        finally:
            # The mapping keeps the content.
            Path(name).unlink()
    except OSError as error:
        raise ConversionError(
            f"cannot write a weight of {tensor.nbytes:,} bytes to {tempfile.gettempdir()}, where it waits to be "
            f"converted ({reason_of(error)}); let the variable TMPDIR name a folder on a disk with more room"
        ) from error
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape)  # type: ignore[call-overload]
