"""Compiling the Hopper kernels for sm_90a without a GPU, and what the compiler made of them.

    python tests/compile/sm90.py [--match TEXT] [--headdims D ...] [--selection]

compiles every plan with every mask that it serves, prints a line for each and fails if one spills
registers, has its warpgroup MMAs made sequential, or takes too much shared memory. With --selection
each plan, mask and feature occurs, in the combinations that need the most registers. In a process
of its own: the compiler aborts, without an exception, where it does not know its way.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any, NamedTuple
from unittest import mock

import barriers
import descriptors
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from flash_attn.backends.sm90 import launch, plans
from flash_attn.core.problem import (
    DENSE,
    AttentionProblem,
    SequenceLayout,
    Visibility,
    make_transform,
)

TARGET = GPUTarget("cuda", 90, 32)
MASKS = {
    "full": Visibility(),
    "causal": Visibility(None, 0),
    "left": Visibility(40, None),
    "window": Visibility(40, 30),
    "chunk": Visibility(None, 0, 128),
}
# What is asked of the kernel besides: a name for each combination that is compiled.
FEATURES = (
    "",
    "packed",
    "used",
    "softcap",
    "sinks",
    "packed sinks",
    "packed softcap",
    "used softcap",
    "alibi",
    "packed alibi",
    "alibi softcap sinks",
    "packed alibi softcap sinks",
)
_WAIT_OR_STEP = re.compile(r"(WARPGROUP\.DEPBAR\.LE) gsb0, 0x(\d+)|(MUFU\.EX2|FMNMX)")
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")


def softmax_under_products(code: str) -> list[tuple[int, int]]:
    """After each wait that leaves products running: the maxima and the powers computed before the
    next wait."""
    counts: list[Counter[str]] = []
    is_running = False
    for _, behind, step in _WAIT_OR_STEP.findall(code):
        if not step:
            is_running = int(behind) > 0
            counts += [Counter()] * is_running
        elif is_running:
            counts[-1] += Counter({step: 1})
    return [(count["FMNMX"], count["MUFU.EX2"]) for count in counts]


class Case(NamedTuple):
    """One compilation."""

    plan: plans.ForwardPlan
    headdim: int
    mask: str
    dtype: torch.dtype = torch.bfloat16
    features: str = ""
    headdim_v: int = 0  # 0: the head dim
    pack: int = 0  # query heads in a tile, 0: one of 4 heads on 2

    @property
    def label(self) -> str:
        plan = self.plan
        scheduler = ("rr", "dyn")[plan.scheduler]
        options = [f"{plan.consumers}x{plan.block_n}", f"st{plan.stages}", f"q{plan.q_slots}"]
        options += [f"o{plan.out_halves}"]
        flags = ("ping_pong", "skip", "slim", "late", "overlap", "peel", "joint")
        options += [name for name in flags if getattr(plan, name)]
        options += [f"p{plan.p_shared}"] if plan.p_shared else []
        dtype = str(self.dtype).removeprefix("torch.")
        options += [f"v{self.headdim_v}"] if self.headdim_v else []
        options += [f"pack{self.pack}"] if self.pack else []
        options += [dtype, self.features]
        return f"d{self.headdim} {self.mask} {scheduler} {' '.join(options)}"

    @property
    def problem(self) -> AttentionProblem:
        """A problem that asks for it all."""
        headdim_v = self.headdim_v or self.headdim
        places = (2, 1000) if "packed" not in self.features else (2000,)
        nheads = 2 * (self.pack or 2)
        q = torch.empty(*places, nheads, self.headdim, dtype=self.dtype, device="meta")
        k = torch.empty(*places, 2, self.headdim, dtype=self.dtype, device="meta")
        v = torch.empty(*places, 2, headdim_v, dtype=self.dtype, device="meta")
        transform = make_transform(
            self.headdim, softcap=20.0 if "softcap" in self.features else 0.0
        )
        if "sinks" in self.features:
            transform = transform._replace(sinks=torch.empty(nheads, device="meta"))
        if "alibi" in self.features:
            transform = transform._replace(alibi_slopes=torch.empty(2, nheads, device="meta"))
        bounds = torch.empty(3, dtype=torch.int32, device="meta")
        used = torch.empty(2, dtype=torch.int32, device="meta")
        layout = DENSE
        if "packed" in self.features:
            layout = SequenceLayout(bounds, bounds, max_seqlen_q=1000, max_seqlen_k=1000)
        if "used" in self.features:
            layout = layout._replace(seqused_q=used, seqused_k=used)
        return AttentionProblem(
            q, k, v, transform, MASKS[self.mask], layout, pack_gqa=self.pack > 0
        )


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel; ``lost`` and what follows as in ``aot.Resources``."""

    spilled: int
    shared: int
    seconds: float
    warnings: list[str]
    lost: list[str]
    unused: list[str]
    overlaid: list[str]
    opcodes: Counter[str] = field(repr=False)
    overlapped: list[tuple[int, int]]

    def failures(self, case: Case) -> list[str]:
        """What makes the kernel unfit."""
        found = [f"{self.spilled} bytes spilled"] if self.spilled else []
        if self.shared > plans.SHARED_LIMIT:
            found.append(f"{self.shared} bytes of shared memory, limit {plans.SHARED_LIMIT}")
        found += self.warnings
        found += [f"lost descriptor: {one}" for one in self.lost]
        found += [f"unused barrier: {one}" for one in self.unused]
        found += [f"overlaid barrier: {one}" for one in self.overlaid]
        plan, block_d = case.plan, launch.columns_of(case.problem)[0]
        # Of each consumer: one k-step of scores is 16 columns, of values 16 keys; scores appear
        # before the loop and in it, values in it and after it.
        products = plan.consumers * 2 * (block_d // 16 + plan.block_n // 16)
        if self.opcodes["HGMMA"] < products:
            found.append(f"{self.opcodes['HGMMA']} warpgroup MMAs, expected {products} or more")
        if plan.overlap and not self.overlaps(case):
            found.append(f"maxima and weights under products: {self.overlapped}")
        if not (self.opcodes["UTMALDG"] and self.opcodes["UTMASTG"]):
            found.append("no TMA")
        return found

    def overlaps(self, case: Case) -> bool:
        """Whether all consumers compute the maxima of a thread's block_n / 2 scores under products
        and, where the loop has no mask, all but one most weights. The assembler of Triton 3.6 keeps
        them behind the wait with a mask or lengths of the device at head dim 256, and for the last
        of four consumers."""
        scores, consumers = case.plan.block_n / 2, case.plan.consumers
        peeled = case.plan.peel and case.mask == "causal" and not case.pack
        if sum(maxima >= 0.9 * scores for maxima, _ in self.overlapped) < consumers:
            return False
        enough = sum(weights >= 0.75 * scores for _, weights in self.overlapped)
        full = case.mask == "full" and not (case.headdim == 256 and case.features)
        return enough >= consumers - 1 or not (full or peeled)


def arguments_of(case: Case) -> tuple[JITFunction, tuple[Any, ...], dict[str, Any]]:
    """The kernel call that the package makes for ``case``."""
    calls = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        calls.append((self, args, keywords))

    counter = torch.empty(1, dtype=torch.int32, device="meta")
    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(launch, "counter_for", return_value=counter),
        mock.patch.object(launch, "multiprocessors_of", return_value=132),
    ):
        launch.forward(case.problem, None, case.plan)
    (call,) = calls
    return call


