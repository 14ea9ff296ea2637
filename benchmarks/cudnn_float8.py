"""cuDNN's FP8 attention forward, through its Python frontend (nvidia-cudnn-frontend)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from recording import describe
from torch import Tensor

from flash_attn.quantize import QuantizedQKV

LARGEST = torch.finfo(torch.float8_e4m3fn).max
# Weights are at most 1; a power of two within the type's range.
WEIGHT_SCALE = 256.0


class CudnnMissingError(RuntimeError):
    """cuDNN's frontend, or the library under it, cannot be used here."""


class CudnnRefusedError(RuntimeError):
    """cuDNN has no FP8 kernel for a shape."""


class Cudnn(NamedTuple):
    """The frontend's module and a handle on PyTorch's current stream."""

    module: Any
    handle: Any

    def versions(self) -> dict[str, str]:
        """Of the library and of its frontend."""
        return {
            "cudnn": str(self.module.backend_version_string()),
            "cudnn_frontend": str(self.module.__version__),
        }


def load_cudnn() -> Cudnn:
    """Import the frontend and open the library.

    Raises:
        CudnnMissingError: either is not there or does not load.
    """
    try:
        module = importlib.import_module("cudnn")
        handle = module.create_handle()
        module.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    except Exception as error:  # an assertion, if several libraries are found
        raise CudnnMissingError(
            f"cuDNN's frontend cannot be used ({describe(error)}): install nvidia-cudnn-frontend, "
            "or pass --no-cudnn to measure our error alone"
        ) from error
    return Cudnn(module, handle)


class CudnnForward:
    """cuDNN's FP8 forward for one shape.

    Args:
        cudnn: from :func:`load_cudnn`.
        size: batch, seqlen, nheads and headdim of q, k and v, in the order they lie in memory.
        causal: whether later keys are hidden.

    Raises:
        CudnnRefusedError: it has no kernel for the shape.
    """

    def __init__(self, cudnn: Cudnn, size: Sequence[int], causal: bool) -> None:
        self._handle = cudnn.handle
        not_supported = cudnn.module.cudnnGraphNotSupportedError
        try:
            self._describe(cudnn.module, size, causal)
        except not_supported as error:
            raise CudnnRefusedError(describe(error)) from error
        try:
            self._plan(cudnn.module)
        except (not_supported, RuntimeError) as error:  # the graph itself is valid
            raise CudnnRefusedError(describe(error)) from error

    def _describe(self, module: Any, size: Sequence[int], causal: bool) -> None:
        float8, float32 = module.data_type.FP8_E4M3, module.data_type.FLOAT
        graph = module.pygraph(
            io_data_type=float8,
            intermediate_data_type=float32,
            compute_data_type=float32,
            handle=self._handle,
        )
        batch, seqlen, nheads, headdim = size
        # cuDNN names dimensions in this order wherever they lie.
        dim = [batch, nheads, seqlen, headdim]
        stride = [seqlen * nheads * headdim, headdim, nheads * headdim, 1]
        one = [1, 1, 1, 1]
        self._inputs = {
            x: graph.tensor(name=x, dim=dim, stride=stride, data_type=float8) for x in "qkv"
        }
        names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
        self._factors = {
            name: graph.tensor(name=name, dim=one, stride=one, data_type=float32) for name in names
        }
        out, _, largest_weight, largest_out = graph.sdpa_fp8(
            **self._inputs,
            **self._factors,
            attn_scale=headdim**-0.5,
            generate_stats=False,
            diagonal_alignment=module.diagonal_alignment.TOP_LEFT,
            right_bound=0 if causal else None,
            name="attention",
        )
        out.set_output(True).set_dim(dim).set_stride(stride).set_data_type(float8)
        for x in (largest_weight, largest_out):
            x.set_output(True).set_dim(one).set_stride(one).set_data_type(float32)
        graph.validate()
        self._graph, self._out, self._maxima = graph, out, (largest_weight, largest_out)

    def _plan(self, module: Any) -> None:
        self._graph.build_operation_graph()
        self._graph.create_execution_plans([module.heur_mode.A, module.heur_mode.FALLBACK])
        self._graph.check_support()
        self._graph.build_plans()

    def __call__(self, given: QuantizedQKV) -> Tensor:
        """(batch, seqlen, nheads, headdim) float32: the float8 output over its factor.

        Args:
            given: one factor for each tensor, repeated in all places of the descales.
        """
        # Outputs are means of values: with this no output can leave the range.
        first = self._run(given, 0.5 / float(given.v_descale[0, 0]))
        # Rounding to float8 may have lowered the largest by a sixteenth. Factors that are powers of
        # two change no relative error of numbers within the range.
        largest = float(first.abs().max()) * 17.0 / 16.0
        if not 0.0 < largest < math.inf:
            return first
        return self._run(given, 2.0 ** math.floor(math.log2(LARGEST / largest)))

    def _run(self, given: QuantizedQKV, out_scale: float) -> Tensor:
        device, factors = given.q.device, self._factors
        out = torch.full(given.q.shape, math.nan, device=device).to(given.q.dtype)
        values: dict[str, Any] = {
            "descale_q": given.q_descale[0, 0],
            "descale_k": given.k_descale[0, 0],
            "descale_v": given.v_descale[0, 0],
            "descale_s": 1.0 / WEIGHT_SCALE,
            "scale_s": WEIGHT_SCALE,
            "scale_o": out_scale,
        }
        pack = {
            factors[name]: torch.full((1, 1, 1, 1), float(value), device=device)
            for name, value in values.items()
        }
        pack |= {self._inputs[name]: getattr(given, name).contiguous() for name in "qkv"}
        pack[self._out] = out
        pack |= {x: torch.empty(1, 1, 1, 1, device=device) for x in self._maxima}
        size = max(1, self._graph.get_workspace_size())
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        self._graph.execute(pack, workspace, handle=self._handle)
        return out.float() / out_scale
