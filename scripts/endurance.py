"""Launches the Hopper kernels ten thousand times over random shapes, and repeats calls for bits.

    python scripts/endurance.py --out benchmarks/results/NAME.json

Launches: every shape (dense or packed, lengths, heads, mask, head dim, order of dq) is computed
forward and backward several times, and the last results are compared with the reference. Repeats:
a thousand passes of one problem; out, log-sum-exp, dk and dv must have the same bits each time, and
so must dq where ``deterministic`` is asked for. Both run in a child that is ended, and reported
with its shape, when it prints nothing for ``--patience`` seconds: that is a hang.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from watching import Watched

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from options import names_among  # noqa: E402
from recording import new_result, write_json  # noqa: E402

import flash_attn  # noqa: E402

LAUNCHES, SHAPES, REPEATS = 10_000, 1000, 1000
# Relative, in the Frobenius norm, in bfloat16.
WRONG_ABOVE = {"lse": 1e-4}
WRONG_ABOVE |= dict.fromkeys(("out", "dq", "dk", "dv"), 1.5e-2)
JOBS = ("launches", "repeats")
RESULTS = ("out", "lse", "dq", "dk", "dv")
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (70, 0)},
}


@dataclass(frozen=True)
class Shape:
    """A problem: dense if ``batch`` is not 0, else sequences of both lengths, packed."""

    headdim: int
    mask: str
    nheads: int
    nheads_k: int
    batch: int
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    deterministic: bool

    @property
    def name(self) -> str:
        layout = f"dense {self.batch}" if self.batch else "packed"
        lengths = f"q{list(self.lengths_q)} k{list(self.lengths_k)}"
        order = " deterministic" if self.deterministic else ""
        heads = f"h{self.nheads}/{self.nheads_k}"
        return f"d{self.headdim} {self.mask} {layout} {heads} {lengths}{order}"


def draw(chosen: random.Random) -> Shape:
    """A random shape that the Hopper kernels serve forward and backward."""
    headdim = chosen.choice((64, 128, 64, 128, 192, 256))
    packed = chosen.random() < 0.4
    count, least, most = (chosen.randint(1, 6), 0, 800) if packed else (1, 1, 1500)
    lengths = [tuple(chosen.randint(least, most) for _ in range(count)) for _ in "qk"]
    if packed:  # at least a row of each
        lengths = [(1 + first, *rest) for first, *rest in lengths]
    # Of a single key the gradient of q is 0, and what rounding leaves cannot be held against that.
    lengths[1] = tuple(2 if n == 1 else n for n in lengths[1])
    nheads_k = chosen.choice((1, 2, 3, 5))
    return Shape(
        headdim, chosen.choice(list(MASKS)), nheads_k * chosen.choice((1, 2, 4)), nheads_k,
        0 if packed else chosen.choice((1, 2, 5)), *lengths,
        chosen.random() < 0.5,
    )  # fmt: skip


def repeated_shapes() -> list[Shape]:
    """Each in any order and in order too; what is used most comes first."""
    some = (700,)
    plain = [Shape(d, mask, 8, 4, 2, some, some, False)
             for d in (128, 64, 256) for mask in ("causal", "full")]  # fmt: skip
    several = (300, 1, 129, 640)
    plain += [Shape(d, "causal", 8, 4, 0, several, several, False) for d in (128, 64, 256)]
    plain += [Shape(128, "window", 6, 2, 2, (333,), (500,), False)]
    return [*plain, *(replace(x, deterministic=True) for x in plain)]


# ------------------------------------------------------------------------------------- the child
def tensors_of(shape: Shape, device: str) -> list[Tensor]:
    """q, k, v and dout."""
    generator = torch.Generator(device).manual_seed(sum(shape.lengths_q) + shape.headdim)
    made = []
    for lengths, heads in (
        (shape.lengths_q, shape.nheads),
        (shape.lengths_k, shape.nheads_k),
        (shape.lengths_k, shape.nheads_k),
        (shape.lengths_q, shape.nheads),
    ):
        rows = (shape.batch, lengths[0]) if shape.batch else (sum(lengths),)
        size = (*rows, heads, shape.headdim)
        made.append(torch.randn(size, device=device, generator=generator).bfloat16())
    return made


def solver(shape: Shape, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """A call that computes :data:`RESULTS` by the backend in use."""
    *inputs, dout = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    options = {**MASKS[shape.mask], "deterministic": shape.deterministic, "return_attn_probs": True}
    bounds: tuple[Any, ...] = ()
    attend: Callable[..., Any] = flash_attn.flash_attn_func
    if not shape.batch:
        attend = flash_attn.flash_attn_varlen_func
        cu = [torch.tensor([0, *accumulate(x)], dtype=torch.int32, device=dout.device)
              for x in (shape.lengths_q, shape.lengths_k)]  # fmt: skip
        bounds = (*cu, max(shape.lengths_q), max(shape.lengths_k))

    def solve() -> list[Tensor]:
        out, lse, _ = attend(*leaves, *bounds, **options)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]

    return solve


def wrong(got: Sequence[Tensor], want: Sequence[Tensor]) -> list[str]:
    """Which results are off, and by how much; the log-sum-exp of rows without keys is infinite."""
    found = []
    for name, x, y in zip(RESULTS, got, want, strict=True):
        if name == "lse":
            seen = y.isfinite()
            if not torch.equal(x.isfinite(), seen):
                found.append("lse: other rows are infinite")
                continue
            x, y = x[seen], y[seen]
        size = max(float(y.float().norm()), 1e-3 * math.sqrt(max(1, y.numel())))
        error = float((x.float() - y.float()).norm()) / size
        if not error <= WRONG_ABOVE[name]:
            found.append(f"{name}: {error:.1e}")
    return found


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def say(**message: Any) -> None:
    print("@@" + json.dumps(message), flush=True)


def launch(shapes: int, each: int, backend: str, device: str, seed: int) -> None:
    """Say of every shape that it begins, and what is wrong with it."""
    chosen = random.Random(seed)
    for _ in range(shapes):
        shape = draw(chosen)
        say(event="begin", name=shape.name)
        tensors = tensors_of(shape, device)
        with flash_attn.use_backend(backend):
            solve = solver(shape, tensors)
            for _ in range(each - 1):
                solve()
            got = solve()
        with flash_attn.use_backend("reference"):
            want = solver(replace(shape, deterministic=False), tensors)()
        say(event="shape", launches=each, wrong=wrong(got, want))


def repeat(shapes: Sequence[Shape], count: int, backend: str, device: str) -> None:
    """Say how many elements of each result differed from the first pass's in any of the others."""
    for shape in shapes:
        say(event="begin", name=shape.name)
        tensors = tensors_of(shape, device)
        with flash_attn.use_backend(backend):
            solve = solver(shape, tensors)
            first = [x.clone() for x in solve()]
            differing = torch.zeros(len(first), dtype=torch.int64, device=device)
            for _ in range(count - 1):
                pairs = zip(solve(), first, strict=True)
                differing += torch.stack([(bits(x) != bits(y)).sum() for x, y in pairs])
        with flash_attn.use_backend("reference"):
            want = solver(replace(shape, deterministic=False), tensors)()
        counts = dict(zip(RESULTS, differing.tolist(), strict=True))
        say(event="repeats", shape=asdict(shape), name=shape.name, repeats=count,
            differing=counts, wrong=wrong(first, want))  # fmt: skip


