"""Eight virtual CPU devices, set before jax is imported, and property-based tests that draw the same cases every time."""

import atexit
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 "  # most programs run once; a test's own processes are started without
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # libtpu only compiles, in several processes at once
if (
    "JAX_COMPILATION_CACHE_DIR" not in os.environ
):  # of this session: its workers and their processes compile a program once
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

from hypothesis import settings  # noqa: E402

settings.register_profile("gpart", deadline=None, derandomize=True, max_examples=25)
settings.register_profile("long", deadline=None, max_examples=2000)  # pytest --hypothesis-profile=long tests/test_fuzz.py
settings.load_profile("gpart")
