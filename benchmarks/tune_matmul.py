"""Which of cuBLASLt's algorithms is fastest for each product of a training step, on a card that is hot?

    python -m benchmarks.tune_matmul d48:16 d12:64 modern:d12:64

A model and its micro-batch each. Writes training/kernels_matmul.json. cuBLASLt proposes a few algorithms a product, by
its own estimate best first; each is timed under lasting load, where power, not the clock, sets the pace.
"""

import json
import statistics
import sys
from collections.abc import Sequence

import torch

from training.kernels_matmul import TUNED, Algorithm, Plan, Product, library
from training.kernels_model import chunks
from training.model_config import ModelConfig, model_from_descriptor

ROUNDS, ROUND_MS = 3, 25


def products(config: ModelConfig, rows: int) -> list[Product]:
    """Every product of a micro-step of so many tokens."""
    C, found = config.channels, []
    bias, gelu, dgelu = ("bias", "gelu", "dgelu") if config.family == "gpt2" else ("", "", "")
    for out, inner, epilogue, add in ((3 * C, C, bias, False), (C, C, bias, True), (4 * C, C, gelu, False),
                                      (C, 4 * C, bias, False)):  # fmt: skip
        found.append(Product(rows, out, inner, False, True, epilogue, add))
        found.append(Product(rows, inner, out, False, False, dgelu if inner == 4 * C else ""))
        found.append(Product(out, inner, rows, True, False, "", True))
    part = chunks(rows, config.padded_vocab)[0].stop
    found.append(Product(part, config.padded_vocab, C, False, True))
    found.append(Product(part, C, config.padded_vocab, False, False))
    found.append(Product(config.padded_vocab, C, part, True, False, "", True))
    return found


class Operands:
    def __init__(self, p: Product) -> None:
        draw = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        self.a = draw(*((p.k, p.m) if p.transpose_a else (p.m, p.k)))
        self.b = draw(*((p.n, p.k) if p.transpose_b else (p.k, p.n))) * 0.02
        self.d = torch.zeros(p.m, p.n, device="cuda", dtype=torch.bfloat16)
        self.add = self.d if p.accumulate else None
        self.bias = draw(p.n) if p.epilogue in ("bias", "gelu") else None
        self.aux = draw(p.m, p.n) if "gelu" in p.epilogue else None

    def run(self, plan: Plan) -> None:
        plan(self.a, self.b, self.d, self.add, self.bias, self.aux)


def milliseconds(plan: Plan, operands: Operands, algorithm: Algorithm, repeats: int) -> float:
    """Per product, over that many in a row."""
    plan.algorithm = algorithm
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        operands.run(plan)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def tune(product: Product) -> tuple[int, list[float]]:
    """The rank of the fastest of the library's proposals under lasting load, and the times of all of them."""
    plan, operands = Plan(product, library(0)), Operands(product)
    proposals = plan.propose()
    repeats = max(4, round(ROUND_MS / milliseconds(plan, operands, proposals[0], 10)))
    rounds = [[milliseconds(plan, operands, p, repeats) for p in proposals] for _ in range(ROUNDS)]
    times = [statistics.median(r[i] for r in rounds) for i in range(len(proposals))]
    best = min(range(len(times)), key=times.__getitem__)
    return best if times[best] < 0.99 * times[0] else 0, times


def case(text: str) -> tuple[ModelConfig, int]:
    """ "modern:d12:64" -> the model, and the tokens of a micro-step. Raises ValueError for anything else."""
    name, _, micro_batch = text.rpartition(":")
    if not name or not micro_batch.isdecimal() or not int(micro_batch):
        raise ValueError(f"{text!r}: write a model and its micro-batch, such as d12:64 or modern:d12:64")
    config = model_from_descriptor(name)
    return config, int(micro_batch) * config.context


def main(models: Sequence[str]) -> int:
    try:
        cases = [case(text) for text in models]
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    owner = library(0)
    tables = json.loads(TUNED.read_text()) if TUNED.exists() else {}
    table = tables.setdefault(f"{owner.card}, cuBLASLt {owner.version}", {})
    for config, rows in cases:
        for product in products(config, rows):
            rank, times = tune(product)
            rate = 2 * product.m * product.n * product.k / min(times) / 1e9
            print(f"{product.name:52s} {times[0]:.3f} -> {min(times):.3f} ms, {rate:.0f} TFLOP/s", flush=True)
            table.pop(product.name, None)
            if rank:
                table[product.name] = rank
            torch.cuda.empty_cache()
        TUNED.write_text(json.dumps(tables, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
