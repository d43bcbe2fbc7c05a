"""How many devices the CPU appears as, here and in processes that tests start."""

from __future__ import annotations

import os
import re

VIRTUAL_DEVICES = "--xla_force_host_platform_device_count"


def with_devices(count: int | None) -> dict[str, str]:
    """This process's environment, the compiler's settings too, with another number of devices; None: none is named."""
    flag = f"{VIRTUAL_DEVICES}={count}" if count else ""
    return {**os.environ, "XLA_FLAGS": re.sub(rf"{VIRTUAL_DEVICES}=\d+", flag, os.environ["XLA_FLAGS"])}
