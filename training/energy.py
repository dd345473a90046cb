"""How much energy has a GPU taken? Read from the driver's own counter (NVML), so that nothing between is missed."""

import ctypes

import torch

LIBRARY = "libnvidia-ml.so.1"  # comes with the driver


class EnergyMeter:
    """Of one GPU; of a CPU, and of a driver that does not tell, it knows nothing."""

    def __init__(self, device: torch.device) -> None:
        self.nvml, self.handle = _open(device)
        self.last = self._read()

    def joules(self) -> float | None:
        """Taken since the last call; None where it can't be read."""
        last, self.last = self.last, self._read()
        return None if last is None or self.last is None else (self.last - last) / 1000

    def _read(self) -> int | None:
        """Millijoules since the driver was loaded."""
        total = ctypes.c_ulonglong()
        if self.nvml is None or self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle, ctypes.byref(total)):
            return None
        return total.value


def _open(device: torch.device) -> tuple[ctypes.CDLL | None, ctypes.c_void_p]:
    handle = ctypes.c_void_p()
    if device.type != "cuda":
        return None, handle
    try:
        nvml = ctypes.CDLL(LIBRARY)
    except OSError:  # a container without it
        return None, handle
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    failed = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle))
    return (None if failed else nvml), handle
