"""The paper model of docs/cost.md: its law, its sizes and its table, by arithmetic done by hand."""

from pathlib import Path

import pytest

from benchmarks import cost_model
from benchmarks.cost_model import Anchor

DOC = Path(__file__).parent.parent / "docs/cost.md"


def test_the_anchor_itself_takes_its_own_tokens() -> None:
    anchor = Anchor("a run", 800_000_000, 9e9)
    assert anchor.tokens_at(800_000_000) == pytest.approx(9e9)
    assert Anchor("a run", 800_000_000, 9e9, share=0.5).tokens_at(800_000_000) == pytest.approx(4.5e9)


def test_another_size_has_the_same_loss_by_the_law() -> None:
    anchor = Anchor("a run", 800_000_000, 9e9)
    tokens = anchor.tokens_at(1_600_000_000)

    def loss(parameters: float, tokens: float) -> float:
        return 482.01 / parameters**0.3478 + 2085.43 / tokens**0.3658

    assert tokens < 9e9
    assert loss(1.6e9, tokens) == pytest.approx(loss(8e8, 9e9))
    assert loss(1.6e9, anchor.tokens_at(1_600_000_000, less=0.02)) == pytest.approx(loss(8e8, 9e9) - 0.02)


def test_a_loss_out_of_reach_is_said() -> None:
    with pytest.raises(ValueError, match="1,000,000 parameters never reach the loss of a run"):
        Anchor("a run", 800_000_000, 9e9).tokens_at(1_000_000)


def test_sizes_and_muons_products_are_counted_as_by_hand() -> None:
    model = cost_model.modern(24)
    assert (model.layers, model.channels, model.heads, model.family) == (24, 1536, 12, "nanochat")
    assert cost_model.size(model) == 12 * 24 * 1536**2 + 50257 * 1536
    one = 4 * 1536**2 * (1 + 1 + 1 + 1 + 4 + 4) * 1536 + 6 * 2 * 1536**3  # of a block, one polynomial
    flops = model.flops_per_token * 524_288
    assert cost_model.muon_share(model) == pytest.approx(5 * 24 * one / flops)


def test_hours_are_tokens_over_the_measured_rate() -> None:
    core, _ = cost_model.anchors()
    model = cost_model.modern(24)
    rate = cost_model.tokens_per_second(model, "H200", fp8=False)
    assert rate == pytest.approx(
        8 * 0.995 * cost_model.measured(False)["H200"] * 989e12 / model.flops_per_token / 1.0104, rel=1e-3
    )
    assert cost_model.hours(model, core, "H200", fp8=False) == pytest.approx(core.tokens / rate / 3600)
    assert cost_model.dollars(2.5, "H100") == 70.0


def test_the_page_has_the_tables_that_the_script_prints() -> None:
    page = DOC.read_text()
    for anchor in cost_model.anchors():
        for line in cost_model.table(anchor).splitlines()[2:]:
            assert line in page, "docs/cost.md: run python -m benchmarks.cost_model and put its tables there"