def compile_case(case: Case) -> Compiled:
    """Compile ``case`` and take the result apart."""
    kernel, arguments, keywords = arguments_of(case)
    started = time.perf_counter()
    backend = make_backend(TARGET)
    keywords = {"debug": False, **keywords}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*arguments, **keywords)
    options, signature, constants, attributes = kernel._pack_args(
        backend, keywords, bound, specialization, options
    )
    source = GluonASTSource(kernel, signature, constants, attributes)
    knobs.nvidia.dump_ptxas_log = True
    log = StringIO()
    with redirect_stdout(log):
        compiled = triton.compile(source, target=TARGET, options=options.__dict__)
    seconds = round(time.perf_counter() - started, 1)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    if not spills:
        raise RuntimeError("no log of the assembler: set TRITON_ALWAYS_COMPILE=1")
    code = descriptors.disassemble(compiled.asm["cubin"])
    return Compiled(
        spilled=sum(int(number) for pair in spills for number in pair),
        shared=compiled.metadata.shared,
        seconds=seconds,
        warnings=[x.strip() for x in log.getvalue().splitlines() if re.search(r"\bC75\d\d\b", x)],
        lost=descriptors.lost(code),
        unused=barriers.unused(compiled.asm["ttgir"]),
        overlaid=barriers.overlaid(barriers.allocated(compiled.asm["ttgir"])),
        opcodes=Counter(_OPCODE.findall(code)),
        overlapped=softmax_under_products(code),
    )


