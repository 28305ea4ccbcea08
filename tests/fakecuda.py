# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""A GPU for machines without one: tensors whose numbers lie in the CPU's memory and which say that they are
on cuda:0. Where CUDA would refuse to mix devices, DeviceMix is raised; where the host would wait for the GPU,
a wait is counted.

    with fakecuda.gpu() as waits:
        model = tiny.model().to(fakecuda.GPU)
        ...
    waits.total, waits.places                   # how often, and on which lines of the project

PyTorch itself takes them for `meta` tensors; so what is truly meta counts as on the GPU, too, and attention
runs by its plainest form. What a GPU rounds, how fast it is and what it launches, they do not tell.
"""
import collections
import contextlib
import sys
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
PROJECT = "eval.py", "mcts.py", "dvo.py"

# The host must know the result, or its size, before it goes on; of these the result is a number.
WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2",
         "unique_consecutive", "unique_dim"}
NUMBERS = {"_local_scalar_dense", "equal", "is_nonzero"}
INDEXED = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}
COPIES = {"_to_copy", "copy_"}                  # between any devices


class DeviceMix(RuntimeError):
    """What CUDA says of tensors on several devices."""


class OnGPU(torch.Tensor):
    """A tensor whose numbers are those of `plain`."""
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, plain):
        posing = torch.Tensor._make_wrapper_subclass(
            cls, plain.shape, strides=plain.stride(), storage_offset=plain.storage_offset(),
            dtype=plain.dtype, device="meta")
        posing.plain = plain
        return posing

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        raise RuntimeError(f"{operation} on a tensor of a GPU that is gone: outside of `with gpu()`")

    def tolist(self):
        return self.cpu().tolist()


@dataclass
class Waits:
    """How often the host waited for the GPU, and where."""
    places: collections.Counter = field(default_factory=collections.Counter)

    @property
    def total(self):
        return self.places.total()

    def count(self, what):
        self.places[f"{what} {project_line()}"] += 1


def project_line():
    """The innermost line of the project that is being run."""
    frame = sys._getframe(1)
    while frame and not frame.f_code.co_filename.endswith(PROJECT):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}" if frame else "elsewhere"


def tensors_in(arguments):
    """All tensors in nested lists, tuples and dicts."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from tensors_in(argument)


def replaced(function, argument):
    """The same nested arguments, function(x) instead of x at every leaf."""
    if isinstance(argument, (list, tuple)):
        return type(argument)(replaced(function, part) for part in argument)
    return function(argument)


def on_gpu(device):
    return torch.device(device).type in ("cuda", "meta")


def plain(argument):
    """What the CPU computes with."""
    if isinstance(argument, OnGPU):
        return argument.plain
    if isinstance(argument, torch.device):
        return torch.device("cpu")
    return argument


class Driver(TorchDispatchMode):
    """Runs every operation on the CPU, after the checks that CUDA would make."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation._schema.name.removeprefix("aten::")
        tensors = [*tensors_in(args), *tensors_in(kwargs.values())]
        posing = [tensor for tensor in tensors if isinstance(tensor, OnGPU)]
        others = [tensor for tensor in tensors if not isinstance(tensor, OnGPU)]
        goes_to_gpu = bool(posing)
        if kwargs.get("device") is not None:
            goes_to_gpu = on_gpu(kwargs["device"])
        if name == "copy_":
            goes_to_gpu = isinstance(args[0], OnGPU)
        if not posing and not goes_to_gpu:
            return operation(*args, **kwargs)
        self.check(name, args, posing, others)
        self.count(name, args, posing, others, goes_to_gpu)
        known = {id(tensor.plain): tensor for tensor in posing}     # what is written in place keeps its name
        options = {key: replaced(plain, value) for key, value in kwargs.items()}
        found = operation(*replaced(plain, args), **options)
        if name in NUMBERS or not goes_to_gpu:
            return found

        def posed(result):
            if not isinstance(result, torch.Tensor):
                return result
            written = known.get(id(result))
            return OnGPU(result) if written is None else written
        return replaced(posed, found)

    def check(self, name, args, posing, others):
        """Raise DeviceMix as CUDA would: single numbers, and copies, may come from elsewhere."""
        shaped = [tensor for tensor in others if tensor.dim()]
        if name in INDEXED:                     # a CUDA tensor may be indexed from the host, not vice versa
            shaped = [tensor for tensor in (args[0], *args[2:3]) if tensor is not None and tensor.dim()]
            shaped = [tensor for tensor in shaped if not isinstance(tensor, OnGPU)]
        if posing and shaped and name not in COPIES:
            shapes = [tuple(tensor.shape) for tensor in shaped]
            raise DeviceMix(f"{name} of tensors on cuda:0 and, {shapes}, on the CPU at {project_line()}")

    def count(self, name, args, posing, others, goes_to_gpu):
        """Copies from the host count as well: they wait, as its memory is not pinned."""
        to_host = name in COPIES and posing and not goes_to_gpu
        to_gpu = name in COPIES and others and goes_to_gpu
        index = [*tensors_in(args[1:2])] if name in INDEXED else []
        by_mask = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in index)
        from_host = any(not isinstance(tensor, OnGPU) for tensor in index)
        if name in WAITS or to_host or to_gpu or by_mask or from_host:
            self.waits.count(name)


@contextlib.contextmanager
def gpu():
    """Gives the machine the posing GPU; yields the Waits counted meanwhile."""
    lift = torch._C._only_lift_cpu_tensors()
    patches = mock.patch.multiple(torch.cuda, _lazy_init=lambda: None, mem_get_info=lambda _: (2**30, 2**31))
    waits = Waits()
    torch._C._set_only_lift_cpu_tensors(True)   # so torch.tensor(numbers, device=GPU) copies as `to` does
    try:
        with patches, Driver(waits):
            yield waits
    finally:
        torch._C._set_only_lift_cpu_tensors(lift)
