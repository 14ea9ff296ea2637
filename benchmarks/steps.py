"""Times whole steps, forward and backward, of models by whose attention they compute.

``attention``: the attention of a Llama-8B layer alone (32 heads of 128, 8 of keys, 8k tokens,
causal). ``layer``: with its projections and rotary embedding. ``demo``: the GPU model of
``examples/demo_gpt.py``, with its loss. Everything but the attention is the same for all. Results
and gradients of all are compared with the first one's before any is timed; then steps run back to
back, in turns, and what counts is the time from a synchronisation to the next, by the step.

    python benchmarks/steps.py --peers FOLDER --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cells import Cell
from options import existing_folder, names_among
from peers import add_peers, differentiable, fa3_kernels, fa4_kernels
from recording import REPOSITORY, describe, new_result, write_json
from timing import rotations
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(REPOSITORY / "examples"))

import demo_gpt as demo  # noqa: E402

from flash_attn import flash_attn_func  # noqa: E402
from flash_attn.layers.rotary import apply_rotary_emb  # noqa: E402

# q, k, v to out, (batch, seqlen, nheads, headdim), causal.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Results = dict[str, Tensor]
LAYER = Cell(128, True, 8192, 1, 32, 8)
# Relative, in the Frobenius norm, in bfloat16; the demo's gradients went through eight layers.
WRONG_ABOVE = {"attention": 1e-2, "layer": 1e-2, "demo": 5e-2}


# ------------------------------------------------------------------------------------- attention
def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel([backend]):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)


def attend_by(name: str, device: torch.device) -> Attend:
    """The causal attention of a provider, with a gradient."""
    if name in ("ours", "ordered"):
        return functools.partial(flash_attn_func, causal=True, deterministic=name == "ordered")
    if name in ("fa3", "fa4"):
        cell = LAYER  # of which only the mask matters
        return differentiable((fa3_kernels if name == "fa3" else fa4_kernels)(cell, device))
    return functools.partial(_sdpa, _SDPA[name])


_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
PROVIDERS = ("flash", "cudnn", "ours", "ordered", "fa3", "fa4", "math")


# ------------------------------------------------------------------------------------------ jobs
class LlamaAttention(nn.Module):
    """The attention of a layer: projections, rotary embedding, attention, projection."""

    def __init__(self, cell: Cell, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.cell, width = cell, cell.nheads * cell.headdim
        place: dict[str, Any] = {"device": device, "dtype": dtype, "bias": False}
        self.wq = nn.Linear(width, width, **place)
        self.wk, self.wv = (
            nn.Linear(width, cell.kv_heads * cell.headdim, **place) for _ in range(2)
        )
        self.wo = nn.Linear(width, width, **place)
        steps = torch.arange(0, cell.headdim, 2, device=device) / cell.headdim
        angles = torch.outer(torch.arange(cell.seqlen, device=device), 500000.0**-steps)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(batch, seqlen, width) to the same."""
        q, k, v = (w(x).unflatten(-1, (-1, self.cell.headdim)) for w in (self.wq, self.wk, self.wv))
        q, k = (apply_rotary_emb(y, self.cos, self.sin) for y in (q, k))
        return self.wo(attend(q, k, v).flatten(-2))


