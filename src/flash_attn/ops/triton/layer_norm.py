"""Fused dropout, residual addition and LayerNorm or RMSNorm, with one or two sets of weights.

What is normalised is ``dropout(x * rowscale) + dropout(x1) + residual``, in float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.derivatives import first_order
from ...core.toolchain import explains_toolchain
from ...core.validate import check_number
from ...errors import ConstraintError

# A program keeps a whole row in registers; wider rows are left to PyTorch.
_MAX_ROW_BYTES = 64 * 1024
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class _Options(NamedTuple):
    """The settings of a call besides its tensors."""

    eps: float
    dropout_p: float
    is_rms_norm: bool
    zero_centered_weight: bool
    out_dtype: torch.dtype
    residual_dtype: torch.dtype
    return_mask: bool
    keep_sum: bool  # the caller or the backward pass needs what was normalised

    @property
    def keep_scale(self) -> float:
        return 1.0 / (1.0 - self.dropout_p) if self.dropout_p < 1.0 else 0.0


class _Inputs(NamedTuple):
    """The tensors of a call; all but ``x`` may be absent."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    x1: Tensor | None
    weight1: Tensor | None
    bias1: Tensor | None
    rowscale: Tensor | None

    def sum_is_x(self, options: _Options) -> bool:
        """Say whether ``x`` itself is what gets normalised, bit for bit."""
        others = (self.residual, self.x1, self.rowscale)
        plain = options.dropout_p == 0.0 and all(t is None for t in others)
        return plain and options.residual_dtype == self.x.dtype


class _Outputs(NamedTuple):
    y: Tensor
    y1: Tensor | None
    residual_out: Tensor | None
    mask: Tensor | None
    mask1: Tensor | None


class _Saved(NamedTuple):
    """What the backward pass needs; the input branches themselves are not kept alive."""

    normalised: Tensor
    mean: Tensor | None
    rstd: Tensor
    seed: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    weight1: Tensor | None
    bias1: Tensor | None
    rowscale: Tensor | None


class _Dtypes(NamedTuple):
    """The dtypes of the input branches, None for those that are absent."""

    x: torch.dtype
    residual: torch.dtype | None
    x1: torch.dtype | None


