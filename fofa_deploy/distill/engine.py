"""What the plan says about how to compute: device, precision, processes, compilation, sharding, trackers; by Accelerate."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fofa_deploy.config import TrainPlan
from fofa_deploy.distill import parallel
from fofa_deploy.distill.tapped import TappedModel
from fofa_deploy.errors import BackendError, PlanError, TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def check(plan: TrainPlan) -> None:
    """What a training needs of this machine is there.

    Raises:
        BackendError: it is not.
    """
    cuda = torch.cuda.is_available()
    if plan.precision == "fp16" and not cuda:
        raise BackendError("training in fp16 needs a GPU", "use precision = 'bf16' or 'fp32'")
    if missing := [name for name in plan.trackers if importlib.util.find_spec(name) is None]:
        raise BackendError(f"trackers are not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    if plan.compile and not cuda and not _compiler():
        raise BackendError("torch.compile needs a C++ compiler on a CPU, and there is none", "install g++, or set compile = false")


def accelerator(plan: TrainPlan, folder: Path) -> Accelerator:
    """Device, precision and processes of one training; TensorBoard and W&B write below ``folder``.

    Raises:
        BackendError: as `check`.
        PlanError: the launcher was told to shard in its own way.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    check(plan)
    parallel.join()
    threads = torch.get_num_threads()
    AcceleratorState._reset_state()  # it remembers the precision of the training before, here the teacher's
    found = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=_PRECISION[plan.precision],
        device_placement=False,
        log_with=list(plan.trackers) or None,
        project_dir=folder,
        # The loop accumulates by itself, and compiles: what a launcher's configuration says about either must not do it again.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
        # A student may have parameters that a method does not reach, such as a second head.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    torch.set_num_threads(threads)  # the plan's, whatever Accelerate thinks of them
    if found.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        action = "leave it out of the launcher's configuration: students are replicated, and shard_teacher shards the teacher"
        raise PlanError(f"accelerate was configured for {found.distributed_type.value}", action)
    return found


@contextmanager
def tracking(engine: Accelerator, name: str, plan: TrainPlan, folder: Path) -> Iterator[None]:
    """A run in every tracker of the plan; rank 0 alone keeps one. TensorBoard's is ``folder/fofa-deploy``.

    Raises:
        BackendError: one does not start: nobody is logged in, say, or its server does not answer.
    """
    if plan.trackers:
        settings = {key: str(value) for key, value in plan.model_dump().items()}
        options = {"wandb": {"name": name, "dir": str(folder)}, "mlflow": {"run_name": name}}
        try:
            engine.init_trackers("fofa-deploy", settings, options)
        except Exception as error:  # whatever a tracker raises
            problem = f"trackers ({', '.join(plan.trackers)}) do not start: {error or type(error).__name__}"
            raise BackendError(problem, "mend that, or leave it out of trackers") from error
    try:
        yield
    finally:
        for tracker in engine.trackers:  # not end_training, which would part the processes before the next training
            tracker.finish()


@contextmanager
def within_memory(plan: TrainPlan, name: str) -> Iterator[None]:
    """What is too large for the memory is said in numbers of the plan.

    Raises:
        TrainingError: out of memory, here or in a data loader process; checkpoints, if there are any yet, are good.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if "DataLoader worker (pid" in str(error):  # as PyTorch says it; what one raised is told otherwise
            action = "run the same command again with lower distill.workers, or teacher.fit.workers: memory may have been too small"
            raise TrainingError(f"{name}: a data loader process was killed", action) from error
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not any(word in str(error) for word in ("can't allocate memory", "ALLOC_FAILED")):  # PyTorch's, CUDA's
            raise
        images = -(-plan.batch_size // (parallel.size() * plan.accumulate))
        action = f"raise accumulate above {plan.accumulate}, or lower batch_size, with another --out or --force"
        raise TrainingError(f"{name}: out of memory, at {images} images per pass", action) from error


def flat(values: Mapping[str, float | None], prefix: str) -> dict[str, float]:
    """Named as trackers group them; what is not known is left out."""
    return {f"{prefix}/{name}": value for name, value in values.items() if value is not None}


# --- compilation and sharding


def compiled(tapped: TappedModel) -> None:
    """Let torch.compile make kernels of each largest part of a model that no hook reads or bends inside, when it first runs."""
    _keep_for_every_backward_pass()
    for part in _parts(tapped):
        # All bound methods are one function to dynamo: without isolation parts would use up each other's recompilations, and be
        # taken for one part that sees images of ever other sizes.
        part.forward = torch.compile(part.forward, dynamic=False, isolate_recompiles=True)  # type: ignore[call-overload]


_KEPT = "fofa-deploy: no donated buffers"


def _keep_for_every_backward_pass() -> None:
    """What a compiled forward pass saved outlasts the first of several backward passes: the balance of terms takes one for each.

    PyTorch's cache on disk does not ask for that when it looks kernels up: those of another program, which may write over what
    was saved, would pass back wrong gradients without a word. Hence a name of our own in its keys.
    """
    torch._functorch.config.donated_buffer = False
    if _KEPT not in torch.compiler.config.cache_key_tag:
        torch.compiler.config.cache_key_tag += _KEPT


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("g++", "clang++", "cl" if sys.platform == "win32" else "c++"))), None)


def sharded(tapped: TappedModel) -> None:
    """Spread a frozen model's weights over all processes; each part is gathered when it runs and dropped afterwards (FSDP2).

    They go to the processes' devices part by part: no device has to hold all of them at once.
    """
    from torch.distributed.fsdp import fully_shard

    if parallel.size() > 1:
        tapped.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP refuses weights in channels_last
        for part in _parts(tapped):
            fully_shard(part)
        fully_shard(tapped.model)


def _parts(tapped: TappedModel) -> list[nn.Module]:
    """The largest submodules with weights such that features are read and bent between them, never inside one."""
    places = {stage.module for stage in (*tapped.stages, *filter(None, tapped.entries))} | set(tapped.heads)

    def walk(name: str, module: nn.Module) -> Iterator[nn.Module]:
        if any(place.startswith(f"{name}." if name else "") and place != name for place in places):
            for child, part in module.named_children():
                yield from walk(f"{name}.{child}" if name else child, part)
        elif any(True for _ in module.parameters()):
            yield module

    return list(walk("", tapped.model))
