"""The seam: two protocols that every runtime agrees on, and the registry that finds them.

Graph in, files out; files in, session out. Timing, comparing, caching and reporting are the core's and not in here.
A back end is a module that is imported only when it is named, found through the entry-point group below.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from fofa_deploy.errors import BackendError, IntegrityError
from fofa_deploy.types import Artifact, Calibration, Feeds, Graph, HardwareProfile, LayerTime, ModelFile, Precision, Probe, Recipe

GROUP = "fofa_deploy.backends"


@runtime_checkable
class Session(Protocol):
    """A loaded model. As a context manager it takes the device and gives it back."""

    device: str
    """The device that is really bound, as the runtime itself reports it."""

    def run(self, feeds: Feeds) -> Feeds:
        """Input arrays by name -> output arrays by name; synchronous, any batch size."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


@runtime_checkable
class Backend(Protocol):
    """One runtime. Stateless, and inherits from no other back end."""

    name: str
    """Equals the entry-point name."""

    precisions: frozenset[Precision]
    """What ``build`` accepts."""

    def probe(self, profile: HardwareProfile) -> Probe:
        """Whether artifacts for this profile can be built and run on this machine; never raises."""
        ...

    def recipes(self, profile: HardwareProfile, graph: Graph) -> Sequence[Recipe]:
        """The recipes worth trying for this graph on this profile, most promising first, the float ones included."""
        ...

    def build(self, graph: Graph, recipe: Recipe, calibration: Calibration | None, out: Path) -> Artifact:
        """Write the artifact's files into the empty folder ``out``, always starting from the captured graph.

        Raises:
            BuildError: the runtime refused the graph or the recipe.
        """
        ...

    def load(self, artifact: Artifact, profile: HardwareProfile) -> Session:
        """Open a session for what ``build`` made.

        Raises:
            BackendError: the runtime or the device is missing, or another device than the one asked for was bound.
        """
        ...


@runtime_checkable
class LayerProfiler(Protocol):
    """A back end whose runtime can tell what each layer takes. Profiling slows a run down: these times are shares, not latency."""

    def layer_times(self, artifact: Artifact, profile: HardwareProfile, feeds: Feeds, runs: int) -> Sequence[LayerTime]:
        """The layers of an artifact in the order in which they run, with the mean of ``runs`` warm runs.

        Raises:
            BackendError: the runtime or the device is missing.
        """
        ...


@runtime_checkable
class FileOpener(Protocol):
    """A back end that also opens files which others have built, as they are."""

    suffixes: tuple[str, ...]
    """Endings of the files that it takes."""

    native: bool
    """They hold machine code: to open one is to run it."""

    def check_file(self, path: Path) -> None:
        """Whatever can be told of a file without a runtime.

        Raises:
            GraphError: it is malformed or unsafe.
        """
        ...

    def describe_file(self, path: Path, profile: HardwareProfile) -> ModelFile:
        """What a file takes in, and the runtime's layer table of it, after ``check_file``.

        Raises:
            GraphError: it is malformed, unsafe, or has inputs that no array can be made for.
            BackendError: the runtime or the device is missing, or refuses the file.
        """
        ...

    def open_file(self, found: ModelFile, profile: HardwareProfile) -> Session:
        """Open a session for what ``describe_file`` has described; in the runtime's own default precision.

        Raises:
            IntegrityError: the file is another one by now.
            BackendError: the runtime or the device is missing, or another device than the one asked for was bound.
        """
        ...


def backend_names() -> list[str]:
    """Names of all registered back ends, sorted; imports none of them."""
    return sorted(point.name for point in entry_points(group=GROUP))


def get_backend(name: str) -> Backend:
    """Import and instantiate the back end registered under ``name``.

    Raises:
        BackendError: no such name, its module does not import, or it does not fit the seam.
    """
    points = {point.name: point for point in entry_points(group=GROUP)}
    if name not in points:
        near = get_close_matches(name, points, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"registered: {', '.join(sorted(points)) or 'none'}"
        raise BackendError(f"no back end is named {name!r}", hint)
    try:
        backend: object = points[name].load()()
    except ImportError as error:
        raise BackendError(f"back end {name!r} does not import: {error}", "install its runtime") from error
    if not isinstance(backend, Backend) or backend.name != name:
        raise BackendError(f"{points[name].value} is not a back end named {name!r}", "see exporters/README.md for the seam")
    return backend


def check_origin(artifact: Artifact, trusted: bool) -> None:
    """Hold an artifact that no run vouches for, whose digests are its own word, to what is asked of any file from elsewhere.

    Raises:
        IntegrityError: it is machine code, of nobody who is trusted. What its device has yet to build is none.
        GraphError: it is malformed or unsafe.
    """
    backend = get_backend(artifact.backend)
    if not isinstance(backend, FileOpener):
        return
    if not backend.native:
        backend.check_file(artifact.path)
    elif not trusted and not artifact.recipe.options.get("on_device"):
        raise untrusted(artifact.path)


def untrusted(path: Path) -> IntegrityError:
    """What to say of a native back end's file from elsewhere."""
    problem = f"{path} is machine code: opening it can do all that you can do on this machine"
    return IntegrityError(problem, "if you built it, or trust who did, say so with --trust-engine")


def float_recipe(backend: Backend, profile: HardwareProfile, graph: Graph) -> Recipe:
    """The back end's fp32 recipe.

    Raises:
        BackendError: it offers none for this profile.
    """
    for recipe in backend.recipes(profile, graph):
        if recipe.precision is Precision.FP32:
            return recipe
    raise BackendError(
        f"back end {backend.name!r} offers no fp32 recipe for {profile.name}", "allow fp32 in the profile's precisions"
    )