def plans_in_use() -> list[tuple[int, bool, plans.ForwardPlan]]:
    """The table of plans, without those of tiles that are padded instead."""
    rows = plans.forward_plans()
    return [
        (block_d, masked, launch.within_registers(plan, False, False))
        for block_d, masked, plan in rows
        if launch.columns_of(Case(plan, block_d, "full").problem)[0] == block_d
    ]


def all_cases() -> list[Case]:
    """Every plan with the masks it is chosen for; float16 and other head dims where it differs."""
    cases = []
    for block_d, masked, plan in plans_in_use():
        cases.append(Case(plan, block_d, "causal" if masked else "full"))
        if masked:
            window_plan = launch.within_registers(plans.windowed(plan, block_d), True, False)
            cases += [Case(window_plan, block_d, mask) for mask in ("left", "window")]
    longest = {(block_d, masked): plan for block_d, masked, plan in plans_in_use()}
    cases += [
        Case(plan, block_d, "causal" if masked else "full", torch.float16)
        for (block_d, masked), plan in longest.items()
    ]
    cases += feature_cases()
    return list(dict.fromkeys(cases))


def feature_cases() -> list[Case]:
    """Features with the plans that :func:`launch.plan_for` chooses for them, at several lengths."""
    cases = []
    for headdim in plans.BLOCK_DS:
        for features in ("packed", "used", "packed sinks"):
            cases += [planned(headdim, mask, features) for mask in ("full", "causal", "window")]
        for features in ("softcap", "sinks"):
            for length in (500, 3000, 9000):
                cases += [planned(headdim, mask, features, length) for mask in ("full", "causal")]
            cases += [planned(headdim, mask, features, 500, few=True) for mask in MASKS]
        cases += [planned(headdim, mask, "softcap sinks", pack=8) for mask in MASKS]
        cases.append(planned(headdim, "chunk", ""))
        for features in ("packed softcap", "used softcap"):
            cases += [planned(headdim, mask, features) for mask in ("full", "window")]
        cases += [planned(headdim, "chunk", features) for features in ("packed", "used")]
    for headdim, headdim_v in (
        (64, 128), (64, 256), (128, 64), (256, 128), (256, 64), (192, 128), (96, 64), (64, 192),
        (128, 96), (96, 256),
    ):  # fmt: skip
        cases += [
            planned(headdim, mask, features, 3000, headdim_v)
            for mask in ("full", "causal")
            for features in ("", "packed")
        ]
    for headdim in plans.BLOCK_DS:
        for features in ("alibi", "packed alibi"):
            cases += [planned(headdim, mask, features) for mask in ("full", "causal", "window")]
        cases.append(planned(headdim, "window", "alibi softcap sinks", pack=8))
        cases.append(planned(headdim, "window", "packed alibi softcap sinks", pack=8))
        for pack, features in ((2, ""), (4, "packed sinks"), (8, "packed"), (8, "used"), (8, "")):
            cases += [
                planned(headdim, mask, features, pack=pack) for mask in ("full", "causal", "window")
            ]
    return cases


