"""A planner whose search is one CUDA graph, recorded once for each kind of request."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from vicreg_jepa.planning import checks
from vicreg_jepa.planning.energies import Arrival
from vicreg_jepa.planning.model import LatentModel
from vicreg_jepa.planning.planner import Around, Plan, Planner, PlanRequest

WARM_UPS = 2  # searches before the recording: libraries choose kernels and keep constants
MOST = 16  # recordings that are kept: each has memory of its own


@dataclass(frozen=True)
class _Recording:
    """A graph, the request that it reads its inputs from, and the plan that it writes.

    keeps: what else the graph reads by its address and must therefore live as long: the planner
    with its tensors, the model, and the model's tensors.
    """

    graph: Any  # torch.cuda.CUDAGraph
    request: PlanRequest
    plan: Plan
    keeps: tuple[Any, ...]


@dataclass(frozen=True)
class Captured(Around):
    """`planner`, replayed as a CUDA graph. It is asked for plans as any planner.

    A search launches thousands of small kernels, one after the other, so that a GPU waits for the
    host; a graph launches them all at once. The first request of its kind warms up and records,
    which takes some searches' time; later ones replay. Of one kind are requests for the same model
    and device, of as many environments, of the same dtypes (also of autocast) and the same
    threshold. The graph reads the model's parameters where they are, so training them in place is
    seen; a model whose parameters were replaced, as by `.to`, is recorded anew. The last MOST
    recordings are kept, each with its memory.

    planner: without effort, since a graph has no data-dependent shapes. Raises ValueError for a
    planner with effort. A planner on several levels cannot be captured either.
    """

    planner: Planner
    _recorded: dict[Any, _Recording] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not isinstance(self.planner, Planner):
            raise ValueError(f"planner: got {type(self.planner).__name__}, takes a Planner")
        if self.planner.effort is not None:
            raise ValueError("planner: got one with effort, takes one without")

    def plan(self, model: LatentModel, request: PlanRequest) -> Plan:
        """Search as `planner.plan` does, on tensors of one CUDA device.

        Raises ValueError as `planner.plan` does, for a request with an energy (the goal and the
        threshold of its arrival determine what is minimised), without an arrival, or not on a CUDA
        device.
        """
        if request.start.device.type != "cuda":
            raise ValueError(f"start: got a tensor on {request.start.device}, takes one on a GPU")
        asked = self.asked(model, request)
        key = kind_of(model, asked)
        if key not in self._recorded:
            self._recorded[key] = self._record(model, asked)
            while len(self._recorded) > MOST:
                del self._recorded[next(iter(self._recorded))]
        recording = self._recorded[key]
        for its, given in zip(inputs(recording.request), inputs(asked), strict=True):
            its.copy_(given)
        recording.graph.replay()
        copied = {
            one.name: getattr(recording.plan, one.name).clone()
            for one in fields(Plan)
            if one.name != "above"
        }
        return Plan(**copied)

    def asked(self, model: LatentModel, request: PlanRequest) -> PlanRequest:
        """Check a request, and return it with a tensor for each input: see `inputs`."""
        if request.energy is not None:
            raise ValueError("energy: got one, takes None: to_goal of the arrival is minimised")
        if request.arrival is None:
            raise ValueError("arrival: got None, takes an Arrival, whose goal is sought")
        checks.shaped("goal", request.arrival.goal, *request.start.shape)
        self.planner.check(model, request)
        count, start = len(request.start), request.start
        time = torch.as_tensor(request.time, dtype=torch.int64, device=start.device)
        former = request.former
        if former is None:
            former = start.new_zeros(count, self.planner.horizon, model.actions)
        return replace(request, time=time.expand(count), former=former)

    def _record(self, model: LatentModel, asked: PlanRequest) -> _Recording:
        request = of(asked, *(value.clone() for value in inputs(asked)))
        planner = on(self.planner, asked.start.device)
        graph = torch.cuda.CUDAGraph()
        # Autocast keeps copies of weights for a while, and a graph would read them afterwards.
        cast = torch.autocast(
            "cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False
        )
        with torch.cuda.device(asked.start.device), cast:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    planner.search(model, request)
            torch.cuda.current_stream().wait_stream(stream)
            # A stream of this device: without one torch takes that of the first graph's device.
            with torch.cuda.graph(graph, stream=stream):
                plan = planner.search(model, request)
        return _Recording(graph, request, plan, (planner, model, tensors_of(model)))


def kind_of(model: LatentModel, asked: PlanRequest) -> tuple[Any, ...]:
    """What must be equal for a recording to serve: all that is a constant of the graph."""
    arrival, start = asked.arrival, asked.start
    assert arrival is not None
    cast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    places = tuple(value.data_ptr() for value in tensors_of(model))
    return (
        id(model), places, cast, start.device, start.shape, *(one.dtype for one in inputs(asked)),
        arrival.threshold, arrival.at,
    )  # fmt: skip


def tensors_of(model: LatentModel) -> tuple[Tensor, ...]:
    """The parameters and buffers of a model that is a module, as they are now."""
    if not isinstance(model, nn.Module):
        return ()
    return tuple(value.detach() for value in (*model.parameters(), *model.buffers()))


def inputs(asked: PlanRequest) -> tuple[Tensor, ...]:
    """(start, seed, time, former, goal): what a search depends on, besides the model."""
    arrival, time, former = asked.arrival, asked.time, asked.former
    assert arrival is not None
    assert former is not None
    assert isinstance(time, Tensor)
    return asked.start, asked.seed, time, former, arrival.goal


def of(
    asked: PlanRequest, start: Tensor, seed: Tensor, time: Tensor, former: Tensor, goal: Tensor
) -> PlanRequest:
    """Return the request with other inputs."""
    assert asked.arrival is not None
    arrival = Arrival(goal, asked.arrival.threshold, asked.arrival.at)
    return PlanRequest(start, None, seed, time, former, arrival)


def on(planner: Planner, device: torch.device) -> Planner:
    """Return the planner with its tensors on a device: a graph cannot copy them from the host."""
    moved = copy.copy(planner)
    for one in fields(planner):
        value = getattr(planner, one.name)
        if isinstance(value, Tensor):
            object.__setattr__(moved, one.name, value.to(device))  # without another check
    return moved