def bits(x: Tensor) -> Tensor:
    """The same memory as integers, so that equal NaN are equal and zeros of both signs are not."""
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


def work(args: argparse.Namespace) -> int:
    """What the child does."""
    if args.work == "repeats":
        repeat(repeated_shapes()[: args.shapes], args.repeats, args.backend, args.device)
    else:
        each = max(1, args.launches // args.shapes)
        launch(args.shapes, each, args.backend, args.device, args.seed)
    synchronize(args.device)
    return 0


# ------------------------------------------------------------------------------------ the parent
def shares(job: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What each child is told: launches are divided, with seeds of their own."""
    names = ("launches", "shapes", "repeats", "backend", "device", "seed")
    whole = {name: getattr(args, name) for name in names}
    if job == "repeats":
        return [whole]
    count = max(1, min(args.workers, args.shapes))
    parts = []
    for number in range(count):
        shapes = args.shapes // count + (number < args.shapes % count)
        launches = args.launches * shapes // args.shapes
        share = {"shapes": shapes, "launches": launches, "seed": args.seed + number}
        parts.append(whole | share)
    return parts


def listen_to_all(
    job: str, args: argparse.Namespace, until: float
) -> tuple[list[dict[str, Any]], str]:
    """What all children said, and how the first that did not end well ended."""
    told = shares(job, args)
    with ThreadPoolExecutor(len(told)) as pool:
        heard = list(pool.map(lambda share: listen(job, share, args.patience, until), told))
    said = [message for messages, _ in heard for message in messages]
    ends = [end for _, end in heard]
    return said, next((end for end in ends if end != "exit code 0"), ends[0])


def listen(
    job: str, share: dict[str, Any], patience: float, until: float
) -> tuple[list[dict[str, Any]], str]:
    """What a child said, and how it ended."""
    command = [sys.executable, str(Path(__file__).resolve()), "--work", job]
    for name, value in share.items():
        command += [f"--{name}", str(value)]
    paths = [str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    child = Watched(command, patience, until, variables)
    said, rest, name = [], [], ""
    for line in child.lines():
        if not line.startswith("@@"):
            rest.append(line)
            continue
        message = json.loads(line[2:])
        if message["event"] == "begin":
            name = message["name"]
            continue
        said.append(message | {"name": name})
    end = child.end
    if end != "exit code 0":
        end += f" at {name or 'the start'}" + (": " + " | ".join(rest[-3:])[:300] if rest else "")
    return said, end


def of_launches(said: Sequence[dict[str, Any]], end: str, seconds: float) -> dict[str, Any]:
    """The part of the result file on launches."""
    return {
        "launches": sum(x["launches"] for x in said),
        "shapes": len(said),
        "wrong": {x["name"]: x["wrong"] for x in said if x["wrong"]},
        "end": end,
        "seconds": round(seconds, 1),
    }


def of_repeats(said: Sequence[dict[str, Any]], end: str, seconds: float) -> dict[str, Any]:
    """The part on repeats; dq may differ where no order was asked for."""
    rows = []
    for x in said:
        differing = x["differing"]
        free = () if x["shape"]["deterministic"] else ("dq",)
        bad = [name for name, count in differing.items() if count and name not in free]
        rows.append({**{k: x[k] for k in ("name", "repeats", "differing", "wrong")}, "bad": bad})
    return {"rows": rows, "end": end, "seconds": round(seconds, 1)}


def complaints(data: dict[str, Any]) -> list[str]:
    """Everything that was not as it must be."""
    found = []
    for job in JOBS:
        part = data.get(job)
        if part is None:
            found.append(f"{job}: not run")
        elif part["end"] != "exit code 0":
            found.append(f"{job}: {part['end']}")
    found += [f"{name}: {text}" for name, text in data.get("launches", {}).get("wrong", {}).items()]
    for row in data.get("repeats", {}).get("rows", []):
        found += [f"{row['name']}: {x} has other bits" for x in row["bad"]]
        found += [f"{row['name']}: wrong {row['wrong']}"] if row["wrong"] else []
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both jobs, repeats first; 0 if nothing is to complain about, 2 if it cannot run here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--launches", type=int, default=LAUNCHES, help="of each pass, in all")
    parser.add_argument("--shapes", type=int, default=SHAPES, help="random ones")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of one problem")
    parser.add_argument("--backend", default="sm90", help="whose kernels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="children that share the launches")
    parser.add_argument("--jobs", default="repeats,launches", type=names_among(JOBS))
    parser.add_argument("--patience", type=float, default=60.0, help="seconds of silence: a hang")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="for everything")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--commit", help="recorded instead of asking git")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try out")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.work:
        return work(args)
    if args.device == "cuda" and (
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)
    ):
        print("needs a GPU of compute capability 9.0", file=sys.stderr)
        return 2
    until = time.monotonic() + min(args.max_seconds, 1e6)
    data = new_result("endurance", args.commit, {"backend": args.backend, "seed": args.seed})
    for job in args.jobs:
        began = time.monotonic()
        said, end = listen_to_all(job, args, until)
        sum_up = of_repeats if job == "repeats" else of_launches
        data[job] = sum_up(said, end, time.monotonic() - began)
        print(f"{job}: {len(said)} shapes, {end}, {data[job]['seconds']} s", flush=True)
        if args.out is not None:
            write_json(args.out, data)
    found = complaints(data)
    print("\n".join(x[:300] for x in found[:20]) or "nothing to complain about")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