def _runs_on_kernels(inputs: _Inputs) -> bool:
    x = inputs.x
    if x.device.type not in ("cuda", "xpu") or x.shape[-1] * x.element_size() > _MAX_ROW_BYTES:
        return False
    return all(t is None or t.dtype in _KERNEL_DTYPES for t in inputs)


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a guard: Triton launches on the current device, which may be another GPU."""
    if tensor.device.type == "cpu":
        return nullcontext()
    module: Any = torch.get_device_module(tensor.device)
    return module.device(tensor.device)


def _block_and_warps(n_cols: int) -> tuple[int, int]:
    block = max(16, 1 << (n_cols - 1).bit_length())
    most = 16 if torch.version.hip else 32
    return block, min(most, max(1, block // 512))


def _num_programs(x: Tensor) -> int:
    """Return how many programs share the rows in the backward pass."""
    if x.device.type == "cpu":
        return 3
    properties = torch.get_device_module(x.device).get_device_properties(x.device)
    units = getattr(properties, "multi_processor_count", 0) or 64
    return int(units) * (4 if x.shape[-1] <= 2048 else 2)


def _rows(tensor: Tensor | None) -> Tensor | None:
    """View a tensor as rows whose elements are adjacent."""
    if tensor is None:
        return None
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1).contiguous()


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


@explains_toolchain
def _forward_kernel(
    inputs: _Inputs, options: _Options, shape: torch.Size
) -> tuple[_Outputs, _Saved]:
    """Run the forward kernel on 2-D inputs; the outputs are contiguous and of the given shape."""
    from ...backends._compiled import look_up_first
    from ...kernels.layer_norm import layer_norm_fwd_kernel

    x = inputs.x
    rows, n_cols = x.shape

    def empty(wanted: bool, dtype: torch.dtype) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=x.device) if wanted else None

    drops = options.dropout_p > 0.0
    separate_sum = options.keep_sum and not inputs.sum_is_x(options)
    y = torch.empty(shape, dtype=options.out_dtype, device=x.device)
    y1 = empty(inputs.weight1 is not None, options.out_dtype)
    residual_out = empty(separate_sum, options.residual_dtype)
    with_mask = drops and options.return_mask
    mask = empty(with_mask, torch.bool)
    mask1 = empty(with_mask and inputs.x1 is not None, torch.bool)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    mean = None if options.is_rms_norm else torch.empty_like(rstd)
    # The seed stays on the device: no synchronisation, and a captured graph draws afresh.
    seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device) if drops else None
    if x.numel() > 0:
        block, warps = _block_and_warps(n_cols)
        with _device_of(x):
            look_up_first(layer_norm_fwd_kernel)[(rows,)](
                x,
                inputs.residual,
                inputs.x1,
                inputs.rowscale,
                seed,
                inputs.weight,
                inputs.bias,
                inputs.weight1,
                inputs.bias1,
                y,
                y1,
                residual_out,
                mask,
                mask1,
                mean,
                rstd,
                x.stride(0),
                _stride(inputs.residual),
                _stride(inputs.x1),
                n_cols,
                options.eps,
                options.dropout_p,
                options.keep_scale,
                IS_RMS_NORM=options.is_rms_norm,
                ZERO_CENTERED=options.zero_centered_weight,
                BLOCK_N=block,
                num_warps=warps,
            )
    saved = _Saved(
        x if residual_out is None else residual_out,
        mean,
        rstd,
        seed,
        inputs.weight,
        inputs.bias,
        inputs.weight1,
        inputs.bias1,
        inputs.rowscale,
    )
    return _Outputs(y, y1, residual_out, mask, mask1), saved


class _Gradients(NamedTuple):
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    x1: Tensor | None
    weight1: Tensor | None
    bias1: Tensor | None


@explains_toolchain
def _backward_kernel(
    saved: _Saved,
    dtypes: _Dtypes,
    dy: Tensor,
    dy1: Tensor | None,
    dsum: Tensor | None,
    options: _Options,
    trains: tuple[bool, ...] = (True, True, True, True),
) -> _Gradients:
    """Run the backward kernel on 2-D tensors.

    ``dsum`` is the gradient of the returned sum; ``trains`` says which of weight, bias, weight1 and
    bias1 need a gradient.
    """
    from ...backends._compiled import look_up_first
    from ...kernels.layer_norm import layer_norm_bwd_kernel

    x = saved.normalised
    rows, n_cols = x.shape
    rows_per_program = max(1, -(-rows // _num_programs(x)))
    programs = -(-rows // rows_per_program)

    def empty(dtype: torch.dtype | None) -> Tensor | None:
        return None if dtype is None else torch.empty(x.shape, dtype=dtype, device=x.device)

    def share(parameter: Tensor | None, wanted: bool) -> Tensor | None:
        if parameter is None or not wanted:
            return None
        return torch.empty((programs, n_cols), dtype=torch.float32, device=x.device)

    dx = torch.empty(x.shape, dtype=dtypes.x, device=x.device)
    dx1 = empty(dtypes.x1)
    untouched = options.dropout_p == 0.0 and saved.rowscale is None
    shared = untouched and dtypes.residual == dtypes.x
    dresidual = None if shared else empty(dtypes.residual)
    parameters = (saved.weight, saved.bias, saved.weight1, saved.bias1)
    shares = [share(p, wanted) for p, wanted in zip(parameters, trains, strict=True)]
    if x.numel() > 0:
        block, warps = _block_and_warps(n_cols)
        with _device_of(x):
            look_up_first(layer_norm_bwd_kernel)[(programs,)](
                x,
                saved.weight,
                saved.weight1,
                saved.rowscale,
                saved.seed,
                saved.mean,
                saved.rstd,
                dy,
                dy1,
                dsum,
                dx,
                dx1,
                dresidual,
                *shares,
                x.stride(0),
                dy.stride(0),
                _stride(dy1),
                _stride(dsum),
                rows,
                n_cols,
                rows_per_program,
                options.dropout_p,
                options.keep_scale,
                IS_RMS_NORM=options.is_rms_norm,
                ZERO_CENTERED=options.zero_centered_weight,
                BLOCK_N=block,
                num_warps=warps,
            )
    dw, db, dw1, db1 = (
        None if s is None or p is None else s.sum(0).to(p.dtype)
        for s, p in zip(shares, parameters, strict=True)
    )
    return _Gradients(dx, dw, db, dx if shared else dresidual, dx1, dw1, db1)


class _NormFn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: _Options, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        given = _Inputs(*tensors)  # type: ignore[arg-type]
        shape = given.x.shape
        branches = (given.x, given.residual, given.x1)
        x, residual, x1 = (_rows(t) for t in branches)
        inputs = _Inputs(
            x,  # type: ignore[arg-type]
            _vector(given.weight),
            _vector(given.bias),
            residual,
            x1,
            _vector(given.weight1),
            _vector(given.bias1),
            _vector(given.rowscale),
        )
        outputs, saved = _forward_kernel(inputs, options, shape)
        ctx.save_for_backward(*saved)
        ctx.options, ctx.shape = options, shape
        ctx.dtypes = _Dtypes(*(None if t is None else t.dtype for t in branches))  # type: ignore[arg-type]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(m for m in outputs[3:] if m is not None))
        return outputs

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = _Saved(*ctx.saved_tensors)
        saved = saved._replace(normalised=saved.normalised.reshape(-1, ctx.shape[-1]))
        x = saved.normalised
        dy, dy1, dsum = (_rows(g) for g in grads[:3])
        if dy is None:
            dy = torch.zeros(x.shape, dtype=ctx.options.out_dtype, device=x.device)
        if dy1 is None and saved.weight1 is not None:
            dy1 = torch.zeros_like(dy)
        needs = ctx.needs_input_grad
        trains = needs[2], needs[3], needs[6], needs[7]
        found = _backward_kernel(saved, ctx.dtypes, dy, dy1, dsum, ctx.options, trains)
        # One object for two inputs, so that autograd sees that they share their gradient.
        dx = found.x.view(ctx.shape)
        dresidual = found.residual
        if dresidual is not None:
            dresidual = dx if dresidual is found.x else dresidual.view(ctx.shape)
        dx1 = None if found.x1 is None else found.x1.view(ctx.shape)
        weights = found.weight, found.bias, dresidual, dx1, found.weight1, found.bias1
        return (None, dx, *weights, None)


def _drop(h: Tensor, options: _Options) -> tuple[Tensor, Tensor | None]:
    if options.dropout_p == 0.0:
        return h, None
    draws = torch.rand(h.shape, dtype=torch.float32, device=h.device)
    mask = draws >= options.dropout_p
    return torch.where(mask, h * options.keep_scale, 0.0), mask


def _normalise(h: Tensor, weight: Tensor | None, bias: Tensor | None, options: _Options) -> Tensor:
    """Normalise wide values ``h`` and scale them."""
    weight = None if weight is None else weight.to(h.dtype)
    bias = None if bias is None else bias.to(h.dtype)
    if weight is not None and options.zero_centered_weight:
        weight = weight + 1.0
    if not options.is_rms_norm:
        return F.layer_norm(h, h.shape[-1:], weight, bias, options.eps)
    y = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + options.eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _forward_torch(inputs: _Inputs, options: _Options) -> _Outputs:
    """Compute the same with differentiable PyTorch operations."""
    x, weight, bias, residual, x1, weight1, bias1, rowscale = inputs
    # float64 inputs stay float64.
    wide = torch.promote_types(x.dtype, torch.float32)
    h, mask1 = x.to(wide), None
    if rowscale is not None:
        h = h * rowscale.detach().to(wide).unsqueeze(-1)
    h, mask = _drop(h, options)
    if x1 is not None:
        h1, mask1 = _drop(x1.to(wide), options)
        h = h + h1
    if residual is not None:
        h = h + residual.to(wide)
    y = _normalise(h, weight, bias, options).to(options.out_dtype)
    y1 = None
    if weight1 is not None:
        y1 = _normalise(h, weight1, bias1, options).to(options.out_dtype)
    separate_sum = options.keep_sum and not inputs.sum_is_x(options)
    residual_out = h.to(options.residual_dtype) if separate_sum else None
    return _Outputs(y, y1, residual_out, mask, mask1)


def _check(inputs: _Inputs, dropout_p: float) -> None:
    x = inputs.x
    for name, given in zip(inputs._fields, inputs, strict=True):
        if not isinstance(given, Tensor) and (given is not None or name == "x"):
            raise ConstraintError(f"`{name}` must be a torch.Tensor, found {type(given).__name__}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ConstraintError(
            f"`x` must have a non-empty last dimension, found shape {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise ConstraintError(f"`x` must be floating point, found {x.dtype}")
    shapes = {
        "weight": x.shape[-1:],
        "bias": x.shape[-1:],
        "residual": x.shape,
        "x1": x.shape,
        "weight1": x.shape[-1:],
        "bias1": x.shape[-1:],
        "rowscale": x.shape[:-1],
    }
    for name, shape in shapes.items():
        tensor = getattr(inputs, name)
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ConstraintError(
                f"`{name}` must have shape {tuple(shape)}, found {tuple(tensor.shape)}"
            )
        if tensor.device != x.device:
            raise ConstraintError(f"`{name}` must be on {x.device} like `x`, found {tensor.device}")
    if inputs.rowscale is not None and inputs.x1 is not None:
        raise ConstraintError("`rowscale` must be None if `x1` is given")
    if inputs.bias1 is not None and inputs.weight1 is None:
        raise ConstraintError("`bias1` must be None if `weight1` is None")
    if not 0.0 <= dropout_p <= 1.0:
        raise ConstraintError(f"`dropout_p` must be between 0 and 1, found {dropout_p}")


def _compute(inputs: _Inputs, options: _Options) -> _Outputs:
    if _runs_on_kernels(inputs):
        found = _Outputs(*_NormFn.apply(options, *inputs))
    else:
        found = _forward_torch(inputs, options)
    return found._replace(residual_out=inputs.x) if inputs.sum_is_x(options) else found


def _write(buffer: Tensor | None, value: Tensor, name: str) -> Tensor:
    """Return ``value``, in the caller's buffer if there is one."""
    if buffer is None:
        return value
    if buffer.shape != value.shape or buffer.device != value.device:
        raise ConstraintError(
            f"`{name}` must have shape {tuple(value.shape)} on {value.device}, "
            f"found {tuple(buffer.shape)} on {buffer.device}"
        )
    return buffer.copy_(value)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """Normalise ``dropout(x * rowscale) + dropout(x1) + residual`` over the last dimension.

    Args:
        x: (..., N).
        weight: (N,), or None for no scaling.
        bias: (N,), or None.
        residual: (..., N), added after dropout; its dtype is that of the returned sum.
        x1: (..., N), a second branch with its own dropout.
        weight1: (N,); asks for a second output that is scaled by it.
        bias1: (N,), the shift of the second output.
        eps: added to the variance.
        dropout_p: probability of dropping an entry of ``x`` and of ``x1``.
        rowscale: (...), factors of the rows of ``x``; no gradient flows to it.
        prenorm: return the sum that was normalised, too.
        residual_in_fp32: return that sum in float32; used only if ``residual`` is None.
        zero_centered_weight: scale by ``weight + 1``.
        is_rms_norm: divide by the root mean square, without centring.
        return_dropout_mask: return the boolean masks of ``x`` and ``x1``, True where kept.
        out_dtype: dtype of the outputs, ``x.dtype`` by default.
        out: buffer for the first output.
        residual_out: buffer for the returned sum.

    Returns:
        The output alone, or a tuple of: the output, the second output (with ``weight1``), the sum
        (with ``prenorm``), the two masks (with ``return_dropout_mask``; None where none was drawn).

    Raises:
        ConstraintError: an argument has a wrong shape, device or value.
    """
    inputs = _Inputs(x, weight, bias, residual, x1, weight1, bias1, rowscale)
    eps, dropout_p = check_number(eps, "eps"), check_number(dropout_p, "dropout_p")
    _check(inputs, dropout_p)
    if residual is not None:
        residual_dtype = residual.dtype
    elif residual_out is not None:
        residual_dtype = residual_out.dtype
    else:
        residual_dtype = torch.float32 if residual_in_fp32 else x.dtype
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    options = _Options(
        eps=float(eps),
        dropout_p=float(dropout_p),
        is_rms_norm=is_rms_norm,
        zero_centered_weight=zero_centered_weight,
        out_dtype=out_dtype or (out.dtype if out is not None else x.dtype),
        residual_dtype=residual_dtype,
        return_mask=return_dropout_mask,
        keep_sum=learns or prenorm,
    )
    found = _compute(inputs, options)
    results: list[Tensor | None] = [_write(out, found.y, "out")]
    if found.y1 is not None:
        results.append(found.y1)
    if prenorm and found.residual_out is not None:
        results.append(_write(residual_out, found.residual_out, "residual_out"))
    if return_dropout_mask:
        results += [found.mask, found.mask1]
    return results[0] if len(results) == 1 else tuple(results)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """Do what ``layer_norm_fn`` does with ``is_rms_norm=True``; see there for the arguments."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        zero_centered_weight,
        is_rms_norm=True,
        return_dropout_mask=return_dropout_mask,
        out_dtype=out_dtype,
        out=out,
        residual_out=residual_out,
    )


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """Apply ``layer_norm_fn`` and then a linear layer, in the autocast dtype where one is active.

    Args:
        x: (..., N).
        norm_weight: (N,), or None.
        norm_bias: (N,), or None.
        linear_weight: (out_features, N).
        linear_bias: (out_features,), or None.
        residual: (..., N), added to ``x`` first.
        eps: added to the variance.
        prenorm: return the sum that was normalised, too.
        residual_in_fp32: return that sum in float32; used only if ``residual`` is None.
        is_rms_norm: divide by the root mean square, without centring.

    Returns:
        The linear layer's output (..., out_features), or (output, sum) with ``prenorm``.

    Raises:
        ConstraintError: an argument has a wrong shape, device or value.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    y, *rest = layer_norm_fn(
        x,
        norm_weight,
        norm_bias,
        residual=residual,
        eps=eps,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
        return_dropout_mask=True,
        out_dtype=dtype,
    )
    bias = None if linear_bias is None else linear_bias.to(dtype)
    output = F.linear(y, linear_weight.to(dtype), bias)
    return (output, rest[0]) if prenorm else output


