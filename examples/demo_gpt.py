"""Train a small GPT on FlashMHA, and its twin on PyTorch's own attention, side by side.

Both models start from the same weights and see the same batches of bytes, taken from the source of
Python's standard library, so their loss curves must agree. The script shows the held-out bits per
byte before and after, writes text with the key/value cache, and leaves ``loss.png`` and
``result.json`` in the output folder. It exits with status 1 if the two models disagree.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.modules.mha import FlashMHA
from flash_attn.utils.generation import InferenceParams, sample

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_HELD_OUT_EVERY = 10  # of the files
PROMPT = b"def __init__(self, "
TOP_K = 20
TEMPERATURE = 0.7

# Training is chaotic: moving the weights by one rounding unit parted two float32 curves by 0.085
# nats per byte within 700 steps on the CPU, and the curves of a bfloat16 run on a GPU lay 0.036
# apart. The bounds on whole curves are three times that and find gross faults only.
LOSS_BOUND = {torch.float32: 0.25, torch.bfloat16: 0.1}
# A scale that is 5 % off, or a mask that hides one key too many, shows where no training lies
# between: at the first step (1e-5 or more in float32, where a right one differs by 0; 3e-4 in
# bfloat16 against 4e-6), and when the twin repeats the held-out text with the trained weights
# (in bits: 2e-3 in float32 against 0, 1e-3 in bfloat16 against 3e-6).
FIRST_LOSS_BOUND = {torch.float32: 3e-6, torch.bfloat16: 5e-5}
SAME_WEIGHTS_BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-4}
# Logits of decoding through the cache against one pass over the whole text, largest difference.
CACHE_BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.25}


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of its training; the defaults take minutes on two CPU cores."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 256
    batch_size: int = 4
    steps: int = 1000
    learning_rate: float = 4e-3
    eval_batches: int = 8
    new_bytes: int = 200


CPU_CONFIG = Config()
GPU_CONFIG = Config(
    layers=8,
    width=512,
    heads=8,
    context=1024,
    batch_size=32,
    steps=400,
    learning_rate=1e-3,
    eval_batches=4,
    new_bytes=400,
)


# ---- data ---------------------------------------------------------------------------------------


def library_files(root: Path | None = None) -> list[Path]:
    """The standard library's ``*.py`` files, sorted, without its tests.

    Raises:
        FileNotFoundError: this Python has no readable library source.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1])
    ]
    if len(files) < 2:
        raise FileNotFoundError(f"no Python source files to train on under {root}")
    return files