def selection() -> list[Case]:
    """A part of :func:`all_cases` that compiles in a minute or two."""
    cases = []
    for block_d, masked, plan in plans_in_use():
        cases.append(Case(plan, block_d, "causal" if masked else "full"))
    cases += [planned(headdim, "window", "packed sinks") for headdim in plans.BLOCK_DS]
    cases += [
        planned(256, "window", ""),
        planned(192, "window", ""),
        planned(96, "causal", ""),
        planned(192, "causal", "", headdim_v=128),
        planned(128, "window", "packed softcap"),
        planned(128, "chunk", "packed"),
        planned(64, "causal", "softcap", 500)._replace(dtype=torch.float16),
        planned(256, "causal", "softcap"),
        planned(128, "full", "sinks"),
        planned(128, "left", "used"),
        planned(64, "full", "packed", headdim_v=128),
        planned(256, "causal", "", headdim_v=64),
        planned(64, "full", "", 500, pack=8),
        planned(64, "chunk", "sinks"),
        planned(64, "causal", "packed"),
        planned(256, "full", "used"),
        planned(64, "causal", "alibi"),
        planned(128, "full", "alibi", pack=8),
        planned(128, "causal", "packed alibi"),
        planned(128, "window", "packed sinks", pack=8),
        planned(256, "causal", "packed", pack=4),
        # Half of the weights are multiplied from shared memory.
        planned(96, "full", ""),
        planned(96, "full", "")._replace(dtype=torch.float16),
        planned(96, "full", "softcap"),
        planned(96, "full", "sinks"),
        planned(96, "full", "", pack=8),
        planned(96, "full", "", headdim_v=64),
        # Six slots for keys and values.
        planned(192, "full", ""),
        planned(192, "full", "softcap"),
    ]
    return list(dict.fromkeys(cases))


def planned(
    headdim: int,
    mask: str,
    features: str,
    length: int = 3000,
    headdim_v: int = 0,
    few: bool = False,
    pack: int = 0,
) -> Case:
    """The case of a problem with sequences of ``length``, on a GPU that has ``few`` or many tiles
    for each multiprocessor."""
    case = Case(plans.forward_plan(plans.ForwardKey(64, False, 1)), headdim, mask,
                features=features, headdim_v=headdim_v, pack=pack)  # fmt: skip
    problem = case.problem
    long = problem.k.new_empty(2, length, 2, headdim)
    queries = problem.k.new_empty(2, length, problem.nheads, headdim)
    if problem.is_varlen_q:
        problem = problem._replace(layout=problem.layout._replace(max_seqlen_k=length))
    else:
        problem = problem._replace(q=queries, k=long)
    with mock.patch.object(launch, "multiprocessors_of", return_value=400 if few else 1):
        return case._replace(plan=launch.plan_for(problem))


def main() -> int:
    """Compile, print, count what is unfit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--match", default="", help="only cases whose line contains it")
    parser.add_argument("--headdims", type=int, nargs="*", help="of these alone")
    parser.add_argument("--selection", action="store_true", help="cases that cover the features")
    args = parser.parse_args()
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # the assembler's log is not cached
    unfit = 0
    cases = selection() if args.selection else all_cases()
    cases = [case for case in cases if args.match in case.label]
    if args.headdims:
        cases = [case for case in cases if case.headdim in args.headdims]
    cases = [case for case in cases if not launch.register_reasons(case.problem)]
    for case in cases:
        result = compile_case(case)
        failures = result.failures(case)
        unfit += bool(failures)
        print(case.label, f"{result.shared} B {result.seconds} s", "; ".join(failures), flush=True)
    print(f"triton {triton.__version__}: {len(cases)} kernels, {unfit} unfit", flush=True)
    return 1 if unfit or not cases else 0


if __name__ == "__main__":
    sys.exit(main())