class RMSNorm(torch.nn.Module):
    """Divide by the root mean square and scale, optionally after dropout and a residual addition.

    Args:
        hidden_size: length of the last dimension.
        eps: added to the mean square.
        dropout_p: dropout applied to the input while training.
        zero_centered_weight: scale by ``weight + 1`` and start from zeros.
        device: where the weight lives.
        dtype: dtype of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = torch.nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.zero_centered_weight = zero_centered_weight
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the scaling the identity."""
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """Normalise ``dropout(x) + residual``; with ``prenorm`` return that sum, too."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


def _apply_mask(x: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    if dropout_p == 0.0:
        return x
    if mask is None:
        return F.dropout(x, dropout_p)
    return torch.where(mask, x, 0.0) / (1.0 - dropout_p)


def _norm_ref(
    is_rms_norm: bool,
    inputs: _Inputs,
    eps: float,
    dropout_p: float,
    prenorm: bool,
    zero_centered_weight: bool,
    masks: tuple[Tensor | None, Tensor | None],
    upcast: bool,
) -> Any:
    """Spell the formula out in the dtypes of the inputs, or in float32 with ``upcast``."""
    dtype = inputs.x.dtype
    if upcast:
        inputs = _Inputs(*(None if t is None else t.float() for t in inputs))  # type: ignore[arg-type]
    x, weight, bias, residual, x1, weight1, bias1, rowscale = inputs
    if rowscale is not None:
        x = x * rowscale.unsqueeze(-1)
    x = _apply_mask(x, masks[0], dropout_p)
    if x1 is not None:
        x = x + _apply_mask(x1, masks[1], dropout_p)
    if residual is not None:
        x = (x + residual).to(x.dtype)

    def one(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if weight is not None and zero_centered_weight:
            weight = weight + 1.0
        if not is_rms_norm:
            wide = x if weight is None else x.to(weight.dtype)
            return F.layer_norm(wide, x.shape[-1:], weight, bias, eps).to(dtype)
        y = x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps)
        y = y if weight is None else y * weight
        return (y if bias is None else y + bias).to(dtype)

    results = [one(weight, bias)]
    if weight1 is not None:
        results.append(one(weight1, bias1))
    if prenorm:
        results.append(x)
    return results[0] if len(results) == 1 else tuple(results)


def layer_norm_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    zero_centered_weight: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Any:
    """Compute ``layer_norm_fn`` with plain, differentiable operations and given dropout masks."""
    inputs = _Inputs(x, weight, bias, residual, x1, weight1, bias1, rowscale)
    _check(inputs, dropout_p)
    masks = dropout_mask, dropout_mask1
    return _norm_ref(False, inputs, eps, dropout_p, prenorm, zero_centered_weight, masks, upcast)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    zero_centered_weight: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Any:
    """Compute ``rms_norm_fn`` with plain, differentiable operations and given dropout masks."""
    inputs = _Inputs(x, weight, bias, residual, x1, weight1, bias1, rowscale)
    _check(inputs, dropout_p)
    masks = dropout_mask, dropout_mask1
    return _norm_ref(True, inputs, eps, dropout_p, prenorm, zero_centered_weight, masks, upcast)