def split_files(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """(training files, held-out files): whole files, so no text is in both."""
    held_out = files[::_HELD_OUT_EVERY]
    kept = set(held_out)
    return [path for path in files if path not in kept], held_out


def read_bytes(files: list[Path]) -> Tensor:
    """All files one after the other, as a uint8 tensor."""
    return torch.frombuffer(
        bytearray(b"\n".join(path.read_bytes() for path in files)), dtype=torch.uint8
    )


def random_batch(text: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    """(batch_size, context + 1) int64 windows at random places."""
    starts = torch.randint(len(text) - config.context, (config.batch_size,), generator=generator)
    offsets = torch.arange(config.context + 1)
    return text[starts[:, None] + offsets].long()


# ---- model --------------------------------------------------------------------------------------


class TwinAttention(nn.Module):
    """FlashMHA's parameters under ``torch.nn.functional.scaled_dot_product_attention``.

    Positions are turned into q and k by FlashMHA's own module: what is compared is attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.rotary_emb = RotaryEmbedding(width // heads)
        self.Wqkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, inference_params: InferenceParams | None = None) -> Tensor:
        """(batch, seqlen, width) to the same."""
        batch, seqlen, width = x.shape
        qkv = self.Wqkv(x).view(batch, seqlen, 3, self.heads, width // self.heads)
        q, k, v = (part.transpose(1, 2) for part in self.rotary_emb(qkv).unbind(2))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out.transpose(1, 2).reshape(batch, seqlen, width))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a layer norm and around a residual."""

    def __init__(self, config: Config, layer_idx: int, flash: bool) -> None:
        super().__init__()
        width = config.width
        self.ln1 = nn.LayerNorm(width)
        self.attn = (
            FlashMHA(
                width,
                config.heads,
                causal=True,
                layer_idx=layer_idx,
                rotary_emb_dim=width // config.heads,
            )
            if flash
            else TwinAttention(width, config.heads)
        )
        self.ln2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, inference_params: InferenceParams | None = None) -> Tensor:
        """(batch, seqlen, width) to the same."""
        x = x + self.attn(self.ln1(x), inference_params=inference_params)
        return x + self.mlp(self.ln2(x))


class ByteGPT(nn.Module):
    """A decoder over bytes with rotary positions; ``flash=False`` makes the twin."""

    def __init__(self, config: Config, flash: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, config.width)
        self.blocks = nn.ModuleList(Block(config, i, flash) for i in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, 256, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        # Larger, or the bytes drown in the residual stream and the first hundred steps are lost.
        nn.init.normal_(self.tokens.weight, std=0.2)

    def forward(self, tokens: Tensor, inference_params: InferenceParams | None = None) -> Tensor:
        """(batch, seqlen) bytes to (batch, seqlen, 256) logits of the next byte."""
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x, inference_params=inference_params)
        return self.head(self.norm(x))


def make_twins(config: Config, device: torch.device) -> tuple[ByteGPT, ByteGPT]:
    """(model on FlashMHA, model on PyTorch's attention) with the same weights."""
    flash, twin = ByteGPT(config, flash=True), ByteGPT(config, flash=False)
    twin.load_state_dict(flash.state_dict())
    return flash.to(device), twin.to(device)


def precision(device: torch.device) -> torch.dtype:
    """The dtype that attention sees: bfloat16 by autocast on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The precision context of training, evaluation and generation."""
    if device.type == "cpu":
        return nullcontext()
    return torch.autocast(device.type, dtype=precision(device))


def next_byte_loss(model: ByteGPT, batch: Tensor) -> Tensor:
    """Mean cross entropy in nats of every next byte of (batch, context + 1) windows."""
    with autocast(batch.device):
        logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: ByteGPT, batches: list[Tensor]) -> float:
    """Held-out loss in bits."""
    losses = [next_byte_loss(model, batch).item() for batch in batches]
    return sum(losses) / len(losses) / math.log(2)


# ---- training -----------------------------------------------------------------------------------


