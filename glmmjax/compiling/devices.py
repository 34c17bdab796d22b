"""What a user's `device=` names."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import jax

from .._arguments import shown


def devices_of(device: Any) -> list[Any]:
    """JAX devices of this process from what a user names.

    Raises:
        ValueError: JAX has no such device here.
    """
    if device is None:
        return list(jax.local_devices())
    if isinstance(device, str):
        try:
            found = jax.local_devices(backend="gpu" if device == "cuda" else device)
        except RuntimeError:
            have = ", ".join(sorted({d.platform for d in jax.local_devices()}))
            raise ValueError(f"JAX has no device {device!r} here; it has: {have}") from None
        return list(found)
    found = list(device) if isinstance(device, (list, tuple)) else [device]
    for one in found or [device]:
        if not hasattr(one, "platform"):
            raise TypeError(f"device must be a name such as 'cpu', a JAX device or a list of them, got {shown(one)}")
    return found


def several(device: Any) -> list[Any]:
    """The devices that rows are to be divided over; empty if there is one."""
    if device is None:
        return []
    devices = devices_of(device)
    return devices if len(devices) > 1 else []


def on(device: Any) -> Any:
    """Context in which programs for one device run on the one that is named."""
    if device is None or several(device):
        return nullcontext()
    return jax.default_device(devices_of(device)[0])
