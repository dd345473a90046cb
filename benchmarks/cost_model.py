"""What does GPT-2's grade cost with the speed recipe, on paper? Tokens, hours and dollars by depth on eight GPUs.

    python -m benchmarks.cost_model

Two published runs reached that grade. From each, a scaling law gives the tokens at which another size has the same
loss; measured rates turn them into hours. docs/cost.md has the table with every assumption.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.metrics import PEAK_FLOPS
from training.model_config import ModelConfig, model_from_descriptor

HERE = Path(__file__).parent
DEPTHS = (24, 26, 28, 30, 32)
GPUS = 8
EFFICIENCY = 0.995  # of eight GPUs against eight times one: measured on two (docs/scaling.md), on paper for eight
PRICES = {"H100": 3.50, "H200": 4.00}  # dollars a GPU-hour: llm.c's $28 for eight; the second is assumed
BATCH = 524_288  # tokens a step, over which Muon's products are spread
POLYNOMIALS = 5  # of Muon, a step and matrix

# L(N, D) = E + A / N^ALPHA + B / D^BETA: Besiroglu et al. 2024 (arXiv 2404.10102), a refit of Hoffmann et al. 2022.
A, B, ALPHA, BETA = 482.01, 2085.43, 0.3478, 0.3658
FP8_GAP = 0.015  # nats that fp8 lost against bf16 in 600 steps of d12 (benchmarks/results/fp8_curves.json)
MUON = 0.52  # of AdamW's compute for the same loss: Liu et al. 2025 (arXiv 2502.16982)


@dataclass(frozen=True)
class Anchor:
    """A run of others that reached the grade."""

    name: str
    parameters: int  # that take part in products: blocks and head
    tokens: float
    share: float = 1.0  # of its tokens that the speed recipe needs for the same loss

    def tokens_at(self, parameters: int, less: float = 0.0) -> float:
        """Tokens after which a model of so many parameters is `less` nats below the anchor's loss."""
        loss = A / self.parameters**ALPHA + B / self.tokens**BETA - less
        left = loss - A / parameters**ALPHA
        if left <= 0:
            raise ValueError(f"{parameters:,} parameters never reach the loss of {self.name}, on any number of tokens")
        return float(self.share * (B / left) ** (1 / BETA))


def size(model: ModelConfig) -> int:
    """Parameters of blocks and head: an embedding that is only looked up does not count."""
    return model.block_matrices + model.vocab * model.channels


def modern(depth: int) -> ModelConfig:
    """64 channels a layer, as nanochat's."""
    return model_from_descriptor(f"modern:d{depth}c{64 * depth}")


def anchors() -> tuple[Anchor, Anchor]:
    core = Anchor("nanochat d24, 16,704 x 524,288 tokens, CORE .2585", size(modern(24)), 16_704 * 524_288)
    hellaswag = Anchor("llm.c 1558M, 32,000 x 1,048,576 tokens", size(model_from_descriptor("d48")), 33.55e9, MUON)
    return core, hellaswag


def measured(fp8: bool) -> dict[str, float]:
    """MFU of d48 on one GPU by card: on an H200, and on an H100, where fp8 is scaled as bf16 was."""
    ours = _read("gpt2_training.json")["results"]
    used = {r["fp8"]: r["mfu"] for r in ours if r["model"] == "d48"}
    alone = [r["mfu"] for r in _read("results/scaling_2_gpus.json")["speed"] if r["model"] == "d48" and r["ranks"] == 1]
    return {"H200": used[fp8], "H100": used[fp8] / used[False] * sum(alone) / len(alone)}


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / name).read_text())
    return found


def muon_share(model: ModelConfig) -> float:
    """Of a step's FLOPs, what orthogonalizing adds: four matrices of C x C and two of C x 4C a layer, by all GPUs."""
    C = model.channels
    sides = [(C, C)] * 4 + [(C, 4 * C)] * 2
    products = sum(4 * short**2 * long + 2 * short**3 for short, long in sides)
    return POLYNOMIALS * model.layers * products / (model.flops_per_token * BATCH)


def tokens_per_second(model: ModelConfig, card: str, fp8: bool) -> float:
    used = measured(fp8)[card]
    return GPUS * EFFICIENCY * used * PEAK_FLOPS[card] / model.flops_per_token / (1 + muon_share(model))


def hours(model: ModelConfig, anchor: Anchor, card: str, fp8: bool) -> float:
    tokens = anchor.tokens_at(size(model), FP8_GAP if fp8 else 0.0)
    return tokens / tokens_per_second(model, card, fp8) / 3600


def dollars(time: float, card: str) -> float:
    return time * GPUS * PRICES[card]


def table(anchor: Anchor) -> str:
    head = ["model", "parameters", "tokens, bf16 / fp8"]
    head += [f"8 {card}, {kind}" for card in PRICES for kind in ("bf16", "fp8")]
    lines = [_line(head), _line(["---"] * len(head))]
    for depth in DEPTHS:
        model = modern(depth)
        tokens = [anchor.tokens_at(size(model), gap) / 1e9 for gap in (0.0, FP8_GAP)]
        times = [(hours(model, anchor, card, fp8), card) for card in PRICES for fp8 in (False, True)]
        cells = [f"{time:.2f} h, ${dollars(time, card):,.0f}" for time, card in times]
        lines.append(_line([f"d{depth}", f"{size(model) / 1e6:,.0f}M", f"{tokens[0]:.1f}B / {tokens[1]:.1f}B", *cells]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def reproduction(card: str, fp8: bool = False) -> float:
    """Hours of llm.c's own run, GPT-2 1558M on 33.6B tokens, by this program at its measured rate."""
    model = model_from_descriptor("d48")
    rate = GPUS * EFFICIENCY * measured(fp8)[card] * PEAK_FLOPS[card] / model.flops_per_token
    return 32_000 * 1_048_576 / rate / 3600


def main() -> None:
    for anchor in anchors():
        print(f"The loss of {anchor.name}:\n\n{table(anchor)}\n")
    for card in PRICES:
        time = reproduction(card)
        print(f"gpt2-1558m as llm.c ran it, 8 {card}: {time:.1f} h, ${dollars(time, card):,.0f}")
    print(f"Muon's products at d24: {muon_share(modern(24)):.2%} of a step")


if __name__ == "__main__":
    main()
