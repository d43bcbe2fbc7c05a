"""Settings of every test. They are environment variables, so that processes which a test starts have them too."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from agents import PACKAGES, executable
from devices import VIRTUAL_DEVICES
from hypothesis import HealthCheck, settings
from tinker_loops import interpreter

if TYPE_CHECKING:
    from serving import Serving
    from tokenizers import Tokenizer
    from training import Client

    from stepjax.infer.session import Session
    from stepjax.train.data.tasks import TinyTemplate
    from stepjax.train.rollouts.sampler import Rollout
    from stepjax.train.tune.setup import Setup

assert "jax" not in sys.modules, "a pytest plugin imported jax before its settings were made"

JAX = tuple(map(int, version("jax").split(".")[:2]))

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What runs here is small, and nearly all of the time is compiling: 4.3 s for a step of the engine, 1.5 s with these.
SETTINGS = {
    VIRTUAL_DEVICES: "8",
    "--xla_backend_optimization_level": "0",
    "--xla_cpu_parallel_codegen_split_count": "1",  # pytest's workers have the other cores
}
if JAX < (0, 11):  # later ones know no other emitters of fused loops than those that go through MLIR
    SETTINGS["--xla_cpu_use_fusion_emitters"] = "false"
for flag, value in SETTINGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("STEPJAX_TEST_CACHE") or str(
    Path("~/.cache/stepjax/tests").expanduser()
)
os.environ["STEPJAX_CACHE_DIR"] = os.environ["JAX_COMPILATION_CACHE_DIR"]  # programs of the commands that tests run
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
gc.set_threshold(50_000, 20, 20)  # tracing makes so many objects that looking for cycles took a tenth of the time

# Nothing depends on the speed of the machine, and the same examples run every time.
settings.register_profile("stepjax", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("stepjax")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what this run cannot or should not do; nothing is skipped, so a skip in the report is news."""
    left_out = set()
    if not config.getoption("--slow"):
        left_out.add("slow")
    if not {"cuda", "gpu"} & set(os.environ["JAX_PLATFORMS"].split(",")):
        left_out.add("gpu")
    if not (find_spec("torch") and find_spec("transformers")):
        left_out.add("oracle")
    if not find_spec("peft"):
        left_out.add("peft")
    if not find_spec("compressed_tensors"):
        left_out.add("compressed")
    if not (find_spec("jax_plugins") and any(find_spec(f"jax_plugins.xla_cuda{major}") for major in (12, 13))):
        left_out.add("aot")
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))):
        left_out.add("browser")
    if not (shutil.which("node") and shutil.which("npm")):
        left_out.add("node")
    if not all(map(executable, PACKAGES)):
        left_out.add("agents")
    if not (find_spec("langchain_nvidia_ai_endpoints") and find_spec("langchain_openai") and find_spec("anthropic")):
        left_out.add("clients")
    if not find_spec("litellm"):
        left_out.add("litellm")
    if not interpreter():
        left_out.add("tinker")
    if JAX < (0, 11):  # its interpreter knows no transposed references
        left_out.add("mosaic")
    if not find_spec("pyarrow"):
        left_out.add("parquet")
    if not find_spec("schemathesis"):
        left_out.add("fuzz")
    deselected = [item for item in items if left_out & {mark.name for mark in item.iter_markers()}]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


MAX_MAPS = 30_000  # of the 65,530 that Linux gives a process; XLA:CPU maps every kernel by itself
MAX_RESIDENT = 1_000_000_000  # bytes of a worker between two files
MAX_RESIDENT_IN_FILE = 1_500_000_000  # and between two tests of a file; a test may need 1 GB more


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Drops compiled programs before they fill the memory, or their number becomes a failure to allocate it."""
    yield
    if "jax" not in sys.modules or not Path("/proc/self/maps").exists():
        return
    trim_heap()
    if resident_bytes() > MAX_RESIDENT or len(Path("/proc/self/maps").read_bytes().splitlines()) > MAX_MAPS:
        from tiny import tiny_session

        tiny_session.cache_clear()
        forget_programs()


@pytest.fixture(autouse=True)
def _forget_programs_in_file() -> Iterator[None]:
    """The same between tests, for files that compile much. What a fixture or a session holds stays."""
    yield
    if "jax" not in sys.modules or not Path("/proc/self/statm").exists() or resident_bytes() < MAX_RESIDENT_IN_FILE:
        return
    trim_heap()
    if resident_bytes() > MAX_RESIDENT_IN_FILE:
        forget_programs()


def forget_programs() -> None:
    """Drops all that jax keeps of earlier calls."""
    import jax

    jax.clear_caches()
    gc.collect()
    trim_heap()


def resident_bytes() -> int:
    """What this process holds in memory, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def trim_heap() -> None:
    """Gives freed pages of the heap back to the system, where the C library can. A compiler leaves hundreds of MB."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """step-tiny's."""
    from tokenizers import Tokenizer

    from stepjax.train.data.tasks import ASSETS

    return Tokenizer.from_file(str(ASSETS / "tokenizer.json"))


@pytest.fixture(scope="session")
def template() -> TinyTemplate:
    """step-tiny's chat template."""
    from stepjax.train.data.tasks import TinyTemplate

    return TinyTemplate()


@pytest.fixture(scope="session")
def step_tiny() -> Session:
    """The embedded model in float32."""
    from stepjax.infer.load import load

    return load("step-tiny", dtype="float32")


@pytest.fixture(scope="module")
def setup() -> Setup:
    """What a short run of fine-tuning opens."""
    from tuning import SHORT

    from stepjax.train.tune.setup import open_run

    return open_run(SHORT)


@pytest.fixture(scope="module")
def rollouts(setup) -> list[Rollout]:
    """Answers of its untrained student."""
    from tuning import answers

    return answers(setup)


@pytest.fixture(scope="session")
def server(step_tiny) -> Iterator[Serving]:
    """One server for all tests that do not end or alter it."""
    from serving import Serving

    with Serving(step_tiny) as serving:
        yield serving


@pytest.fixture(scope="session")
def tiny() -> Session:
    """A small random model."""
    from tiny import tiny_session

    return tiny_session()


@pytest.fixture(scope="module")
def training_server(tiny, tmp_path_factory) -> Iterator[Serving]:
    """A server of it that trains."""
    from training import serving

    with serving(tiny, tmp_path_factory.mktemp("service")) as server:
        yield server


@pytest.fixture
def training_client(training_server) -> Iterator[Client]:
    from training import Client

    with Client(training_server) as client:
        yield client
