"""Eight virtual CPU devices, set before jax is imported, and property-based tests that draw the same cases every time."""

import os

os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from hypothesis import settings  # noqa: E402

settings.register_profile("gpart", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("gpart")