@dataclass
class Runner:
    """One model in training, with its optimizer, its loss curve and the seconds it took."""

    model: ByteGPT
    config: Config
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.1,
        )

    def step(self, batch: Tensor, learning_rate: float) -> None:
        """One update; reading the loss also waits for the device, so the seconds are honest."""
        start = time.perf_counter()
        self.optimizer.param_groups[0]["lr"] = learning_rate
        loss = next_byte_loss(self.model, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        if batch.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)

    @property
    def tokens_per_second(self) -> float:
        """Over all steps but the first tenth, in which kernels are compiled and caches warmed."""
        warm = self.seconds[len(self.seconds) // 10 :]
        return self.config.batch_size * self.config.context * len(warm) / sum(warm)


def learning_rate(step: int, config: Config) -> float:
    """A short linear warm-up, then a cosine down to a tenth."""
    warm_up = max(1, config.steps // 10)
    if step < warm_up:
        return config.learning_rate * (step + 1) / warm_up
    done = (step - warm_up) / max(1, config.steps - warm_up)
    return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def train(runners: tuple[Runner, Runner], text: Tensor, device: torch.device) -> None:
    """Train both models on the same batches, step by step."""
    from tqdm import tqdm

    config = runners[0].config
    generator = torch.Generator().manual_seed(1)
    with tqdm(total=config.steps, desc="training", unit="step") as bar:
        for step in range(config.steps):
            batch = random_batch(text, config, generator).to(device)
            for runner in runners:
                runner.step(batch, learning_rate(step, config))
            flash, twin = runners
            bar.set_postfix_str(
                f"loss {flash.losses[-1]:.4f} | twin {twin.losses[-1]:.4f} | "
                f"{flash.tokens_per_second:,.0f} tokens/s"
            )
            bar.update()


# ---- generation ---------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: ByteGPT, prompt: bytes, config: Config, device: torch.device
) -> tuple[bytes, float]:
    """Continue ``prompt`` with the key/value cache: one pass over it, then one byte at a time.

    Returns:
        The whole text, and the largest difference between the logits of this decoding and those
        of one pass over the finished text.
    """
    torch.manual_seed(2)
    tokens = torch.tensor([list(prompt)], device=device)
    state = InferenceParams(max_seqlen=config.context, max_batch_size=1)
    fresh, logits = tokens, []
    length = min(config.context, len(prompt) + config.new_bytes)
    with autocast(device):
        while True:
            logits.append(model(fresh, inference_params=state).float())
            state.seqlen_offset += fresh.shape[1]
            if tokens.shape[1] >= length:
                break
            last = logits[-1][:, -1]
            fresh = sample(last, top_k=TOP_K, temperature=TEMPERATURE)[:, None]
            tokens = torch.cat([tokens, fresh], dim=1)
        whole = model(tokens).float()
    difference = (torch.cat(logits, dim=1) - whole).abs().max().item()
    return bytes(tokens[0].tolist()), difference


# ---- what is reported ---------------------------------------------------------------------------


def serving_backend(config: Config, device: torch.device) -> str:
    """Which backend attends for this model, asked in the way that every call asks."""
    from flash_attn.core import registry
    from flash_attn.core.problem import AttentionProblem, Visibility, make_transform

    headdim = config.width // config.heads
    q = torch.empty(
        1, config.context, config.heads, headdim, device=device, dtype=precision(device)
    )
    visibility = Visibility.from_window(-1, -1, causal=True)
    problem = AttentionProblem(q, q, q, make_transform(headdim), visibility)
    names = [registry.select(problem, backward=backward).name for backward in (False, True)]
    return names[0] if names[0] == names[1] else f"{names[0]}, backward {names[1]}"


def disagreements(result: dict[str, Any], dtype: torch.dtype) -> list[str]:
    """What lies beyond its bound, as sentences; empty if the two models agree."""
    checks = (
        ("first loss", "first_loss_difference", FIRST_LOSS_BOUND[dtype]),
        ("same weights", "same_weights_difference", SAME_WEIGHTS_BOUND[dtype]),
        ("loss curves", "max_loss_difference", LOSS_BOUND[dtype]),
        ("cached decoding", "cache_logit_difference", CACHE_BOUND[dtype]),
    )
    # Not "> bound": a NaN must fail.
    return [
        f"{name}: difference {result[key]:.3g} is not within {bound:g}"
        for name, key, bound in checks
        if not result[key] <= bound
    ]


def draw(path: Path, flash: list[float], twin: list[float], title: str) -> None:
    """Both loss curves above, their difference below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1), layout="constrained"
    )
    top.plot(twin, label="PyTorch scaled_dot_product_attention", linewidth=3, alpha=0.5)
    top.plot(flash, label="flash_attn FlashMHA", linewidth=1)
    top.set(ylabel="training loss (nats per byte)", title=title)
    top.legend()
    differences = [max(abs(a - b), 1e-9) for a, b in zip(flash, twin, strict=True)]
    bottom.semilogy(differences, color="black", linewidth=1)
    bottom.set(xlabel="step", ylabel="|difference|")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(config: Config, device: torch.device, folder: Path) -> dict[str, Any]:
    """Train, compare, generate; write ``loss.png`` and ``result.json`` into ``folder``."""
    torch.manual_seed(0)
    train_files, held_out_files = split_files(library_files())
    text, held_out = read_bytes(train_files), read_bytes(held_out_files)
    generator = torch.Generator().manual_seed(3)
    probes = [
        random_batch(held_out, config, generator).to(device) for _ in range(config.eval_batches)
    ]
    models = make_twins(config, device)
    backend = serving_backend(config, device)
    size = sum(weight.numel() for weight in models[0].parameters())
    print(
        f"text: {len(text) / 1e6:.1f} MB of Python's library, {len(held_out) / 1e6:.1f} MB held out"
    )
    print(f"model: {size / 1e6:.2f} M weights on {device}; attention by backend {backend!r}")
    before = bits_per_byte(models[0], probes)
    runners = (Runner(models[0], config), Runner(models[1], config))
    train(runners, text, device)
    sample, cache_difference = generate(models[0], PROMPT, config, device)
    flash, twin = runners
    after, after_twin = (bits_per_byte(runner.model, probes) for runner in runners)
    twin.model.load_state_dict(flash.model.state_dict())
    differences = [abs(a - b) for a, b in zip(flash.losses, twin.losses, strict=True)]
    worst = math.nan if any(map(math.isnan, differences)) else max(differences)
    result = {
        "backend": backend,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(precision(device)).removeprefix("torch."),
        "torch": torch.__version__,
        "config": asdict(config),
        "bits_per_byte_before": before,
        "bits_per_byte_after": after,
        "bits_per_byte_after_twin": after_twin,
        "same_weights_difference": abs(bits_per_byte(twin.model, probes) - after),
        "tokens_per_second": flash.tokens_per_second,
        "tokens_per_second_twin": twin.tokens_per_second,
        "first_loss_difference": differences[0],
        "max_loss_difference": worst,
        "cache_logit_difference": cache_difference,
        "sample": sample.decode("utf-8", errors="replace"),
        "losses": flash.losses,
        "losses_twin": twin.losses,
    }
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder / "loss.png", flash.losses, twin.losses, f"ByteGPT on {device}, backend {backend}")
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def report(result: dict[str, Any], folder: Path) -> None:
    """Print what :func:`run` found."""
    print(f"\ntext written with the key/value cache:\n{'-' * 40}\n{result['sample']}\n{'-' * 40}")
    print(
        f"held-out bits per byte: {result['bits_per_byte_before']:.3f} before, "
        f"{result['bits_per_byte_after']:.3f} after "
        f"(twin on scaled_dot_product_attention: {result['bits_per_byte_after_twin']:.3f})"
    )
    print(
        f"tokens per second in training: {result['tokens_per_second']:,.0f} "
        f"(twin: {result['tokens_per_second_twin']:,.0f})"
    )
    print(
        f"largest difference of the loss curves: {result['max_loss_difference']:.2e} nats "
        f"(first step: {result['first_loss_difference']:.2e}); "
        f"of held-out bits with the same weights: {result['same_weights_difference']:.2e}; "
        f"of cached decoding, in logits: {result['cache_logit_difference']:.2e}"
    )
    print(f"backend: {result['backend']}; curves and figures: {folder}/loss.png, result.json")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--steps", type=int, help="training steps (default: by device)")
    parser.add_argument("--quick", action="store_true", help="a tiny model for a few seconds")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of the results")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, found {options.steps}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; 0 if the twins agree."""
    options = parse(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = GPU_CONFIG if device.type == "cuda" else CPU_CONFIG
    if options.quick:
        config = replace(
            config, layers=2, width=64, heads=2, context=128, batch_size=4, steps=10, new_bytes=32
        )
    if options.steps is not None:
        config = replace(config, steps=options.steps)
    started = time.perf_counter()
    result = run(config, device, options.out)
    report(result, options.out)
    found = disagreements(result, precision(device))
    for sentence in found:
        print(f"DISAGREE: {sentence}", file=sys.stderr)
    verdict = "the two models disagree" if found else "the two models agree"
    print(f"{verdict} ({time.perf_counter() - started:.0f} s)")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
