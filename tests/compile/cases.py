"""What gets compiled: attention problems by name, and the smaller kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from flash_attn.backends.triton import launch, launch_backward, launch_cache, launch_rotary
from flash_attn.core.problem import (
    AttentionProblem,
    BackwardInputs,
    SequenceLayout,
    Visibility,
    make_transform,
)

ARCHS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942")
HEADDIMS = (16, 32, 64, 96, 128, 256)
# Less than the next power of two: columns are masked.
PADDED_HEADDIMS = (8, 24, 40, 192)
MASKS = {
    "full": Visibility(),
    "causal": Visibility(None, 0),
    "window": Visibility(64, 0),
}
BACKWARD_FEATURES = (
    "plain", "dropout", "softcap", "alibi", "varlen", "wide", "mask", "keymask", "boolmask",
    "chunk", "used",
)  # fmt: skip
FORWARD_FEATURES = (
    *BACKWARD_FEATURES, "paged", "cache", "split", "decode", "pageddecode", "sinks", "packedheads",
)  # fmt: skip
# (head dim of q, of v); with a second product only those of v that are larger.
HEADDIMS_V = ((64, 512), (192, 128), (64, 32), (16, 256), (256, 512))
# Strides that are no multiple of 16.
UNEVEN_HEADDIMS_V = ((40, 24), (17, 12))
# Nor of 8, with tiles of 64 and 32 columns: keys and values are not loaded ahead but take turns in
# memory.
IN_TURNS = (36, 20)
# Bytes that spill: (architecture, kernel, label) under Triton 3.6. A product of 256-wide float32
# rows, which tensor cores do not serve, keeps whole rows in a thread's registers, and dropout's
# random numbers come on top. Tried: 16x16, 16x32 and 32x16 with 4 and 8 warps and 1 to 3 stages. Of
# these only dkdv with 16x32 and two stages keeps all in registers, in 102528 bytes of shared
# memory: more than the GPUs have that share this table.
KNOWN_SPILLS = {
    ("sm80", "attention_dkdv", "d256 float32 window dropout"): 16,
    ("sm90", "attention_dkdv", "d256 float32 window dropout"): 16,
    ("sm90", "attention_dq", "d256 float32 window dropout"): 8,
}
_ROWS = 256


class Case(NamedTuple):
    """One attention problem; ``kind`` is "forward", "backward" or the name of a smaller kernel."""

    kind: str
    headdim: int = 64
    dtype: str = "float16"
    mask: str = "causal"
    feature: str = "plain"
    headdim_v: int | None = None

    @property
    def label(self) -> str:
        dims = f"d{self.headdim}" + (f"-{self.headdim_v}" if self.headdim_v else "")
        return f"{dims} {self.dtype} {self.mask} {self.feature}"


def _ints(n: int) -> Tensor:
    return torch.empty(n, dtype=torch.int32, device="meta")


def _tensor(case: Case, *shape: int) -> Tensor:
    dtype = getattr(torch, case.dtype)
    if case.feature != "wide":
        return torch.empty(shape, dtype=dtype, device="meta")
    row = 2**22
    strides = (row * shape[1], row, shape[3], 1)
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def _layout(feature: str) -> SequenceLayout:
    if feature == "varlen":
        cu_seqlens = _ints(3)
        return SequenceLayout(cu_seqlens, cu_seqlens, max_seqlen_q=_ROWS, max_seqlen_k=_ROWS)
    if feature == "used":
        return SequenceLayout(seqused_q=_ints(2), seqused_k=_ints(2))
    if feature in ("paged", "pageddecode"):
        table = torch.empty((2, 4), dtype=torch.int32, device="meta")
        return SequenceLayout(seqused_k=_ints(2), page_table=table)
    if feature == "cache":
        return SequenceLayout(seqused_k=_ints(2), leftpad_k=_ints(2), cache_batch_idx=_ints(2))
    return SequenceLayout()


def problem_of(case: Case) -> AttentionProblem:
    """The attention problem that ``case`` names; 4 query heads share 2 key heads."""
    feature, d = case.feature, case.headdim
    rows = {"decode": 16, "pageddecode": 16, "packedheads": 8}.get(feature, _ROWS)
    if feature == "varlen":
        q, k = _tensor(case, 2 * _ROWS, 4, d), _tensor(case, 2 * _ROWS, 2, d)
    elif "paged" in feature:
        q, k = _tensor(case, 2, rows, 4, d), _tensor(case, 8, 64, 2, d)
    else:
        q, k = _tensor(case, 2, rows, 4, d), _tensor(case, 2, _ROWS, 2, d)
    v = _tensor(case, *k.shape[:-1], case.headdim_v or d)
    slopes = torch.empty(4, device="meta") if feature == "alibi" else None
    transform = make_transform(d, None, 15.0 if feature == "softcap" else 0.0, slopes)
    visibility = MASKS[case.mask]
    if feature == "chunk":
        visibility = visibility._replace(attention_chunk=100)
    problem = AttentionProblem(
        q, k, v, transform._replace(**_scores(case)), visibility, _layout(feature),
        dropout_p=0.1 if feature == "dropout" else 0.0,
        num_splits=4 if feature in ("split", "decode") else 1,
        pack_gqa=feature == "packedheads",
    )  # fmt: skip
    if feature == "second":
        problem = problem._replace(qv=q.new_empty(problem.out_shape))
    return problem


def _scores(case: Case) -> dict[str, Tensor]:
    """Tensors of the score transform that ``case`` has."""

    def meta(shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    named: dict[str, dict[str, Tensor]] = {
        "mask": {"attn_mask": meta((1, 1, _ROWS, _ROWS), case.dtype)},
        "keymask": {"attn_mask": meta((2, 1, 1, _ROWS), "float32")},
        "boolmask": {"attn_mask": meta((2, 4, _ROWS, _ROWS), "bool")},
        "sinks": {"sinks": meta((4,), "bfloat16")},
    }
    found = named.get(case.feature, {}) if "mask" in case.feature or case.feature == "sinks" else {}
    if case.dtype.startswith("float8"):
        found |= {f"{name}_descale": meta((2, 2), "float32") for name in ("q", "k", "v")}
    return found


def _run_backward(case: Case) -> None:
    problem = problem_of(case)
    lse = torch.empty(problem.lse_shape, device="meta")
    rng_state = torch.empty(2, dtype=torch.int64, device="meta")
    out = problem.q.new_empty(problem.out_shape)
    gradients = [torch.empty_like(x) for x in problem[:3]]
    mask = problem.transform.attn_mask
    has_gradient = mask is not None and mask.dtype != torch.bool
    inputs = BackwardInputs(
        out, out.clone(), lse, *gradients, rng_state,
        dlse=lse.clone() if case.feature == "used" else None,
        dmask=torch.empty_like(mask) if has_gradient else None,
    )  # fmt: skip
    launch_backward.backward(problem, inputs)


def _run_softmax_debug(case: Case) -> None:
    problem = problem_of(case._replace(feature="dropout"))
    launch.forward(problem._replace(return_softmax=True), None)


def _run_append(case: Case) -> None:
    for feature in ("plain", "paged"):
        problem = problem_of(case._replace(feature=feature))
        new = _tensor(case, 2, 16, 2, case.headdim)
        launch_cache.append_kv(problem, new, new.clone(), _ints(2))
    wide = problem._replace(v=problem.v.new_empty(*problem.v.shape[:3], 512))
    rows = wide.layout._replace(cache_batch_idx=_ints(2))
    packed = (_tensor(case, 32, 2, case.headdim), _tensor(case, 32, 2, 512))
    launch_cache.append_kv(wide._replace(layout=rows), *packed, _ints(2), _ints(3))


def _run_combine(case: Case) -> None:
    parts = torch.empty(3, 2, 64, 4, case.headdim, device="meta")
    lse = torch.empty(3, 2, 4, 64, device="meta").transpose(2, 3)
    out = torch.empty(2, 64, 4, case.headdim, dtype=getattr(torch, case.dtype), device="meta")
    launch_cache.combine(parts, lse, out, torch.empty(2, 4, 64, device="meta"))


def _run_rotary(case: Case) -> None:
    x = torch.empty(2, 32, 4, case.headdim, dtype=getattr(torch, case.dtype))
    half = x.shape[-1] // 4
    cos = torch.empty(64, half, dtype=x.dtype)
    for interleaved in (False, True):
        launch_rotary.apply_rotary(x, cos, cos.clone(), interleaved=interleaved)
    packed = x.view(64, 4, case.headdim)
    bounds = torch.tensor([0, 32, 64], dtype=torch.int32)
    launch_rotary.apply_rotary(packed, cos, cos.clone(), bounds[:2], bounds, 32, inplace=True)


def _run_cross_entropy(case: Case) -> None:
    from flash_attn.ops.triton import cross_entropy as module

    logits = torch.zeros(4, 50304, dtype=getattr(torch, case.dtype), requires_grad=True)
    labels = torch.zeros(4, dtype=torch.int64)
    with mock.patch.object(module, "_runs_on_kernels", return_value=True):
        losses, _ = module.cross_entropy_loss(
            logits, labels, label_smoothing=0.1, lse_square_scale=1e-4
        )
        losses.sum().backward()


def _run_layer_norm(case: Case) -> None:
    from flash_attn.ops.triton import layer_norm as module

    dtype = getattr(torch, case.dtype)
    x, residual = (torch.zeros(4, 4096, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias = (torch.zeros(4096, requires_grad=True) for _ in range(2))
    with mock.patch.object(module, "_runs_on_kernels", return_value=True):
        y = module.layer_norm_fn(x, weight, bias, residual=residual, dropout_p=0.1)
        y.sum().backward()


SMALLER = {
    "softmax_debug": _run_softmax_debug,
    "append_kv": _run_append,
    "combine": _run_combine,
    "rotary": _run_rotary,
    "cross_entropy": _run_cross_entropy,
    "layer_norm": _run_layer_norm,
}


def run_case(case: Case) -> None:
    """Make the package launch the kernels of ``case``."""
    if case.kind == "forward":
        launch.forward(problem_of(case), None)
    elif case.kind == "backward":
        _run_backward(case)
    else:
        SMALLER[case.kind](case)


def _attention(headdim: int, dtype: str, mask: str, features: tuple[str, ...]) -> Iterator[Case]:
    for feature in features:
        yield Case("forward", headdim, dtype, mask, feature)
        if feature in BACKWARD_FEATURES:
            yield Case("backward", headdim, dtype, mask, feature)


def _extended(few: bool) -> Iterator[Case]:
    """float8, head dims of v of their own, and second products."""
    float8 = "float8_e4m3fn"
    for d in (64, 128) if few else (16, 32, 64, 96, 128, 256):
        for mask in ("causal",) if few else MASKS:
            yield Case("forward", d, float8, mask)
    features = ("pageddecode",) if few else FORWARD_FEATURES
    for feature in features:
        if feature not in ("plain", "dropout"):
            yield Case("forward", 128, float8, "window", feature)
    for d, headdim_v in HEADDIMS_V[:2] if few else HEADDIMS_V:
        for kind in ("forward", "backward"):
            yield Case(kind, d, "float16", "causal", "plain", headdim_v)
        if headdim_v > d:
            yield Case("forward", d, "bfloat16", "causal", "second", headdim_v)
            yield Case("forward", d, "bfloat16", "full", "decode", headdim_v)
    if not few:
        for feature in ("softcap", "mask", "dropout", "varlen"):
            for d, headdim_v in HEADDIMS_V[:2]:
                yield Case("forward", d, "bfloat16", "window", feature, headdim_v)
                yield Case("backward", d, "bfloat16", "window", feature, headdim_v)
        yield Case("forward", 64, float8, "causal", "second", 512)
        yield Case("forward", 64, "float32", "causal", "plain", 512)
        for kind in ("forward", "backward"):
            yield Case(kind, 64, "float32", "window", "mask", 128)


def quick_cases(arch: str) -> list[Case]:
    """A covering selection for every test run; the feature sets on one GPU of each maker."""
    cases = [
        case for d in HEADDIMS if d != 96 for case in _attention(d, "float16", "causal", ("plain",))
    ]
    cases += [Case(kind) for kind in SMALLER]
    cases += _extended(few=True)
    if arch == "sm90":
        uneven = (*UNEVEN_HEADDIMS_V, IN_TURNS)
        cases += [Case("forward", d, "float16", "causal", "plain", dv) for d, dv in uneven]
    if arch in ("sm80", "gfx942"):
        cases += _attention(128, "bfloat16", "window", FORWARD_FEATURES)
        cases += _attention(64, "float32", "causal", ("plain",))
    return cases


def wide_cases(arch: str) -> list[Case]:
    """Every head dim, mask and feature set, though not their whole product."""
    cases = []
    for d in HEADDIMS:
        for mask in MASKS:
            cases += _attention(d, "float16", mask, ("plain",))
        cases += _attention(d, "bfloat16", "window", FORWARD_FEATURES)
        cases += _attention(d, "float32", "causal", ("plain",))
        cases += _attention(d, "float32", "window", ("dropout", "softcap"))
    for d in PADDED_HEADDIMS:
        for mask in MASKS:
            cases += _attention(d, "float16", mask, ("plain",))
        cases += _attention(d, "bfloat16", "window", ("dropout", "varlen", "paged"))
        cases += _attention(d, "float32", "causal", ("plain",))
    for kind in ("forward", "backward"):
        for mask in MASKS:
            cases += [Case(kind, d, "float16", mask, "plain", dv) for d, dv in UNEVEN_HEADDIMS_V]
    if arch == "sm90":  # dk and dv apart; strides that are multiples of 8 alone
        packed = itertools.product((192, 200, 256), ("full", "causal"), ("plain", "varlen"))
        cases += [Case("backward", d, "bfloat16", mask, feature) for d, mask, feature in packed]
    cases += _attention(40, "float16", "causal", FORWARD_FEATURES)
    cases += _attention(64, "float16", "full", FORWARD_FEATURES)
    cases += [Case(kind, 128) for kind in SMALLER]
    cases += _extended(few=False)
    return cases