class PluggedAttention(demo.TwinAttention):
    """The demo's attention by any provider."""

    attend: Attend

    def forward(self, x: Tensor, inference_params: Any = None) -> Tensor:
        """(batch, seqlen, width) to the same."""
        batch, seqlen, width = x.shape
        qkv = self.Wqkv(x).view(batch, seqlen, 3, self.heads, width // self.heads)
        out = self.attend(*self.rotary_emb(qkv).unbind(2))
        return self.out_proj(out.reshape(batch, seqlen, width))


class Sizes(NamedTuple):
    """What the jobs are made of; smaller where they are only tried out."""

    layer: Cell
    demo: demo.Config
    dtype: torch.dtype


GPU_SIZES = Sizes(LAYER, demo.GPU_CONFIG, torch.bfloat16)
CPU_SIZES = Sizes(
    Cell(16, True, 64, 1, 4, 2),
    demo.Config(layers=2, width=32, heads=2, context=32, batch_size=2),
    torch.float32,
)
Step = Callable[[], Results]


def attention_step(sizes: Sizes, attend: Attend, device: torch.device) -> Step:
    """The layer's attention alone."""
    cell, generator = sizes.layer, torch.Generator(device).manual_seed(0)
    heads = (cell.nheads, cell.kv_heads, cell.kv_heads, cell.nheads)
    shape = (cell.batch, cell.seqlen)
    made = [torch.randn(*shape, n, cell.headdim, device=device, generator=generator) for n in heads]
    *tensors, dout = (x.to(sizes.dtype) for x in made)
    leaves = [x.requires_grad_() for x in tensors]

    def step() -> Results:
        out = attend(*leaves)
        grads = torch.autograd.grad(out, leaves, dout)
        return {"out": out, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}

    return step


def layer_step(sizes: Sizes, attend: Attend, device: torch.device) -> Step:
    """The layer, with gradients of its input and weights."""
    torch.manual_seed(0)
    cell = sizes.layer
    layer = LlamaAttention(cell, device, sizes.dtype)
    shape = (cell.batch, cell.seqlen, cell.nheads * cell.headdim)
    x, dout = (torch.randn(shape, device=device).to(sizes.dtype) for _ in range(2))
    leaves = dict(layer.named_parameters()) | {"x": x.requires_grad_()}

    def step() -> Results:
        out = layer(x, attend)
        grads = torch.autograd.grad(out, list(leaves.values()), dout)
        return {"out": out, **dict(zip(leaves, grads, strict=True))}

    return step


def demo_step(sizes: Sizes, attend: Attend, device: torch.device) -> Step:
    """The demo's model and loss; FlashMHA itself where the attention is ours."""
    torch.manual_seed(0)
    model = demo.ByteGPT(sizes.demo)
    is_ours = isinstance(attend, functools.partial) and attend.func is flash_attn_func
    if not (is_ours and not attend.keywords["deterministic"]):
        for block in model.blocks:
            plugged = PluggedAttention(sizes.demo.width, sizes.demo.heads)
            plugged.load_state_dict(block.attn.state_dict())
            plugged.attend = attend
            block.attn = plugged
    model = model.to(device)
    generator = torch.Generator().manual_seed(1)
    shape = (sizes.demo.batch_size, sizes.demo.context + 1)
    batch = torch.randint(256, shape, generator=generator).to(device)
    weights = list(model.parameters())

    def step() -> Results:
        loss = demo.next_byte_loss(model, batch)
        grads = torch.autograd.grad(loss, weights)
        return {"loss": loss, "gradient": grads[0]}

    return step


JOBS = {"attention": attention_step, "layer": layer_step, "demo": demo_step}


# ------------------------------------------------------------------------------------- measuring
def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def errors_beside(found: Results, want: Results) -> dict[str, float]:
    """Relative errors in the Frobenius norm, of all results."""
    errors = {}
    for name, x in want.items():
        error = (found[name].float() - x.float()).norm() / x.float().norm()
        errors[name] = float(f"{float(error):.3e}")
    return errors


def milliseconds(step: Step, seconds: float, device: torch.device) -> float:
    """Of a step, among as many back to back as about fill ``seconds``, at least three."""
    synchronize(device)
    began = time.perf_counter()
    step()
    synchronize(device)
    count = max(3, int(seconds / (time.perf_counter() - began)))
    began = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return (time.perf_counter() - began) * 1e3 / count


def measure(job: str, sizes: Sizes, args: argparse.Namespace) -> dict[str, Any]:
    """Compare, then time in turns; a row of the result file."""
    device = torch.device(args.device)
    row: dict[str, Any] = {"job": job, "median_ms": {}, "errors": {}, "failures": {}}
    steps: dict[str, Step] = {}
    want: Results | None = None
    for name in args.providers:
        try:
            step = JOBS[job](sizes, attend_by(name, device), device)
            found = {key: x.detach().clone() for key, x in step().items()}
            want = want or found
            row["errors"][name] = errors = errors_beside(found, want)
        except Exception as error:
            row["failures"][name] = describe(error)
            continue
        if all(error <= WRONG_ABOVE[job] for error in errors.values()):
            steps[name] = step
        else:
            row["failures"][name] = f"wrong beside {args.providers[0]}: {errors}"
    times: dict[str, list[float]] = {name: [] for name in steps}
    for order in rotations(list(steps), args.rounds):
        for name in order:
            times[name].append(milliseconds(steps[name], args.seconds, device))
    row["median_ms"] = {name: round(statistics.median(x), 4) for name, x in times.items()}
    row["rounds_ms"] = {name: [round(value, 4) for value in x] for name, x in times.items()}
    return row


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; names that do not exist end the program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", default=",".join(JOBS), type=names_among(JOBS))
    parser.add_argument(
        "--providers", default="flash,cudnn,ours,ordered,fa3", type=names_among(PROVIDERS)
    )
    parser.add_argument("--peers", type=existing_folder, help="of FlashAttention-3 and -4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.15, help="of one measurement")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="no new job after it")
    parser.add_argument("--out", type=Path, help="JSON file, written after every job")
    parser.add_argument("--commit", help="recorded instead of asking git")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try out")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 0 if every provider was right and timed in every job."""
    args = parse_arguments(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU is visible", file=sys.stderr)
        return 2
    if args.peers is not None:
        add_peers(args.peers)
    sizes = GPU_SIZES if args.device == "cuda" else CPU_SIZES
    settings = {"dtype": str(sizes.dtype).removeprefix("torch."), "rounds": args.rounds}
    data = new_result("steps", args.commit, settings)
    data |= {"left_out": [], "rows": []}
    until = time.monotonic() + args.max_seconds
    for job in args.jobs:
        if time.monotonic() > until:
            data["left_out"].append(job)
            continue
        row = measure(job, sizes, args)
        data["rows"].append(row)
        figures = " ".join(f"{name} {ms:.3f}" for name, ms in row["median_ms"].items())
        print(f"{job:<10} ms a step: {figures}", *row["failures"].items(), flush=True)
        if args.device == "cuda":
            torch.cuda.empty_cache()
        if args.out is not None:
            write_json(args.out, data)
    if args.out is not None:
        write_json(args.out, data)
    return int(bool(data["left_out"]) or any(row["failures"] for row in data["rows"]))


if __name__ == "__main__":
    sys.exit(main())
